"""`bridge bench --peers` of SmolLM2-135M with blocks, its table, figures and plot kept.

    python benchmarks/peers.py [--widths 1,8,16,32] [--new 48] [...]   # options as the command's

The blocks are 2 heads of 48 on every layer, 4.9 % of new parameters: the paper's share. Results are
`peers-DEVICE.json`, `.png` and `.txt` under `benchmarks/results/`.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from beside import make
from record import RESULTS, place_of

from bridge_cli.machine import processor
from bridge_cli.main import app


def main() -> None:
    """Measure, print and keep."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        kept = {kind: out / f"peers.{kind}" for kind in ("json", "png", "txt")}
        files = ["--save", str(kept["json"]), "--plot", str(kept["png"])]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            app(["bench", str(make(out)), "--peers", *files, *sys.argv[1:]], standalone_mode=False)
        print(said.getvalue(), end="")
        kept["txt"].write_text(said.getvalue(), encoding="utf-8")
        RESULTS.mkdir(exist_ok=True)
        for kind, path in kept.items():
            (RESULTS / f"peers-{place_of(processor())}.{kind}").write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
