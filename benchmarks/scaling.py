"""The tables of docs/scaling.md: memory and time of an update, foretold, and checked.

    python benchmarks/scaling.py             # the tables, as they stand in the document
    python benchmarks/scaling.py --write     # put them there
    python benchmarks/scaling.py --measure   # bytes on this CPU, kept for the last table

Bytes are by the formulas of `bridge train --dry-run`, time by operations (operations.py) and a
share of the device's rate that is assumed.
"""

import argparse
import json
import os
import re
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerator_speed import REST
from operations import Work, update
from record import RESULTS, record
from training_engines import Rows
from training_setup import ROOT, Place

from bridge.config import LoraConfig, ModelConfig, lora_names, parse_config
from bridge.model import trainable_names
from bridge.training.memory import Load, Peak, peak

DOCUMENT = ROOT / "docs" / "scaling.md"
GB = 1e9
RANK = 16
SHARE = 0.4  # of the GEMM rate, assumed
ROOM = 0.92  # of a device's memory: the rest is the framework's own
WORK = Work(1, 8, 512, 1024)  # of the tables
# bytes, and dense bfloat16 operations a second, as their makers state them
DEVICES = {"24 GB": (24e9, 165e12), "80 GB": (80e9, 989e12), "141 GB": (141e9, 989e12)}
SIZES = {  # D, F, layers, heads, key heads, vocabulary
    "1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "70B": ("llama", 8192, 28672, 80, 64, 8, 128256),
    "small": ("llama", 576, 1536, 8, 9, 3, 49152),  # what is measured on a CPU
}
MEASURED = Rows(8, 512, 128)
KINDS = ("all tensors", "the blocks alone", f"blocks and LoRA of rank {RANK}")


@dataclass(frozen=True)
class Training:
    """A host with blocks, and what is trained of it."""

    config: ModelConfig
    trained: frozenset[str]


def raw_config(size: str) -> dict[str, Any]:
    """A `config.json` of the host with blocks: 8 heads of 64, of the small one 2 of 48."""
    family, D, F, layers, heads, keys, vocabulary = SIZES[size]
    blocks = (2, 48) if size == "small" else (8, 64)
    bridge = {"spec_version": "1.0", "kind": "attention", "norm_eps": 1e-6}
    bridge |= {"num_heads": blocks[0], "head_dim": blocks[1], "layers": list(range(layers))}
    host = {"model_type": family, "hidden_size": D, "intermediate_size": F}
    host |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    host |= {"num_key_value_heads": keys, "vocab_size": vocabulary, "bridge": bridge}
    return {**REST, **host}


def training(size: str, kind: str) -> Training:
    """One of the cases of the tables."""
    config = parse_config(raw_config(size))
    blocks = trainable_names(config, "bridge")
    if kind == KINDS[0]:
        return Training(config, frozenset(trainable_names(config, "all")))
    if kind == KINDS[1]:
        return Training(config, frozenset(blocks))
    config = replace(config, lora=LoraConfig(RANK, 2.0 * RANK))
    return Training(config, frozenset([*blocks, *lora_names(config)]))


def bytes_of(case: Training, work: Work, dtype: str, again: bool = False) -> Peak:
    """What a micro-batch needs, by the formulas of `bridge train --dry-run`; nothing is decoded.
    `again`: activations are computed again in the backward pass (clause 7.11)."""
    alone = work.cells - work.groups * work.prompt
    load = Load(work.cells, alone, work.targets, checkpoint_activations=again)
    return peak(case.config, dtype, case.trained, load)


def longest(case: Training, bytes_: float, again: bool) -> int:
    """Tokens of a response, at most, with which a group of the tables fits; 0: none does."""
    low, high = 0, case.config.max_position_embeddings - WORK.prompt
    while low < high:
        middle = (low + high + 1) // 2
        work = replace(WORK, response=middle)
        fits = bytes_of(case, work, "bfloat16", again).total <= bytes_
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def memory_table() -> list[str]:
    """Bytes by host and by what is trained."""
    lines = ["| host | trained | weights | optimizer | update | all | activations again |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for size in ("1.5B", "7B", "70B"):
        for kind in KINDS:
            case = training(size, kind)
            found, least = (bytes_of(case, WORK, "bfloat16", again) for again in (False, True))
            of = found.kept
            parts = (of["weights"], of["masters"] + of["moments"], sum(found.update.values()))
            cells = [f"{part / GB:.1f}" for part in (*parts, found.total, least.total)]
            lines += [f"| {size} | {kind} | {' | '.join(cells)} |"]
    return lines


def fit_table() -> list[str]:
    """The longest responses by device, activations kept and computed again."""
    lines = [f"| host | trained | {' | '.join(DEVICES)} |", "|---|---|---|---|---|"]
    for size in ("1.5B", "7B", "70B"):
        for kind in KINDS:
            case = training(size, kind)
            cells = []
            for bytes_, _ in DEVICES.values():
                tokens = [longest(case, ROOM * bytes_, again) for again in (False, True)]
                shown = [f"{n // 100 * 100:,}" if n >= 100 else "" for n in tokens]
                cells += [f"{shown[0] or 'no'}, {shown[1]}" if shown[1] else "no"]
            lines += [f"| {size} | {kind} | {' | '.join(cells)} |"]
    return lines


def time_table() -> list[str]:
    """Seconds of an update by device, where it fits."""
    lines = [f"| host | trained | operations, 10^12 | {' | '.join(DEVICES)} |"]
    lines += ["|---|---|---|---|---|---|"]
    for size in ("1.5B", "7B"):
        for kind in KINDS:
            case = training(size, kind)
            done = update(case.config, case.trained, WORK)
            cells = []
            for bytes_, rate in DEVICES.values():
                need = [bytes_of(case, WORK, "bfloat16", a).total for a in (False, True)]
                again = need[0] > ROOM * bytes_
                fits = need[again] <= ROOM * bytes_
                spent = (done + again * forward(case)) / (SHARE * rate)
                cells += [f"{spent:.1f}{' again' if again else ''}" if fits else "no"]
            lines += [f"| {size} | {kind} | {done / 1e12:.0f} | {' | '.join(cells)} |"]
    return lines


def forward(case: Training) -> float:
    """Operations of the layers' forward pass, which is what is computed again."""
    head = WORK.targets * case.config.vocab_size * case.config.hidden_size
    return update(case.config, (), WORK) / 2 - 2.0 * head


def checked_table() -> list[str]:
    """Foretold and measured: the update's bytes, by the results that are kept."""
    lines = ["| trained | activations | foretold, MB | measured, MB | ratio |"]
    lines += ["|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("scaling-*.json")):
        for found in json.loads(path.read_text(encoding="utf-8"))["updates"]:
            case = training("small", found["trained"])
            work = Work(1, *found["rows"][:3])
            told = sum(bytes_of(case, work, "float32", found["again"]).update.values())
            how = "again" if found["again"] else "kept"
            lines += [
                f"| {found['trained']} | {how} | {told / 1e6:.0f} | {found['bytes'] / 1e6:.0f} "
                f"| {told / found['bytes']:.2f} |"
            ]
    return lines


TABLES = {"memory": memory_table, "fit": fit_table, "time": time_table, "checked": checked_table}


def with_tables(text: str) -> str:
    """The document with its tables as they are now: each between two comments that name it."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end of {name} -->"
        found = "\n\n".join([begin, "\n".join(table()), end])
        text = re.sub(f"{begin}.*?{end}", lambda _, found=found: found, text, flags=re.DOTALL)
    return text


def measure(out: Path) -> None:
    """An update's bytes beyond weights and optimizer, of the small host on the CPU."""
    from bridge_cli.machine import processor

    updates: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = argparse.Namespace(backend="torch", threads=os.cpu_count(), checkpoint=None)
        place = Place(Path(scratch), options)
        for kind, trainable in zip(KINDS, ("all", "bridge", "bridge"), strict=True):
            for again in (False, True):
                said: dict[str, Any] = {"config": raw_config("small"), "trainable": trainable}
                if kind == KINDS[2]:
                    said["lora"] = [RANK, 2.0 * RANK]
                with closing(place.bridge(ROOT, **said, again=again, gives_back=True)) as engine:
                    engine.update(Rows(8, 16, 8))
                    found = engine.update(MEASURED, peak=True)["peak"]
                updates += [{"trained": kind, "again": again, "rows": MEASURED, "bytes": found}]
                print(f"{kind}, again {again}: {found / 1e6:.0f} MB", flush=True)
    machine = {"device": processor(), "cores": os.cpu_count()}
    record({"machine": machine, "host": SIZES["small"], "updates": updates}, "scaling", out)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    parser.add_argument("--measure", action="store_true", help="bytes on this CPU, and keep them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.measure:
        measure(options.out)
    elif options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_tables(text), encoding="utf-8")
    else:
        print("\n\n".join("\n".join(table()) for table in TABLES.values()))


if __name__ == "__main__":
    main()
