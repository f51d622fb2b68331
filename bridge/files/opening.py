"""Files opened with distrust: plain files of bounded size, and links only where they may lead.

A name in a checkpoint may be a link, since Hugging Face's cache is made of them, but only to a file
of the same directory, or of the cache's `blobs` of the same repository; a file that the user named
may be any link. A pipe or a device is not even opened. Raises BridgeError of one line.
"""

import os
import stat
from pathlib import Path

from bridge.errors import BridgeError, one_line, show_path

MAX_TEXT = 200_000_000  # bytes; the largest tokenizers have 40 million
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def exists(path: Path) -> bool:
    """Whether there is anything of this name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def open_file(path: Path, *, links: bool = False) -> int:
    """A descriptor of a plain file, for reading. Raises FileNotFoundError where there is none.

    `links`: it may be one to anywhere, since it is the user who names it.
    """
    try:
        if not links and os.path.islink(path):
            directory, real = os.path.realpath(path.parent), os.path.realpath(path)
            if os.path.dirname(real) != directory and not _in_cache(directory, real):
                raise BridgeError(
                    f"{path}: is a link to outside of its directory; copy the file there"
                )
        _refuse_special(path, os.stat(path).st_mode)  # opening a device may do something to it
        # What has become a pipe since would wait for a writer; this does not.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if exists(path):
            raise BridgeError(
                f"{path}: is a link that leads nowhere; copy the file there"
            ) from None
        raise
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        reason = getattr(error, "strerror", None) or one_line(error)
        raise BridgeError(f"{show_path(path)}: cannot be read ({reason})") from None
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
    except BridgeError:
        os.close(descriptor)
        raise
    return descriptor


def open_named(path: Path) -> int:
    """A descriptor of a plain file that the user named. Raises BridgeError where there is none."""
    try:
        return open_file(path, links=True)
    except FileNotFoundError:
        raise BridgeError(f"{path}: cannot be read (No such file or directory)") from None


def read_text(path: Path, *, links: bool = False) -> str:
    """A whole file in UTF-8. Raises FileNotFoundError where there is none."""
    with open(open_file(path, links=links), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_TEXT:
                raise BridgeError(f"{path}: is larger than {MAX_TEXT // 10**6} MB")
            return file.read(size).decode("utf-8")
        except OSError as error:
            raise BridgeError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise BridgeError(f"{path}: is not UTF-8 (at byte {error.start})") from None


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = KINDS.get(stat.S_IFMT(mode), "a device")
        mend = "" if stat.S_ISDIR(mode) else "; copy what it gives into one"
        raise BridgeError(f"{path}: is {what}, and is not a file{mend}")


def _in_cache(directory: str, real: str) -> bool:
    """Whether `directory` is a snapshot in Hugging Face's cache, or a folder of one, and `real` a
    file of its blobs."""
    for snapshots in (os.path.dirname(directory), os.path.dirname(os.path.dirname(directory))):
        blobs = os.path.join(os.path.dirname(snapshots), "blobs")
        if os.path.basename(snapshots) == "snapshots" and os.path.dirname(real) == blobs:
            return True
    return False
