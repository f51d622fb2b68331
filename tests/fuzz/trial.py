"""One input, written to disk and opened: a correct load, a BridgeError of one line, or a fault.

A load is correct where every tensor is as the config says (by a reading of the config that is not
Bridge's) and holds the bytes that the safetensors library reads, and where the tokenizer, if there
is one, works. Whatever else happens is told as a `Fault`.
"""

import json
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge.checkpoints.reading import Checkpoint, open_checkpoint
from bridge.checkpoints.sizes import summarise
from bridge.errors import BridgeError
from bridge.rope import inverse_frequencies
from bridge.text.chat import render_chat
from bridge.text.tokenizer import Tokenizer, read_eos_ids, read_tokenizer

from .oracle import disagreement
from .seeds import Entry, Link, Special, Tree
from .watch import misdeeds, watched

LONGEST = 2000  # characters of a message: a line that can be read
TEXTS = ("ab a b", "", "A1 é 🦊 <tool></s><eos>\n")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab <b>"}]


@dataclass(frozen=True)
class Outcome:
    """`load`, `error` (with the message) or `fault` (with what happened)."""

    kind: str
    said: str = ""


class Workspace:
    """A directory with one seed checkpoint, in which inputs are tried one after another."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root, self.tree = root, tree
        for path, entry in tree.items():
            _put(root / path, entry)

    @contextmanager
    def changed(self, changes: Tree) -> Iterator[Path]:
        """The checkpoint with these entries changed, and afterwards as it was."""
        try:
            for path, entry in changes.items():
                _put(self.root / path, entry)
            yield self.root / "model"
        finally:
            for path in changes:
                _put(self.root / path, self.tree.get(path, Special("absent")))

    def attempt(self, changes: Tree, *, headers_only: bool = False) -> Outcome:
        """What these changes come to."""
        with self.changed(changes) as path:
            raised: BaseException | None = None
            wrong: str | None = None
            render_chat("", [], {})  # has its process there, which the input before may have ended
            with watched() as seen:
                try:
                    wrong = _use(open_checkpoint(path, headers_only=headers_only), headers_only)
                except BaseException as error:
                    raised = error
            outcome = self._outcome(wrong, raised)
            if bad := misdeeds(seen, (path, *bases(path))):
                outcome = Outcome("fault", f"it did this: {bad[:3]}; then {outcome}")
        return outcome

    def _outcome(self, wrong: str | None, raised: BaseException | None) -> Outcome:
        match raised:
            case None:
                return Outcome("fault", wrong) if wrong else Outcome("load")
            case BridgeError():
                return self._judge(str(raised))
            case KeyboardInterrupt():
                raise raised
            case _:
                return Outcome("fault", "".join(traceback.format_exception(raised)[-6:]))

    def _judge(self, message: str) -> Outcome:
        if "MemoryError" in message:
            return Outcome("fault", f"ran out of memory: {message}")
        names = [*(path.rsplit("/", 1)[-1] for path in self.tree), str(self.root)]
        names.append("tokenizer_config.json")  # where chat templates are looked for
        if not message.isprintable():
            return Outcome("fault", f"not one printable line: {message[:500]!r}")
        if len(message) > LONGEST:
            return Outcome("fault", f"{len(message)} characters long: {message[:500]!r}")
        if not any(name in message for name in names):
            return Outcome("fault", f"names no file: {message!r}")
        return Outcome("error", message)


def bases(path: Path) -> tuple[Path, ...]:
    """The base of an adapter, whose place is the adapter's to say (clause 9.1)."""
    try:
        if not (path / "bridge_adapter.json").is_file():
            return ()
        name = json.loads((path / "bridge_adapter.json").read_bytes())["base"]
        return (path / name,) if (path / name).is_dir() else ()
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return ()


def _use(checkpoint: Checkpoint, headers_only: bool) -> str | None:
    """Read all there is to read; what is wrong with it, if anything."""
    summarise(checkpoint).to_json()
    if not headers_only and (wrong := disagreement(checkpoint)):
        return wrong
    frequencies, factor = inverse_frequencies(checkpoint.config.rope, checkpoint.config.head_dim)
    if not (np.isfinite(frequencies).all() and np.isfinite(factor)):
        return f"rope frequencies are not finite: {frequencies}, {factor}"
    read_eos_ids(checkpoint.assets, checkpoint.config.vocab_size)
    tokenizer = read_tokenizer(checkpoint.assets)
    return None if tokenizer is None else _talk(tokenizer)


def _talk(tokenizer: Tokenizer) -> str | None:
    _ = tokenizer.eos_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        stream = tokenizer.streamer()
        said = "".join([*(stream.push(i) for i in ids), stream.finish()])
        if said != whole or not all(type(i) is int and i >= 0 for i in ids):
            return f"{text!r} became {ids!r}, {whole!r} and {said!r}"
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat(MESSAGES)
    return None


def _put(path: Path, entry: Entry) -> None:
    """Make `path` this entry, whatever it is now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif isinstance(entry, bytes) and path.is_file() and not path.is_symlink():
        path.write_bytes(entry)
        return
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    match entry:
        case bytes():
            path.write_bytes(entry)
        case Link(target):
            path.symlink_to(target)
        case Special("fifo"):
            os.mkfifo(path)
        case Special("folder"):
            path.mkdir()
        case _:
            pass
