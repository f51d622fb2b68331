"""An update's time and memory: Bridge now, Bridge of an older revision, and TRL, in one run.

    python benchmarks/training.py [--before REV] [--layers 6] [--parts grpo,memory] [--rounds 3]

Every engine is a process of its own with the same checkpoint (SmolLM2-135M with blocks of 2 x 48,
4.9 % new parameters; `--layers` cuts it), and they are asked in turn, the order reversed each
round. All train every tensor, in float32, on the same group: a prompt of 512 tokens and eight rows
of 128 tokens, or of ever fewer. TRL (`pip install trl`) trains the host alone, as does Bridge
without blocks, and their losses, entropies and gradients must agree, or the run ends. The engines
of the whole host do not fit into 24 GB together; those of its first ten layers do. Parts:

    grpo      a GRPO update, rows equally long
    tailed    the same, each row 0.7 times as long as the one before
    sft       an SFT update, of Bridge alone
    memory    bytes that an update takes beyond what is there before it, at vocabulary 151,936
    blocks    a GRPO update with blocks against without, by backend, short rows, nine rounds

Results are `training-DEVICE.json` and `.txt`; parts that are not asked for stay as they were.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerator_speed import REST
from record import RESULTS, place_of, record
from training_engines import Rows
from training_setup import BEFORE, NOW, ROOT, Place

PARTS = ("grpo", "tailed", "sft", "memory", "blocks")
HOST, TRL, COMPACT = "bridge, host alone", "TRL", "TRL, head as on GPUs"
PEERS = ("torch", "jax", "mlx", "transformers", "trl")
TITLES = {
    "grpo": "a GRPO update",
    "tailed": "a GRPO update, rows ever shorter",
    "sft": "an SFT update",
    "memory": "bytes beyond what was there before, at vocabulary 151,936, by what is trained",
    "blocks": "an update with blocks against without",
}
SHORT = Rows(8, 64, 32)  # of the part `blocks`
BLOCKS_ROUNDS = 9
SAME = 1e-3  # that losses, entropies and gradients may differ by, of their size
WIDE = {  # SmolLM2's widths, a quarter of its layers, and Qwen's vocabulary
    **REST,
    "model_type": "llama",
    "tie_word_embeddings": True,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 151936,
    "bridge": {
        "spec_version": "1.0",
        "kind": "attention",
        "num_heads": 2,
        "head_dim": 48,
        "layers": list(range(8)),
        "norm_eps": 1e-6,
    },
}
Asks = Callable[[], dict[str, Any]]


def main() -> None:
    """Measure, print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="7a36a91", metavar="REV", help="another git revision")
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas")
    parser.add_argument("--rounds", type=int, default=3, help="of the updates")
    parser.add_argument("--layers", type=int, help="of the host, the first; else all")
    parser.add_argument("--backend", default="torch", help="of all parts but `blocks`")
    parser.add_argument("--backends", default="torch,jax,mlx", help="of `blocks`, by commas")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--checkpoint", type=Path, help="one with blocks; else SmolLM2-135M")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"part {unknown[0]!r} is not known; use {', '.join(PARTS)}")
    results = earlier(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch), options)
        for part in parts:
            start, load = time.time(), os.getloadavg()[0]
            found = MEASURES[part](place, part)
            took = {"seconds": round(time.time() - start), "load_before": load}
            results["parts"][part] = found | took | place.asked()
            results["parts"] = {name: results["parts"].get(name) for name in PARTS}
            results["parts"] = {name: found for name, found in results["parts"].items() if found}
            record(results, "training", options.out)
            target = f"training-{place_of(results['machine']['device'])}.txt"
            (options.out / target).write_text(table(results), encoding="utf-8")
    print(table(results), end="")


def earlier(out: Path) -> dict[str, Any]:
    """The machine, and the parts that an earlier run left of it."""
    from bridge_cli.machine import processor

    versions = {}
    for package in PEERS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    machine = {"device": processor(), "cores": os.cpu_count(), **versions}
    kept = out / f"training-{place_of(machine['device'])}.json"
    parts = json.loads(kept.read_text(encoding="utf-8"))["parts"] if kept.exists() else {}
    return {"machine": machine, "parts": parts}


def updates(place: Place, part: str) -> dict[str, Any]:
    """Seconds of an update by engine, and what the first said of itself."""
    objective = "sft" if part == "sft" else "grpo"
    rows = place.rows(tailed=part == "tailed")
    with ExitStack() as stack:
        engines = {
            NOW: place.bridge(),
            HOST: place.bridge(blocks=False),
            BEFORE: place.bridge(place.before()),
        }
        if objective == "grpo" and find_spec("trl"):
            engines[TRL] = engines[COMPACT] = place.trl()
        elif objective == "grpo":
            tell(f"{part}: TRL is not installed: pip install trl")
        for engine in engines.values():
            stack.enter_context(closing(engine))
        warm = Rows(rows.width, 16, 8, True)
        firsts = {
            name: engines[name].update(warm, objective) for name in engines if name != COMPACT
        }
        agree(firsts)
        asks = {
            name: partial(engine.update, rows, objective, head_at_targets=name == COMPACT)
            for name, engine in engines.items()
        }
        seconds = in_turn(part, asks, place.options.rounds)
    return {"first": firsts, **summary(seconds, NOW)}


def agree(first: dict[str, dict[str, Any]]) -> None:
    """End where engines that hold the same weights did not do the same to the same rows."""
    for one, other in ((HOST, TRL), (NOW, BEFORE)):
        for name in ("loss", "entropy", "grad_norm"):
            a, b = (first.get(engine, {}).get(name) for engine in (one, other))
            if a is not None and b is not None and abs(a - b) > SAME * max(abs(a), abs(b), 1e-3):
                raise SystemExit(f"{one} and {other} differ in {name}: {a} and {b}")


def in_turn(part: str, asks: dict[str, Asks], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for turn in range(rounds):
        order = list(asks) if turn % 2 == 0 else list(reversed(asks))
        for name in order:
            seconds[name].append(asks[name]()["seconds"])
        said = ", ".join(f"{name} {found[-1]:.2f} s" for name, found in seconds.items())
        tell(f"{part}, round {turn + 1} of {rounds}: {said}")
    return seconds


def summary(seconds: dict[str, list[float]], against: str) -> dict[str, Any]:
    """Medians over rounds: of seconds, and of how many times those of `against` they are."""
    return {
        "seconds": seconds,
        "median": {name: statistics.median(found) for name, found in seconds.items()},
        "times": {
            name: statistics.median(a / b for a, b in zip(found, seconds[against], strict=True))
            for name, found in seconds.items()
        },
    }


def memory(place: Place, part: str) -> dict[str, Any]:
    """Bytes beyond what was there, after an update of few cells made the optimizer's state."""
    peaks: dict[str, dict[str, int]] = {}
    for trainable in ("all", "bridge"):
        peaks[trainable] = {}
        for name, tree in ((NOW, ROOT), (BEFORE, place.before())):
            with closing(
                place.bridge(tree, config=WIDE, trainable=trainable, gives_back=True)
            ) as engine:
                engine.update(Rows(place.options.width, 16, 8))
                peaks[trainable][name] = engine.update(place.rows(), peak=True)["peak"]
            tell(f"{part}, {trainable}: {name} {peaks[trainable][name] / 2**20:.0f} MiB")
    share = {trained: found[NOW] / found[BEFORE] for trained, found in peaks.items()}
    return {"bytes": peaks, "share": share}


def blocks(place: Place, part: str) -> dict[str, Any]:
    """With against without, by backend."""
    found: dict[str, Any] = {}
    rows = SHORT._replace(width=place.options.width)
    for backend in place.options.backends.split(","):
        if find_spec(backend) is None:
            tell(f"{part}: {backend} is not installed")
            continue
        with ExitStack() as stack:
            asks: dict[str, Asks] = {}
            for name, has in (("with", True), ("without", False)):
                engine = stack.enter_context(closing(place.bridge(backend=backend, blocks=has)))
                asks[name] = partial(engine.update, rows)
                asks[name]()  # which compiles
            seconds = in_turn(f"{part}, {backend}", asks, BLOCKS_ROUNDS)
        found[backend] = summary(seconds, "without")
    return {"backends": found, "rows": rows._asdict()}


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    """What a person reads first."""
    machine = results["machine"]
    names = ", ".join(f"{name} {machine[name]}" for name in PEERS if machine[name])
    lines = [f"{machine['device']}, {machine['cores']} cores, {names}"]
    for part, found in results["parts"].items():
        asked, before = found["asked"], found["revisions"][BEFORE]
        sizes = f"prompt {asked['prompt']}, {asked['width']} rows of {asked['response']}"
        titles = [TITLES[part], *([sizes] if part != "blocks" else [])]
        if asked["layers"] and part != "memory":
            titles.append(f"the host's first {asked['layers']} layers")
        lines += ["", ", ".join(titles)]
        if part == "memory":
            for trained, peaks in found["bytes"].items():
                now, then = (peaks[name] / 2**20 for name in (NOW, BEFORE))
                said = f"{now:7.0f} MiB, of {before} {then:7.0f} MiB"
                lines += [f"    {trained:20} {said}, share {found['share'][trained]:.2f}"]
        elif part == "blocks":
            for backend, spent in found["backends"].items():
                ratio, off = spent["times"]["with"], spent["median"]["without"]
                lines += [f"    {backend:20} {ratio:5.3f} times {off:.2f} s"]
        else:
            for name, median in found["median"].items():
                named = f"bridge of {before}" if name == BEFORE else name
                lines += [f"    {named:20} {median:7.2f} s  {found['times'][name]:5.2f} times"]
    return "\n".join(lines) + "\n"


MEASURES = {part: updates for part in PARTS} | {"memory": memory, "blocks": blocks}


if __name__ == "__main__":
    main()
