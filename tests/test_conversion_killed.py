"""`bridge convert` killed at many moments of its writing: DST absent or whole, SRC untouched.

It kills itself (SIGKILL): once so many of its bytes are with the system, or, every other time, at
one of the interpreter's audit events, among which are files being opened, renamed and removed. So
the moments are the same on every machine, whatever its pace.
"""

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest

KILLS = [16, pytest.param(50, marks=pytest.mark.slow)]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Counted(io.FileIO):
    """A file of those that count together what is written to them, and die when it is enough."""

    written, enough = 0, float("inf")

    def write(self, data):
        data = memoryview(data).cast("B")
        left = Counted.enough - Counted.written
        count = super().write(data[: int(min(left, len(data)))])
        Counted.written += count
        if Counted.written >= Counted.enough:
            die()
        return count


def convert(src, dst, form, note, enough, event):
    """Run the command line, in a process of its own, and note how many bytes and events it was."""
    from bridge_cli.main import app

    heard, plain = 0, Path.open

    def hear(name, arguments):
        nonlocal heard
        heard += 1
        if heard == event:
            die()

    def counted(path, mode="r", *rest, **options):
        if mode != "xb":  # how everything that is written is opened
            return plain(path, mode, *rest, **options)
        return io.BufferedWriter(Counted(path, mode))

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    Counted.enough = enough
    sys.addaudithook(hear)
    arguments = ["convert", src, dst, "--to", form, "--shard-size", "2MB"]
    with mock.patch.object(Path, "open", counted):
        app(arguments, prog_name="bridge", standalone_mode=False)
    note.write_text(f"{Counted.written} {heard}")


def contents(directory):
    """The hash of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from tiny_host import write_host

    from bridge.checkpoints.initialise import init

    root = tmp_path_factory.mktemp("killed")
    write_host(root / "host", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    init(root / "host", root / "src", heads=2, head_dim=32)
    shutil.rmtree(root / "host")
    return root / "src"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_conversion_leaves_nothing_half_done(source, tmp_path, monkeypatch, kills):
    context = multiprocessing.get_context("forkserver")
    # What a process then need not import before it starts to write. The server imports it, and
    # passes over in silence what it does not find.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    commands = ["bridge_cli.main", "bridge.checkpoints.conversion", "rich.console", "rich.progress"]
    context.set_forkserver_preload(["__main__", __name__, *commands])
    home, note = tmp_path / "home", tmp_path / "note"
    home.mkdir()

    def run(form, enough=float("inf"), event=None):
        arguments = (str(source), str(home / "dst"), form, note, enough, event)
        process = context.Process(target=convert, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    before = contents(source)
    whole, total = {}, {}
    for form in ("jax", "mlx"):
        assert run(form) == 0
        whole[form] = contents(home / "dst")
        size, events = map(int, note.read_text().split())
        assert size == sum(path.stat().st_size for path in (home / "dst").iterdir())
        total[form] = size, events
        shutil.rmtree(home / "dst")
    rng, interrupted = random.Random(0), 0
    for kill in range(kills):
        form = ("jax", "mlx")[kill % 2]
        size, events = total[form]
        if kill // 2 % 2:
            code = run(form, event=rng.randrange(1, events))
        else:
            code = run(form, enough=int(1.1 * rng.random() * size))  # a few come too late
        assert code in (0, -signal.SIGKILL)
        assert contents(source) == before
        left = {path.name for path in home.iterdir()}
        interrupted += "dst" not in left
        if "dst" in left:
            assert contents(home / "dst") == whole[form]
        assert all(name == "dst" or name.startswith(".dst.partial-") for name in left)
        for name in left:
            shutil.rmtree(home / name)
    assert kills // 2 <= interrupted < kills
