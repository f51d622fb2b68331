"""Everything to be known of Bridge on an accelerator, by one command from a plain checkout.

    python benchmarks/accelerator.py --budget 540 --out FOLDER   # on the machine that has one
    python benchmarks/accelerator.py --size tiny                 # on a CPU: a rehearsal

Nothing is installed or downloaded: what the stages need is looked for first, and a stage that lacks
something says so and is left out. Each stage is a process of its own with a time of its own; it is
stopped at the end of that, and what it had measured by then is kept. After every stage the results
are written to `--out`, as JSON, as a table, and what the stages printed: figures of a machine that
is lent for minutes must outlive whatever goes wrong in it. Stages come in the order that they are
worth their time; another run, with `--stages` of what is left, adds to the same files.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import place_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (".", "backends", "conformance", "cli", "spec", "benchmarks")
OURS = ("numpy", "ml_dtypes", "jaxtyping", "jinja2", "tokenizers")  # what `import bridge` needs
GRACE = 20.0  # seconds to write down what was measured, once time is up
# Every number as the dtype has it: TF32 would make float32 another one. Memory as it is needed, so
# that two frameworks get on with each other on one device.
ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Stage:
    """What one process measures, for how long at most, and what it cannot do without."""

    name: str
    what: str
    seconds: float
    needs: tuple[str, ...]


def stages(backends: tuple[str, ...]) -> list[Stage]:
    """All stages in the order that they are worth their time."""
    found = [Stage("machine", "devices, versions, bandwidth, GEMM rate", 90, ("numpy",))]
    kinds = {
        "quick": ("conformance quick in float32, bfloat16, float16", 150, ("hypothesis",)),
        "kernels": ("attention over a shared prefix, kernels against products", 60, ()),
        "ahead": ("8 tokens ahead, in turns and by graphs, against one", 90, ()),
        "padding": ("attention over rows padded on the right, with a mask and without", 30, ()),
        "decode": ("decoding at 1, 8 and 64 rows, blocks on and off", 120, ()),
        "update": ("updates of groups: all parameters, the blocks alone, LoRA", 90, ()),
        "train": ("training steps, blocks on and off", 90, ()),
        "peers": ("decoding beside transformers and vLLM", 240, ("transformers",)),
        "ci": ("conformance ci in the same dtypes", 300, ("hypothesis",)),
    }
    own = {"torch": ("kernels", "ahead", "padding")}  # what one backend alone has
    order = [
        (kind, backend)
        for backend in backends
        for kind in ("quick", *own.get(backend, ()), "decode", "update", "train")
    ]
    order += [("peers", backend) for backend in backends if backend == "torch"]
    for kind, backend in [*order, *(("ci", backend) for backend in backends)]:
        what, seconds, needs = kinds[kind]
        needs = (*OURS, backend, *needs, *(("optax",) if backend == "jax" else ()))
        found.append(Stage(f"{backend}-{kind}", f"{backend}: {what}", seconds, needs))
    return found


def main() -> int:
    """See the module. 0 where no stage that could run failed or died."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is ended with us
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--stages", help="names by commas, in this order; else all")
    parser.add_argument("--list", action="store_true", help="name the stages and stop")
    parser.add_argument("--backends", default="torch,jax,mlx", help="whose stages, by commas")
    parser.add_argument("--device", help="such as cuda:1; else each backend's best")
    parser.add_argument("--size", choices=("1.5b", "tiny"), default="1.5b", help="of the host")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    known = stages(tuple(name for name in options.backends.split(",") if name))
    if options.list:
        print("\n".join(f"{s.name:14} {s.seconds:4.0f} s  {s.what}" for s in known))
        return 0
    chosen = choose(known, options.stages)
    if isinstance(chosen, str):
        print(f"accelerator: {chosen}", file=sys.stderr)
        return 2
    with plain_checkout() as environment:
        results = run(chosen, options, environment)
    ran = [results["stages"][stage.name] for stage in chosen]
    return int(any(stage["status"] == "died" or failed(stage) for stage in ran))


def failed(stage: dict[str, Any]) -> bool:
    """Whether anything that a stage measured is a failure, its end aside."""
    figures = stage.get("figures", {}).values()
    return any(isinstance(figure, dict) and figure.get("failed") for figure in figures)


def choose(known: list[Stage], asked: str | None) -> list[Stage] | str:
    """The stages asked for, `machine` always first: results are filed under what it finds. A line
    of text where one is not known."""
    by_name = {stage.name: stage for stage in known}
    names = [n.strip() for n in asked.split(",") if n.strip()] if asked else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        return f"stage {unknown[0]!r} is not known; use {', '.join(by_name)}"
    return [by_name[name] for name in dict.fromkeys(["machine", *names])]


@contextmanager
def plain_checkout() -> Iterator[dict[str, str]]:
    """The environment in which the checkout's packages are found, and its backends registered as
    an installation would register them."""
    path = [str(ROOT / package) for package in PACKAGES]
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    with tempfile.TemporaryDirectory(prefix="bridge-registered-") as directory:
        if not entry_points(group="bridge.backends"):
            register(Path(directory))
            path.append(directory)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path + before)}
        yield environment


def register(directory: Path) -> None:
    """What an installer writes of pyproject.toml, and importlib.metadata reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = directory / f"bridge_llm-{project['version']}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    for extra, requirements in project["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}"]
        for requirement in requirements:
            what, _, marker = requirement.partition(";")
            marker = f"({marker.strip()}) and " if marker else ""
            lines += [f"Requires-Dist: {what.strip()}; {marker}extra == '{extra}'"]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    points = project["entry-points"]["bridge.backends"]
    text = "\n".join(["[bridge.backends]", *(f"{n} = {place}" for n, place in points.items())])
    (info / "entry_points.txt").write_text(text + "\n", encoding="utf-8")


def run(
    chosen: list[Stage], options: argparse.Namespace, environment: dict[str, str]
) -> dict[str, Any]:
    """Carry out the stages, each with what is left of the budget, and write after each."""
    end = time.monotonic() + options.budget
    results: dict[str, Any] = {
        "machine": {"device": "unknown"},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "budget": options.budget,
        "size": options.size,
        "packages": packages(chosen),
        "stages": {},
    }
    absent = [name for name, installed in results["packages"].items() if installed is None]
    print(f"missing here: {', '.join(absent) or 'nothing'}", flush=True)
    log = ""
    for stage in chosen:
        missing = [need for need in stage.needs if find_spec(need) is None]
        seconds = min(stage.seconds, end - time.monotonic() - GRACE)
        if missing:
            found: dict[str, Any] = {"status": "skipped", "why": f"{', '.join(missing)} missing"}
        elif seconds < min(10.0, stage.seconds):
            found = {"status": "skipped", "why": "no time left"}
        else:
            print(f"{stage.name}: {stage.what}, {seconds:.0f} s at most", flush=True)
            found, said = carry_out(stage, seconds, options, results["machine"], environment)
            log += f"==== {stage.name}\n{said}\n"
        results["stages"][stage.name] = found
        if stage.name == "machine" and found.get("figures"):
            results["machine"] |= found["figures"]
            results["stages"] = earlier(results, options.out) | results["stages"]
        print(f"{stage.name}: {found['status']} {found.get('why', '')}".rstrip(), flush=True)
        write(results, log, options.out)
    print(f"written to {options.out}")
    return results


def earlier(results: dict[str, Any], out: Path) -> dict[str, Any]:
    """The stages that an earlier run on this device left in the same files."""
    try:
        before = json.loads(place(results, out).with_suffix(".json").read_text(encoding="utf-8"))
        return before["stages"] if before["size"] == results["size"] else {}
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return {}


def packages(chosen: list[Stage]) -> dict[str, str | None]:
    """The version of everything that a stage needs or could use; None for what is not there."""
    needs = dict.fromkeys(need for stage in chosen for need in stage.needs)
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in (*needs, "transformers", "triton", "jaxlib"):
        try:
            found[name] = version(name) if find_spec(name) else None
        except PackageNotFoundError:
            found[name] = "?"
    return found


def carry_out(
    stage: Stage,
    seconds: float,
    options: argparse.Namespace,
    machine: dict[str, Any],
    environment: dict[str, str],
) -> tuple[dict[str, Any], str]:
    """One stage in a process group of its own: its results so far, and what it printed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bridge-stage-") as directory:
        figures, said = Path(directory) / "figures.json", Path(directory) / "said"
        asked = {"stage": stage.name, "out": str(figures), "size": options.size}
        asked |= {"device": options.device, "machine": machine}
        command = [sys.executable, "-m", "accelerator_stages", json.dumps(asked)]
        with said.open("wb") as output:
            child = subprocess.Popen(
                command,
                env=environment,
                cwd=directory,  # `python -m` would find in the checkout what is found by path
                stdin=subprocess.PIPE,  # which ends with us, and the stage with it
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = wait(child, seconds)
        found = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
        text = said.read_text(encoding="utf-8", errors="replace")[-20_000:]
    found["status"] = status
    if failed(found):
        found |= {"status": "failed"} | ({"why": status} if status != "done" else {})
    if status == "died":
        found["why"] = (text.strip().splitlines() or [f"exit code {child.returncode}"])[-1][:300]
    found |= {"seconds": round(time.monotonic() - start, 1)}
    found |= {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return found, text


def wait(child: subprocess.Popen, seconds: float) -> str:
    """`done`, `died`, or `out of time`: told to end by Ctrl-C, and made to a little later."""
    try:
        return "done" if child.wait(seconds) == 0 else "died"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "out of time"


def write(results: dict[str, Any], log: str, out: Path) -> None:
    """The results as `accelerator-DEVICE.json`, `.txt` and `.log`."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(results, indent=2) + "\n", "txt": table(results), "log": log}
    for kind, text in texts.items():
        target = place(results, out).with_suffix(f".{kind}")
        partial = target.with_suffix(f".{kind}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)


def place(results: dict[str, Any], out: Path) -> Path:
    """Where the results of this device are, without a suffix."""
    return out / f"accelerator-{place_of(results['machine']['device'])}"


def table(results: dict[str, Any]) -> str:
    """What a person reads first."""
    machine = results["machine"]
    lines = [f"{machine['device']}, host of size {results['size']}, {results['started']}"]
    if "bandwidth" in machine:
        lines += [
            f"copies {machine['bandwidth'] / 1e9:.0f} GB/s, bf16 GEMM "
            f"{machine['gemm'] / 1e12:.2f} TFLOP/s"
        ]
    for name, stage in results["stages"].items():
        why = f" ({stage['why']})" if stage.get("why") else ""
        lines += ["", f"{name}: {stage['status']}{why}, {stage.get('seconds', 0)} s"]
        lines += [f"    {line}" for line in stage.get("lines", ())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
