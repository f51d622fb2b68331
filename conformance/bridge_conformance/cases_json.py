"""Cases as compact text, from which exactly the same case is built again.

`--case` of the command line takes what `to_text` gives: JSON, or where that is long the same
compressed, which begins with `z:`. Nothing in it can run code.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bridge.config import LoraConfig, bridge_shapes, tensor_shapes
from bridge.contract import GRPO, SFT
from bridge.errors import BridgeError
from bridge_conformance.cases import BlockCase, DecodeCase, ModelCase, RowsCase, TrainCase
from bridge_conformance.cases_coming import ComingCase, Wave
from bridge_conformance.cases_ends import EndsCase
from bridge_conformance.cases_given import check_case
from bridge_conformance.cases_life import Do, LifeCase
from bridge_conformance.checks_golden import GoldenCase

LONG = 1500  # characters of JSON from which on it is compressed
WRONG = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
LARGEST = 1_000_000  # bytes that a compressed case may come to


def to_json(case: Any) -> dict[str, Any]:
    """A case as plain values; the key `is` says of what kind."""
    match case:
        case ModelCase():
            lora = {} if case.lora is None else {"lora": asdict(case.lora)}
            return {"raw": case.raw, "seed": case.seed, "magnitudes": case.magnitudes} | lora
        case RowsCase():
            return {
                "is": "rows",
                "model": to_json(case.model),
                "tokens": case.tokens.tolist(),
                "groups": case.groups.tolist(),
                "active": ["".join("01"[int(a)] for a in row) for row in case.active],
                "positions": case.positions.tolist(),
            }
        case BlockCase():
            return {
                "is": "block",
                "rows": to_json(case.rows),
                "layer": case.layer,
                "seed": case.seed,
            }
        case DecodeCase():
            return {
                "is": "decode",
                "model": to_json(case.model),
                "widths": list(case.widths),
                "lengths": list(case.lengths),
                "steps": case.steps,
                "seed": case.seed,
                "ragged": case.ragged,
            }
        case TrainCase():
            objective = case.objective
            return {
                "is": "train",
                "rows": to_json(case.rows),
                "objective": asdict(objective) if isinstance(objective, GRPO) else "sft",
                "trainable": _short(case),
                "seed": case.seed,
            }
        case ComingCase():
            waves = [list(wave) for wave in case.waves]
            return {"is": "coming", "text": to_json(case.text), "waves": waves}
        case EndsCase():
            return {"is": "ends", "vocab_size": case.vocab_size, "seed": case.seed}
        case LifeCase():
            return {
                "is": "life",
                "rows": to_json(case.rows),
                "trainable": _short(case),
                "program": [[do.what, do.number, list(do.detail)] for do in case.program],
                "seed": case.seed,
            }
        case GoldenCase():
            return {"is": "golden", "name": case.name}
    raise TypeError(f"no such case: {case!r}")


def from_json(value: Any) -> Any:
    """The case that `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
    kind = value["is"]
    if kind == "rows":
        active = np.array([["01".index(c) for c in row] for row in value["active"]], dtype=bool)
        tokens, positions = (
            _whole_numbers(value[name], active.shape, name) for name in ("tokens", "positions")
        )
        groups = _whole_numbers(value["groups"], active.shape[:1], "groups")
        return RowsCase(_model(value["model"]), tokens, groups, active, positions)
    if kind == "block":
        return BlockCase(from_json(value["rows"]), value["layer"], value["seed"])
    if kind == "decode":
        return DecodeCase(
            _model(value["model"]),
            tuple(value["widths"]),
            tuple(value["lengths"]),
            value["steps"],
            value["seed"],
            value["ragged"],
        )
    if kind == "train":
        rows, objective = from_json(value["rows"]), value["objective"]
        given = SFT() if objective == "sft" else GRPO(**objective)
        return TrainCase(rows, given, _names(rows, value["trainable"]), value["seed"])
    if kind == "coming":
        waves = tuple(Wave(after, prompts) for after, prompts in value["waves"])
        return ComingCase(from_json(value["text"]), waves)
    if kind == "ends":
        return EndsCase(value["vocab_size"], value["seed"])
    if kind == "life":
        rows = from_json(value["rows"])
        program = tuple(
            Do(what, number, tuple(detail)) for what, number, detail in value["program"]
        )
        return LifeCase(rows, _names(rows, value["trainable"]), program, value["seed"])
    if kind == "golden":
        return GoldenCase(value["name"])
    raise ValueError(f"no kind of case is called {kind!r}")


def to_text(case: Any) -> str:
    """One line, and short enough for a command line."""
    text = readable(case)
    if len(text) <= LONG:
        return text
    return "z:" + base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()


def readable(case: Any) -> str:
    """One line of JSON, however long."""
    return json.dumps(to_json(case), separators=(",", ":"))


def from_text(text: str) -> Any:
    """The case that `to_text` gave. Raises BridgeError for any other text, and for a case that
    could not have been drawn."""
    try:
        if text.startswith("z:"):
            packed = base64.urlsafe_b64decode(text[2:])
            text = zlib.decompressobj().decompress(packed, LARGEST).decode()
        case = from_json(json.loads(text))
        check_case(case)
        return case
    except (*WRONG, zlib.error, RecursionError, BridgeError) as error:
        reason = str(error).partition("\n")[0]
        raise BridgeError(
            f"--case: is not a case ({reason}); copy it whole, with its quotes"
        ) from None


def _model(value: Any) -> ModelCase:
    lora = value.get("lora")
    if lora is not None:
        lora = LoraConfig(lora["rank"], lora["alpha"], tuple(lora["targets"]))
    return ModelCase(value["raw"], value["seed"], value["magnitudes"], lora)


def _short(case: TrainCase | LifeCase) -> str | list[str]:
    """The two sets of tensors that are drawn have names; others are listed."""
    for name in ("all", "bridge"):
        if case.trainable == _names(case.rows, name):
            return name
    return list(case.trainable)


def _names(rows: RowsCase, trainable: str | list[str]) -> tuple[str, ...]:
    config = rows.model.config
    if trainable == "all":
        return tuple(tensor_shapes(config))
    if trainable == "bridge":
        layers = range(config.num_hidden_layers)
        return tuple(name for layer in layers for name in bridge_shapes(config, layer))
    return tuple(trainable)


def _whole_numbers(value: Any, shape: Sequence[int], name: str) -> np.ndarray:
    """Nested lists of whole numbers as int64 of this shape. Raises ValueError for any other."""
    array = np.array(value)
    if array.dtype.kind != "i" or array.shape != tuple(shape):
        raise ValueError(f"{name}: is not whole numbers, {list(shape)} of them")
    return array.astype(np.int64)
