"""What all benchmarks share: where figures are kept."""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(results: dict[str, Any], what: str, out: Path) -> None:
    """Keep results as `WHAT-DEVICE.json`, the device being that of their `machine`."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (out / f"{what}-{place_of(results['machine']['device'])}.json").write_text(
        text, encoding="utf-8"
    )


def place_of(device: str) -> str:
    """A device's name as part of a file's: Intel(R) Xeon(R) @ 2.5GHz is intel-xeon-2-5ghz."""
    plain = re.sub(r"\((?:r|tm)\)|\bprocessor\b|\bcpu\b", " ", device.lower())
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")
