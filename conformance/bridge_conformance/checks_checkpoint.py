"""Checks of the round trip through tensors and checkpoints (chapter 9).

Weights travel byte for byte, so a model that was written and read again is the same model, bit for
bit.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bridge.checkpoints.conversion import convert
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import SHARD_SIZE, write_checkpoint
from bridge.config import tensor_shapes
from bridge.errors import BridgeError
from bridge.numbers.rounding import rounded
from bridge_conformance.cases import RowsCase
from bridge_conformance.tolerance import DTYPES
from bridge_conformance.trial import Target, Trial


def tensors_come_back_byte_for_byte(target: Target, case: RowsCase) -> None:
    """Clauses 9.3, 9.6 and 10.1: every tensor by name, in canonical order, in the model's dtype."""
    trial = Trial(target, case.model)
    back = list(trial.model.tensors())
    names = [name for name, _ in back]
    if names != list(tensor_shapes(trial.case.config)):
        raise trial.failure(f"tensors() gives {names}", case)
    for name, array in back:
        want = trial.tensors[name]
        if array.dtype != DTYPES[target.dtype] or array.shape != want.shape:
            raise trial.failure(f"{name} comes back as {array.dtype} {array.shape}", case)
        if array.tobytes() != want.tobytes():
            raise trial.failure(f"{name} comes back changed", case)


def stored_dtypes_are_rounded_once(target: Target, case: RowsCase) -> None:
    """Clause 10.1: tensors may be stored in several dtypes, from layer to layer too; one that is
    too large is refused by its name."""
    trial = Trial(target, case.model)
    stored, want = {}, {}
    kinds = [DTYPES[name] for name in ("bfloat16", "float16")]  # of the first layers; else float64
    for number, (name, shape) in enumerate(tensor_shapes(trial.case.config).items()):
        rng = np.random.default_rng([case.model.seed, number])
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 2
        # Many are a little above a tie: what goes through float32 is rounded the other way.
        exact = 1 + rng.integers(0, 256, shape) * 2.0**-11 + rng.choice([0, 2.0**-30], shape)
        stored[name] = exact.astype(np.float32).astype(kinds[layer]) if layer < 2 else exact
        want[name] = rounded(stored[name].astype(np.float64), DTYPES[target.dtype], name)
    for name, array in trial.load(tensors=stored).tensors():
        if array.dtype != want[name].dtype or array.tobytes() != want[name].tobytes():
            raise trial.failure(
                f"{name}, stored in {stored[name].dtype}, is not rounded once", case
            )
    if target.dtype == "float64":
        return
    large = "model.embed_tokens.weight"
    stored[large][-1, -1] = 1e39
    try:
        trial.load(tensors=stored)
    except BridgeError as error:
        if large not in str(error):
            raise trial.failure(
                f"{large} is too large, and is refused as: {error}", case
            ) from error
    else:
        raise trial.failure(f"{large} holds 1e39, and is not refused", case)


def write_model(trial: Trial, path: Path, shard_size: int = SHARD_SIZE) -> None:
    """The backend's model of a trial as a checkpoint, in the dtype under test."""
    shapes = tensor_shapes(trial.case.config)
    specs = {name: TensorSpec(DTYPES[trial.dtype], shape) for name, shape in shapes.items()}
    write_checkpoint(path, trial.case.raw, specs, trial.model.tensors(), shard_size=shard_size)


def a_checkpoint_gives_the_same_model(target: Target, case: RowsCase) -> None:
    """Clauses 9.1 to 9.6: written, read and loaded, a model computes the same logits, bit for bit.

    Half of the checkpoints are in shards.
    """
    trial = Trial(target, case.model)
    size = 1000 if case.model.seed % 2 else 10**9
    with TemporaryDirectory() as parent:
        path = Path(parent) / "checkpoint"
        write_model(trial, path, size)
        opened = open_checkpoint(path)
        read = {name: opened.tensors[name] for name in opened.tensors}
        for name, array in read.items():
            if array.tobytes() != trial.tensors[name].tobytes():
                raise trial.failure(f"{name} is read from the checkpoint changed", case)
        again = trial.load(opened.config, read)
    want, got = (model.logits(*case.arguments) for model in (trial.model, again))
    where = case.active
    trial.same(got[where], want[where], 0, "logits of the model read again", case)


def every_form_gives_the_same_model(target: Target, case: RowsCase) -> None:
    """Clauses 9.8 to 9.12: converted from form to form, a model is the same one, bit for bit.

    Half of the checkpoints are in shards.
    """
    trial = Trial(target, case.model)
    want, where = trial.model.logits(*case.arguments), case.active
    size = 1000 if case.model.seed % 2 else 10**9
    with TemporaryDirectory() as parent:
        before = Path(parent) / "start"
        write_model(trial, before)
        for number, form in enumerate(("jax", "mlx", "torch")):
            after = Path(parent) / f"{number}-{form}"
            convert(before, after, form, shard_size=size)
            opened = open_checkpoint(after)
            for name, array in opened.tensors.items():
                if array.tobytes() != trial.tensors[name].tobytes():
                    raise trial.failure(f"{name} is read from the form {form} changed", case)
            got = trial.load(opened.config, dict(opened.tensors)).logits(*case.arguments)
            trial.same(got[where], want[where], 0, f"logits of the form {form}", case)
            before = after
