"""Files and directories that appear whole or not at all (clause 9.7).

Everything is written under a hidden name beside the target, synced, and renamed. Whatever goes
wrong, the hidden one is removed and the target is as it was; a process killed outright leaves the
old target or the new one, and at worst the hidden name `.NAME.partial-*`, which may be deleted.
"""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC, ENOTSUP
from pathlib import Path
from typing import BinaryIO

from bridge.errors import BridgeError


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """Stop before any work where `target` is there, or the directory to put it in is not.

    `overwrite` allows for a checkpoint directory in its place, and for nothing else.
    """
    if os.path.lexists(target):
        if not overwrite:
            raise BridgeError(f"{target}: exists already; remove it or choose another name")
        if target.is_symlink() or not (target / "config.json").is_file():
            raise BridgeError(f"{target}: is not a checkpoint, so it is not overwritten")
    elif not os.path.isdir(target.parent):
        raise BridgeError(f"{target.parent}: no such directory to write {target.name!r} in")


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `target` once the block ends well.

    Raises BridgeError, in one line, where the system refuses (a full disk, no permission).
    """
    partial = _beside(target)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _explain(target, error) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `target` once the block ends well.

    The files in it must be synced by who writes them (`new_file` does). With `overwrite`, an old
    checkpoint is exchanged for the new one in a single step. Raises BridgeError as `new_file` does;
    one from the block names files as they would have been called.
    """
    refuse_existing(target, overwrite)
    partial = _beside(target)
    try:
        partial.mkdir()
        yield partial
        _sync_directory(partial)
        if target.exists():
            refuse_existing(target, overwrite)  # it may have come since
            _exchange(partial, target)
        else:
            partial.rename(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _explain(target, error) from None
    except BridgeError as error:
        if str(partial) not in str(error):
            raise
        raise BridgeError(str(error).replace(str(partial), str(target))) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step: neither is ever missing, which two renames cannot promise."""
    a, b = os.fsencode(one), os.fsencode(other)
    current_directory, swap = -100, 2
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.renameat2(current_directory, a, current_directory, b, swap)
    elif sys.platform == "darwin":
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.renamex_np(a, b, swap)
    else:
        raise OSError(ENOTSUP, "this system cannot exchange directories; choose another name")
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _explain(target: Path, error: OSError) -> BridgeError:
    mend = "; free some space and try again" if error.errno == ENOSPC else ""
    return BridgeError(
        f"{target}: cannot be written ({error.strerror or error}), left as it was{mend}"
    )
