"""Make the golden vectors of the spec (clause 10.4), or check that they are what would be made.

    python spec/make_golden.py            write spec/golden/*.safetensors
    python spec/make_golden.py --check    compare byte for byte; exit 1 and name what differs

The same bytes come out on every machine: inputs are made by Philox and exact in float64, outputs
are rounded to a grid, and inputs for which an output lies too near to where that rounding flips are
passed over for the next ones.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.safetensors_io import specs_of, write_safetensors
from bridge_conformance.golden import compute
from golden_cases import CASES

DIRECTORY = Path(__file__).parent / "golden"
GRID, MARGIN = 28, 42  # bits below the largest magnitude: of the grid, and of what it must survive


class TooNear(Exception):
    """An output lies where another order of summation could round it otherwise."""


def on_grid(x: np.ndarray) -> np.ndarray:
    """Round a float64 tensor to multiples of `2^(e - GRID)`; other dtypes are exact as they are."""
    if x.dtype != np.float64 or not x.any():
        return x
    exponent = int(np.frexp(np.abs(x).max())[1])
    steps = np.ldexp(x, GRID - exponent)
    if (np.abs(steps - np.floor(steps) - 0.5) < 2.0 ** (GRID - MARGIN)).any():
        raise TooNear
    return np.ldexp(np.round(steps), exponent - GRID)


def make(name: str, path: Path) -> None:
    """Write one vector, from the first inputs that keep away from rounding boundaries."""
    for attempt in range(1000):
        settings, inputs = CASES[name](attempt)
        try:
            outputs = {n: on_grid(a) for n, a in compute(name, settings, inputs).items()}
        except TooNear:
            continue
        return write(path, settings, inputs, outputs)
    raise SystemExit(f"{name}: no inputs keep away from rounding boundaries; make it smaller")


def write(
    path: Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
) -> None:
    """One safetensors file: `in.*`, `out.*`, and the settings as JSON."""
    both = {"in": inputs, "out": outputs}
    tensors = {
        f"{side}.{name}": np.array(array, order="C")
        for side, arrays in both.items()
        for name, array in arrays.items()
    }
    metadata = {"settings": json.dumps(settings, sort_keys=True)}
    write_safetensors(path, specs_of(tensors), tensors.items(), metadata)


def differences(made: Path, kept: Path) -> list[str]:
    """Names of vectors that are missing, left over, or have other bytes."""
    names = sorted({p.name for p in (*made.iterdir(), *kept.glob("*.safetensors"))})

    def same(name: str) -> bool:
        both = (made / name, kept / name)
        return all(p.exists() for p in both) and both[0].read_bytes() == both[1].read_bytes()

    return [name for name in names if not same(name)]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Make or check the golden vectors.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made) if check else DIRECTORY
        for name in CASES:
            make(name, directory / f"{name}.safetensors")
        if not check:
            total = sum(p.stat().st_size for p in DIRECTORY.glob("*.safetensors"))
            print(f"{len(CASES)} vectors in {DIRECTORY}, {total / 1000:.0f} kB")
            return 0
        differing = differences(directory, DIRECTORY)
    for name in differing:
        print(f"{DIRECTORY / name}: is not what spec/make_golden.py makes", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
