"""What training.py measures with: trees, checkpoints, and engines in processes of their own.

A tree is a checkout of Bridge, ours or an older revision as git has it. An engine is asked by
`update`, and what it is and answers is in training_engines.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_engines import Rows

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("", "backends", "conformance", "cli")  # of a tree
ENGINES = Path(__file__).with_name("training_engines.py")
# What glibc is told where bytes are measured: what is freed goes back at once, so that those that
# are resident are those in use.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
NOW, BEFORE = "bridge", "before"


@dataclass
class Place:
    """What all parts share: trees, checkpoints, and how an engine is started."""

    scratch: Path
    options: argparse.Namespace
    made: dict[str, Path] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """What figures are of, beside the machine."""
        names = ("backend", "width", "prompt", "response", "threads", "layers")
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        now = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no git"
        asked = {name: getattr(self.options, name) for name in names}
        return {"asked": asked, "revisions": {NOW: now, BEFORE: self.options.before}}

    def checkpoint(self) -> Path:
        """The model with blocks."""
        if "checkpoint" not in self.made:
            from beside import make

            whole = self.options.checkpoint or make(self.scratch)
            if self.options.layers:
                whole = cut(whole, self.scratch / "cut", self.options.layers)
            self.made["checkpoint"] = whole.resolve()
        return self.made["checkpoint"]

    def host(self) -> Path:
        """The same without, as TRL reads it."""
        if "host" not in self.made:
            from bridge.checkpoints.reading import open_checkpoint
            from bridge.evaluation.peers.host import write_host

            self.made["host"] = self.scratch / "plain"
            write_host(open_checkpoint(self.checkpoint()), self.made["host"])
        return self.made["host"]

    def before(self) -> Path:
        """The older tree, as git has it."""
        if "before" not in self.made:
            tree = self.made["before"] = self.scratch / "before"
            tree.mkdir()
            git = ["git", "-C", str(ROOT), "archive", self.options.before]
            archive = subprocess.run(git, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        return self.made["before"]

    def bridge(self, tree: Path = ROOT, **said: Any) -> "Engine":
        """Bridge of a tree."""
        setup = {"engine": "bridge", "backend": self.options.backend}
        setup |= {"blocks": True, "trainable": "all"}
        if "config" not in said:
            said["checkpoint"] = str(self.checkpoint())
        return Engine(tree, self.options.threads, setup | said)

    def trl(self) -> "Engine":
        """TRL, of the host."""
        setup = {"engine": "trl", "host": str(self.host()), "width": self.options.width}
        scratch = self.scratch / "trl"
        return Engine(ROOT, self.options.threads, setup | {"scratch": str(scratch)})

    def rows(self, tailed: bool = False) -> Rows:
        """What is learnt from."""
        o = self.options
        return Rows(o.width, o.prompt, o.response, tailed)


def cut(checkpoint: Path, out: Path, layers: int) -> Path:
    """The checkpoint with its first layers alone."""
    from bridge.checkpoints.reading import open_checkpoint
    from bridge.checkpoints.writing import write_checkpoint
    from bridge.config import parse_config, tensor_shapes

    opened = open_checkpoint(checkpoint)
    raw = {**opened.raw_config, "num_hidden_layers": layers}
    blocks = [layer for layer in raw["bridge"]["layers"] if layer < layers]
    raw["bridge"] = {**raw["bridge"], "layers": blocks}
    names = list(tensor_shapes(parse_config(raw)))
    tensors = ((name, opened.tensors[name]) for name in names)
    specs = {name: opened.specs[name] for name in names}
    write_checkpoint(out, raw, specs, tensors, assets=opened.assets)
    return out


class Engine:
    """An engine's process."""

    def __init__(self, tree: Path, threads: int, setup: dict[str, Any]) -> None:
        """Started and loaded; it has the tree's own packages, whatever is installed."""
        here = [str(tree / part) for part in PACKAGES] + [str(Path(__file__).parent)]
        path = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
        environment = GIVES_BACK if setup.get("gives_back") else {}
        count = {f"{pool}_NUM_THREADS": str(threads) for pool in ("OMP", "MKL", "OPENBLAS")}
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it is closed with the engine)
        self.process = subprocess.Popen(
            [sys.executable, str(ENGINES), json.dumps(setup)],
            env={**os.environ, **count, **environment, "PYTHONPATH": path},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        where = Path(self._answer()["where"])
        if setup["engine"] == "bridge" and where != tree:
            raise SystemExit(f"asked for Bridge of {tree}, it took that of {where}")

    def update(self, rows: Rows, objective: str = "grpo", **said: Any) -> dict[str, Any]:
        """One update: its seconds, and what shows what it did."""
        assert self.process.stdin is not None
        print(json.dumps({"rows": rows, "objective": objective, **said}), file=self.process.stdin)
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.said.seek(0)
        raise SystemExit(f"an engine ended:\n{self.said.read()[-2000:]}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.said.close()
