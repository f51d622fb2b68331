"""What all benchmarks share: the name of the processor, and where figures are kept."""

import json
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as its maker gives it where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def record(results: dict[str, Any], what: str, out: Path) -> None:
    """Keep results as `WHAT-DEVICE.json`, the device being that of their `machine`."""
    out.mkdir(parents=True, exist_ok=True)
    place = "-".join(results["machine"]["device"].lower().split())
    text = json.dumps(results, indent=2) + "\n"
    (out / f"{what}-{place}.json").write_text(text, encoding="utf-8")
