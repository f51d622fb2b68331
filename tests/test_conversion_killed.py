"""`bridge convert` killed at fifty moments of its writing: DST absent or whole, SRC untouched."""

import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import time

import pytest

KILLS = 50


def convert(src, dst, form):
    """Run the command line, in a process of its own."""
    from bridge_cli.main import app

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    app(["convert", src, dst, "--to", form, "--shard-size", "2MB"], prog_name="bridge")


def contents(directory):
    """The hash of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def written(parent):
    """Bytes of the unfinished checkpoint; none while one of its files gets its name."""
    try:
        return sum(path.stat().st_size for path in parent.glob(".dst.partial-*/*"))
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from tiny_host import write_host

    from bridge.initialise import init

    root = tmp_path_factory.mktemp("killed")
    write_host(root / "host", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    init(root / "host", root / "src", heads=2, head_dim=32)
    shutil.rmtree(root / "host")
    return root / "src"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_conversion_leaves_nothing_half_done(source, tmp_path):
    """The moments are fractions of the bytes that are written, whatever the machine's pace."""
    context = multiprocessing.get_context("forkserver")
    # What a process then need not import before it starts to write.
    commands = ["bridge_cli.main", "bridge.conversion", "rich.console", "rich.progress"]
    context.set_forkserver_preload(["__main__", __name__, *commands])
    before = contents(source)
    whole, total = {}, {}
    for form in ("jax", "mlx"):
        done = context.Process(target=convert, args=(str(source), str(tmp_path / form), form))
        done.start()
        done.join()
        whole[form] = contents(tmp_path / form)
        total[form] = sum(path.stat().st_size for path in (tmp_path / form).iterdir())
        shutil.rmtree(tmp_path / form)
    rng, interrupted = random.Random(0), 0
    for kill in range(KILLS):
        form, dst = ("jax", "mlx")[kill % 2], tmp_path / "dst"
        enough = 1.1 * rng.random() * total[form]  # a few come too late
        process = context.Process(target=convert, args=(str(source), str(dst), form))
        process.start()
        while process.is_alive() and not dst.exists() and written(tmp_path) < enough:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert contents(source) == before
        left = {path.name for path in tmp_path.iterdir()}
        interrupted += "dst" not in left
        if "dst" in left:
            assert contents(dst) == whole[form]
        assert all(name == "dst" or name.startswith(".dst.partial-") for name in left)
        for name in left:
            shutil.rmtree(tmp_path / name)
    assert KILLS // 2 <= interrupted < KILLS
