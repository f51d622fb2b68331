"""What all benchmarks share: where figures are kept."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(results: dict[str, Any], what: str, out: Path) -> None:
    """Keep results as `WHAT-DEVICE.json`, the device being that of their `machine`."""
    out.mkdir(parents=True, exist_ok=True)
    place = "-".join(results["machine"]["device"].lower().split())
    text = json.dumps(results, indent=2) + "\n"
    (out / f"{what}-{place}.json").write_text(text, encoding="utf-8")
