"""The golden vectors that the contract reaches, as checks of a backend in any dtype (clause 10.4).

Where the dtype holds a vector's weights exactly, the backend must meet the file's own outputs;
where it rounds them, what the float64 reference gives for the rounded ones. The allowance is the
numerics rule's in both cases.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bridge.config import ModelConfig, parse_config, tensor_shapes
from bridge.contract import BackendModel, Sampling
from bridge.philox import uniforms
from bridge_conformance import golden, spec_files
from bridge_conformance.checks_ahead import may_draw
from bridge_conformance.checks_coming import exact_logits
from bridge_conformance.checks_decode import generation
from bridge_conformance.checks_train import vector
from bridge_conformance.tolerance import DTYPES, ulp
from bridge_conformance.trial import Target, Trial

GRID = 2.0**-28  # to which a file's outputs are rounded, of the largest magnitude's power of two
LEVELS = {
    "block": 1,
    "logits": 2,
    "ratios": 2,
    "decode": 3,
    "logprobs": 3,
    "generate": 3,
    "say": 3,
    "gradients": 4,
    "training": 5,
}
# A vector of the block alone has no host; this one is never run.
HOST = {
    "model_type": "llama",
    "vocab_size": 2,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class GoldenCase:
    """One golden file. It stands for its model too, as `cases.ModelCase` does for its own."""

    name: str
    seed = 0
    magnitudes = "plain"

    @cached_property
    def vector(self) -> golden.Vector:
        """The file."""
        return golden.Vector.read(spec_files.directory() / "golden" / f"{self.name}.safetensors")

    @property
    def what(self) -> str:
        """The part of the name that says what the vector is of, after its clause."""
        if "-block" in self.name:
            return "block"
        return self.name.partition("-")[2].partition("-")[0]

    @cached_property
    def config(self) -> ModelConfig:
        """The vector's own, or a small host around its block."""
        settings = self.vector.settings
        if "config" in settings:
            return golden.config_of(settings)
        width = self.vector.inputs["hidden"].shape[-1]
        return parse_config({**HOST, "hidden_size": width, "bridge": settings["bridge"]})

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Of the whole model, in float64."""
        prefix = "model.layers.0.bridge." if self.what == "block" else ""
        given = {
            prefix + name.removeprefix("weights."): array
            for name, array in self.vector.inputs.items()
            if name.startswith("weights.")
        }
        shapes = tensor_shapes(self.config)
        return {name: given.get(name, np.zeros(shape)) for name, shape in shapes.items()}

    def tensors(self, dtype: str) -> dict[str, np.ndarray]:
        """The weights, rounded to `dtype`."""
        return {name: array.astype(DTYPES[dtype]) for name, array in self.weights.items()}

    def kept_by(self, dtype: str) -> bool:
        """Whether rounding to `dtype` changes none of the numbers that a model is given."""
        given = list(self.weights.values())
        given += [self.vector.inputs["hidden"]] if self.what == "block" else []
        return all((a.astype(DTYPES[dtype]).astype(np.float64) == a).all() for a in given)


def names() -> list[str]:
    """The golden files that the contract reaches."""
    files = [path.stem for path in spec_files.golden_files()]
    return [name for name in files if GoldenCase(name).what in LEVELS]


def golden_vector_is_met(target: Target, case: GoldenCase) -> None:
    """Clause 10.4: a backend gives the outputs of a golden file."""
    trial, file, what = Trial(target, case), case.vector, case.what
    if what == "generate":
        return _generated(trial, case)
    if what == "say":
        return _said(trial, case)
    if what == "block":
        run: Callable[..., Any] = _block
    else:
        run = golden.THROUGH_THE_CONTRACT[what]
    got, exact, *others = (
        run(file.settings, file.inputs, model) for model in (trial.load(), *trial.references())
    )
    if got.keys() != file.outputs.keys():
        raise trial.failure(f"gives {sorted(got)}, not {sorted(file.outputs)}", case)
    kept = case.kept_by(target.dtype)
    for kind in sorted({_kind(name, what) for name in file.outputs}):
        names = [name for name in file.outputs if _kind(name, what) == kind]
        allowed = _allowed(trial, exact, others, names)
        for name in names:
            want, given = exact[name], np.asarray(got[name])
            if kept:
                want = file.outputs[name]
                given = _off_the_grid(given, want)
            trial.same(given, want, allowed, name, case)


def _block(settings: Mapping[str, Any], x: Mapping[str, Any], model: BackendModel) -> golden.Arrays:
    hidden = x["hidden"].astype(DTYPES[model.dtype])
    return {"hidden": model.block(0, hidden, x["groups"], x["active"])}


def _off_the_grid(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """`got` without the part of its error that may be the rounding of the file."""
    if got.shape != want.shape or want.dtype.kind != "f":
        return got
    grid = GRID * float(np.abs(want).max(initial=0))
    return got - np.clip(got - want, -grid, grid)


def _kind(name: str, what: str) -> str:
    """Outputs of one kind are compared as one vector (clause 10.2)."""
    return name.partition(".")[0] if what in ("gradients", "training") else name


def _allowed(
    trial: Trial, exact: golden.Given, others: list[golden.Given], names: list[str]
) -> float:
    want, own, *nudged = (vector(given, names) for given in (exact, *others))
    return trial.allowed(want, own, nudged, max(1.0, abs(want[0])) if names == ["loss"] else None)


def _generated(trial: Trial, case: GoldenCase) -> None:
    """Tokens: those of the file from float32 on. A narrower dtype may draw others, by the rule."""
    settings, x = case.vector.settings, case.vector.inputs
    widths, sampling = [settings["width"]], Sampling(**settings["sampling"])
    said = generation(trial, [x["prompt"]], widths, settings["steps"], sampling, (), case)
    if ulp(trial.dtype) <= ulp("float32"):
        trial.same(said, case.vector.outputs["tokens"], 0, "tokens", case)


def _said(trial: Trial, case: GoldenCase) -> None:
    """Tokens drawn ahead, likewise; a narrower dtype's are judged by what was said in the end."""
    settings, x = case.vector.settings, case.vector.inputs
    tokens = golden.run(case.name, settings, x, trial.model)["tokens"]
    if ulp(trial.dtype) <= ulp("float32"):
        return trial.same(tokens, case.vector.outputs["tokens"], 0, "tokens", case)
    widths, alive = settings["widths"], tokens.T >= 0
    prompts = [x[f"prompt.{i}"] for i in range(len(widths))]
    numbers = [(prompt, row) for prompt, width in enumerate(widths) for row in range(width)]
    of = np.repeat(np.arange(len(widths)), widths)
    exact, allowed = exact_logits(trial, prompts, of, np.maximum(tokens.T, 0), alive)
    for step, row in np.argwhere(alive):
        prompt, number = numbers[row]
        sampling = Sampling(**settings["samplings"][row])
        u = uniforms(sampling.seed, step, [number], prompt)
        logits = exact[[step], row].astype(np.float32)
        if not may_draw(int(tokens[row, step]), logits, u, sampling, allowed):
            message = f"{sampling}: row {row} drew {tokens[row, step]} at step {step}"
            raise trial.failure(message, case)
