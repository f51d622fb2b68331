"""Whether a case that a user gave could have been drawn: only then is a failure the backend's.

`check_case` refuses numbers and settings out of their range, and `check_fits` a case of another
kind than a check runs on. Both know a case's meaning; its spelling is `cases_json`'s.
"""

from collections.abc import Collection
from dataclasses import asdict
from math import isfinite
from typing import Any

from bridge.config import TARGETS, ModelConfig, tensor_shapes
from bridge.contract import GRPO
from bridge.errors import BridgeError
from bridge_conformance import checks_golden
from bridge_conformance.cases import (
    MAGNITUDES,
    BlockCase,
    DecodeCase,
    ModelCase,
    RowsCase,
    TrainCase,
)
from bridge_conformance.cases_coming import SHORTEST, ComingCase
from bridge_conformance.cases_ends import SMALLEST, EndsCase
from bridge_conformance.cases_life import NEW, REQUESTS, Doing, LifeCase
from bridge_conformance.checks import Check
from bridge_conformance.checks_golden import GoldenCase

KINDS: dict[int | str, type] = {
    1: BlockCase,
    2: RowsCase,
    3: DecodeCase,
    4: TrainCase,
    5: TrainCase,
    6: RowsCase,
    "long": DecodeCase,
    "coming": ComingCase,
    "ends": EndsCase,
    "life": LifeCase,
    "trainable": TrainCase,
    "shared": TrainCase,
    "lora": TrainCase,
}
NAMES = {
    BlockCase: "block",
    RowsCase: "rows",
    DecodeCase: "decode",
    TrainCase: "train",
    ComingCase: "coming",
    EndsCase: "ends",
    LifeCase: "life",
    GoldenCase: "golden",
}


def check_case(case: Any) -> None:
    """Refuse a case that no strategy draws. Raises ValueError; a config's BridgeError passes."""
    match case:
        case GoldenCase():
            _one_of(case.name, checks_golden.names(), "name")
        case RowsCase():
            _check_rows(case)
        case BlockCase():
            config = _check_rows(case.rows)
            layers = config.bridge.layers if config.bridge else ()
            _whole(case.seed, "seed")
            _whole(case.layer, "layer")
            _one_of(case.layer, layers, "layer")
        case DecodeCase():
            _check_decode(case)
        case TrainCase():
            _check_train(case)
        case ComingCase():
            _check_coming(case)
        case EndsCase():
            _whole(case.vocab_size, "vocab_size", SMALLEST)
            _whole(case.seed, "seed")
        case LifeCase():
            _check_life(case)


def check_fits(check: Check, case: Any) -> None:
    """Refuse, with a BridgeError, a case that `check` does not run on."""
    wanted = GoldenCase if check.golden else KINDS[check.cases]
    if type(case) is not wanted:
        raise BridgeError(
            f"--case: is of the kind {NAMES[type(case)]}, but {check.name} takes {NAMES[wanted]}"
        )
    if not check.applies(case):
        raise BridgeError(f"--case: {check.name} does not apply to this case; give another")


def _check_model(model: ModelCase) -> ModelConfig:
    _whole(model.seed, "seed")
    _one_of(model.magnitudes, MAGNITUDES, "magnitudes")
    if model.config.bridge is None:
        raise ValueError("raw: has no Bridge blocks")
    if model.lora is not None:
        _whole(model.lora.rank, "rank", 1)
        if not isinstance(model.lora.alpha, int | float) or not isfinite(model.lora.alpha):
            raise ValueError(f"alpha: {model.lora.alpha!r} is no finite number")
        for target in model.lora.targets:
            _one_of(target, TARGETS, "targets")
    return model.config


def _check_rows(rows: RowsCase) -> ModelConfig:
    config = _check_model(rows.model)
    for name, below in (
        ("tokens", config.vocab_size),
        ("positions", config.max_position_embeddings),
    ):
        given = getattr(rows, name)
        if (outside := (given < 0) | (given >= below)).any():
            raise ValueError(f"{name}: {given[outside][0]} is not in 0..{below - 1}")
    return config


def _check_decode(case: DecodeCase) -> None:
    config = _check_model(case.model)
    _whole(case.seed, "seed")
    _whole(case.steps, "steps", 1)
    for name in ("widths", "lengths"):
        for number in getattr(case, name):
            _whole(number, name, 1)
    if not len(case.widths) == len(case.lengths) > 0:
        raise ValueError(f"{len(case.widths)} widths for {len(case.lengths)} lengths")
    if max(case.lengths) + case.steps > config.max_position_embeddings:
        raise ValueError(f"steps: go past the context of {config.max_position_embeddings}")
    if not isinstance(case.ragged, bool):
        raise ValueError(f"ragged: {case.ragged!r} is not true or false")


def _check_coming(case: ComingCase) -> None:
    if not isinstance(case.text, DecodeCase):
        raise ValueError("text: is not of the kind decode")
    _check_decode(case.text)
    _whole(case.text.steps, "steps", SHORTEST)
    for wave in case.waves:
        _whole(wave.after, "waves", 1)
        _whole(wave.prompts, "waves", 1)
    if sum(wave.prompts for wave in case.waves) != len(case.text.widths):
        raise ValueError(f"waves: do not hold {len(case.text.widths)} prompts in all")


def _check_life(case: LifeCase) -> None:
    config = _check_learning(case)
    doing, longest = Doing(), max(max(request.lengths) for request in REQUESTS)
    if longest + NEW > config.max_position_embeddings:
        raise ValueError(f"raw: a context of {config.max_position_embeddings} is too short")
    for number, do in enumerate(case.program):
        for whole in (do.number, *do.detail):
            _whole(whole, "program")
        if not doing.may(do):
            raise ValueError(f"program: {do.what!r} may not be number {number}")
        doing.note(do)


def _check_learning(case: TrainCase | LifeCase) -> ModelConfig:
    config = _check_rows(case.rows)
    _whole(case.seed, "seed")
    if not case.rows.active.any():
        raise ValueError("active: has no target to learn from")
    if not case.trainable:
        raise ValueError("trainable: names no tensor")
    for name in case.trainable:
        if name not in tensor_shapes(config):
            raise ValueError(f"trainable: no tensor is named {name!r}")
    return config


def _check_train(case: TrainCase) -> None:
    _check_learning(case)
    if isinstance(case.objective, GRPO):
        for name, number in asdict(case.objective).items():
            able = isinstance(number, int | float) and isfinite(number) and number >= 0
            if not able or (name == "temperature" and number == 0):
                raise ValueError(f"{name}: {number!r} is out of range")


def _whole(value: Any, name: str, least: int = 0) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: {value!r} is not a whole number of {least} or above")


def _one_of(value: Any, known: Collection[Any], name: str) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, known))}")
