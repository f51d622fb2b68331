"""Golden vectors (clause 10.4): inputs and outputs of single clauses, as files anyone can read.

A file `CLAUSE-what.safetensors` holds `in.*` and `out.*` tensors, and its settings as JSON in the
metadata. `compute` gives the outputs by the reference; `run` gives them by any backend, for the
clauses that the contract reaches.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.initialise import fresh_bridge_tensors, fresh_lora
from bridge.checkpoints.safetensors_io import SafetensorsFile
from bridge.config import LoraConfig, ModelConfig, parse_bridge, parse_config
from bridge.contract import GRPO, SFT, AdamW, BackendModel, Batch, Sampling
from bridge.decoding.inputs import default_positions
from bridge.philox import philox4x32, uniforms
from bridge.rope import inverse_frequencies
from bridge_ref import losses, ops
from bridge_ref.attention import masked_softmax
from bridge_ref.backend import Reference
from bridge_ref.block import allowed_rows, bridge_block
from bridge_ref.model import rope_tables
from bridge_ref.optim import AdamWState, clip_by_global_norm
from bridge_ref.sampling import sample

Arrays = dict[str, np.ndarray]
Given = Mapping[str, np.ndarray]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Vector:
    """One golden file."""

    name: str
    settings: dict[str, Any]
    inputs: Arrays
    outputs: Arrays

    @property
    def clause(self) -> str:
        """The clause that it shows."""
        return self.name.partition("-")[0]

    @classmethod
    def read(cls, path: Path) -> "Vector":
        """From a file, with bounds and header checked."""
        file = SafetensorsFile(path)

        def part(prefix: str) -> Arrays:
            return {n.removeprefix(prefix): file[n] for n in file if n.startswith(prefix)}

        settings = json.loads(file.metadata["settings"])
        return cls(path.stem, settings, part("in."), part("out."))


def compute(name: str, settings: Settings, inputs: Given) -> Arrays:
    """The outputs of a vector by the reference, unrounded."""
    what = name.partition("-")[2].partition("-")[0]
    if what in THROUGH_THE_CONTRACT:
        return run(name, settings, inputs, _reference(settings, inputs))
    return BY_THE_REFERENCE[what](settings, inputs)


def run(name: str, settings: Settings, inputs: Given, model: BackendModel) -> Arrays:
    """The outputs of a vector by a backend's model; its clause must be one the contract reaches."""
    what = name.partition("-")[2].partition("-")[0]
    return THROUGH_THE_CONTRACT[what](settings, inputs, model)


def reachable(vector: Vector) -> bool:
    """Whether the contract reaches what a vector shows."""
    return vector.name.partition("-")[2].partition("-")[0] in THROUGH_THE_CONTRACT


def config_of(settings: Settings) -> ModelConfig:
    """The model that a vector is of; `lora`: the updates that it has (clause 5.10)."""
    config, lora = parse_config(settings["config"]), settings.get("lora")
    if lora is None:
        return config
    return replace(config, lora=LoraConfig(lora["rank"], lora["alpha"], tuple(lora["targets"])))


def _weights(inputs: Given) -> Arrays:
    return {n.removeprefix("weights."): a for n, a in inputs.items() if n.startswith("weights.")}


def _reference(settings: Settings, x: Given) -> BackendModel:
    return Reference().load(config_of(settings), _weights(x), device="cpu", dtype="float64")


def _logits(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    logits = model.logits(x["tokens"], x["groups"], x["active"], x["positions"])
    return {"logits": np.where(x["active"][..., None], logits, 0)}


def _ratios(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    return {"ratios": model.norm_ratios(x["tokens"], x["groups"], x["active"], x["positions"])}


def _decode(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    """`comes`: which prompts come before each timestep; else all before the first (clause 4.5)."""
    widths, alive, outputs = settings["widths"], x["alive"], {}
    comes = dict(enumerate(settings.get("comes", [[*range(len(widths))]])))
    decoder = None
    for step in range(len(alive)):
        if which := comes.get(step):
            prompts = [x[f"prompt.{i}"] for i in which], [widths[i] for i in which]
            admit = model.prefill if decoder is None else decoder.admit
            decoder = admit(*prompts, settings["max_new_tokens"]) or decoder
        assert decoder is not None
        outputs[f"step{step}"] = decoder.logits()
        if step + 1 < len(alive):
            left = alive[step]
            decoder.advance(x["tokens"][step][left], alive[step + 1][left])
    return outputs


def _logprobs(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    """Of the tokens that each row is then fed, at a temperature (clause 6.10)."""
    widths, alive, outputs = settings["widths"], x["alive"], {}
    decoder = model.prefill(_prompts(settings, x), widths, settings["max_new_tokens"])
    for step, left in enumerate(alive):
        tokens = x["tokens"][step][left]
        outputs[f"step{step}"] = decoder.logprobs(tokens, settings["temperature"])
        if step + 1 < len(alive):
            decoder.advance(tokens, alive[step + 1][left])
    return outputs


def _generate(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    decoder = model.prefill([x["prompt"]], [settings["width"]], settings["steps"])
    drawn = []
    for step in range(settings["steps"]):
        drawn.append(decoder.sample(Sampling(**settings["sampling"])))
        if step + 1 < settings["steps"]:
            decoder.advance()
    return {"tokens": np.stack(drawn)}


def _say(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    """What rows say `[R, steps]`, each by settings of its own, -1 after its end: drawn ahead, as
    many columns at a time as the decoder gives (clauses 4.6 and 6.9)."""
    samplings = [Sampling(**one) for one in settings["samplings"]]
    steps, ends = settings["steps"], settings["ends"]
    decoder = model.prefill(_prompts(settings, x), settings["widths"], steps)
    said, rows, step = np.full((len(samplings), steps), -1), np.arange(len(samplings)), 0
    while len(rows):
        table = decoder.sample_ahead([samplings[row] for row in rows], steps - step, ends)
        step += table.shape[1]
        said[rows, step - table.shape[1] : step] = table
        keep = (table[:, -1] >= 0) & ~np.isin(table[:, -1], ends) & (step < steps)
        decoder.advance(None, keep)
        rows = rows[keep]
    return {"tokens": said}


def _back(settings: Settings, x: Given) -> Arrays:
    """By the reference alone, whose tables have all columns asked for: a table, and the logits of
    the rows kept once they have gone back from it and on with other tokens (clause 4.7)."""
    samplings = [Sampling(**one) for one in settings["samplings"]]
    steps, model = settings["steps"], _reference(settings, x)
    decoder = model.prefill(_prompts(settings, x), settings["widths"], steps)
    table = decoder.sample_ahead(samplings, settings["ahead"], settings["ends"])
    decoder.advance(x["tokens"], x["keep"], x["back"])
    return {"table": table, "logits": decoder.logits()}


def _prompts(settings: Settings, x: Given) -> list[np.ndarray]:
    return [x[f"prompt.{i}"] for i in range(len(settings["widths"]))]


def _train(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    trainer = model.trainer(_objective(settings), _optimizer(settings), settings["trainable"])
    for _ in range(settings["updates"]):
        trainer.step(_batch(x))
    return trainer.state()


def _gradients(settings: Settings, x: Given, model: BackendModel) -> Arrays:
    metrics, grads = model.loss_and_grads(_batch(x), _objective(settings), settings["trainable"])
    return {"loss": np.array(metrics["loss"]), **{f"grad.{n}": g for n, g in grads.items()}}


def _block(settings: Settings, x: Given) -> Arrays:
    bridge = parse_bridge(settings["bridge"], 1)
    assert bridge is not None
    out, _ = bridge_block(x["hidden"], x["groups"], x["active"], _weights(x), bridge)
    return {"hidden": out}


def _rope(settings: Settings, x: Given) -> Arrays:
    config = config_of(settings)
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    cos, sin = rope_tables(config, x["positions"], np.dtype(np.float64))
    rotated = ops.rotate(x["heads"], cos, sin)
    return {"frequencies": frequencies, "factor": np.array(factor), "rotated": rotated}


def _sample(settings: Settings, x: Given) -> Arrays:
    return {
        f"tokens.{i}": sample(x["logits"], x["uniform"], **sampling)
        for i, sampling in enumerate(settings["samplings"])
    }


def _loss(settings: Settings, x: Given) -> Arrays:
    metrics, dlogits = losses.loss(_objective(settings), x["logits"], _batch(x))
    return {"loss": np.array(metrics["loss"]), "dlogits": dlogits}


def _adamw(settings: Settings, x: Given) -> Arrays:
    state = AdamWState({"weight": x["weight"]})
    for gradient in x["gradients"]:
        state.update({"weight": gradient}, _optimizer(settings))
    return state.state()


def _clip(settings: Settings, x: Given) -> Arrays:
    clipped, norm = clip_by_global_norm(x, settings["max_norm"])
    return {**clipped, "norm": np.array(norm)}


def _fresh(settings: Settings, x: Given) -> Arrays:
    """Blocks (clause 8.2), or the updates of a model that has some (clause 8.3)."""
    config, seed = config_of(settings), settings["seed"]
    return (
        dict(fresh_bridge_tensors(config, seed))
        if config.lora is None
        else fresh_lora(config, seed)
    )


def _objective(settings: Settings) -> SFT | GRPO:
    given = settings["objective"]
    return SFT() if given is None else GRPO(**given)


def _optimizer(settings: Settings) -> AdamW:
    given = settings["optimizer"]
    return AdamW(**{**given, "betas": tuple(given["betas"])})  # JSON has no tuples


def _batch(x: Given) -> Batch:
    fields = Batch.__dataclass_fields__
    return Batch(**{name: array for name, array in x.items() if name in fields})


THROUGH_THE_CONTRACT: dict[str, Callable[..., Arrays]] = {
    "logits": _logits,
    "ratios": _ratios,
    "decode": _decode,
    "logprobs": _logprobs,
    "generate": _generate,
    "say": _say,
    "gradients": _gradients,
    "training": _train,
}
BY_THE_REFERENCE: dict[str, Callable[[Settings, Given], Arrays]] = {
    "back": _back,
    "positions": lambda settings, x: {"positions": default_positions(x["active"])},
    "norm": lambda settings, x: {"y": ops.rms_norm(x["x"], x["weight"], settings["eps"])[0]},
    "allowed": lambda settings, x: {"allowed": allowed_rows(x["groups"], x["active"])},
    "softmax": lambda settings, x: {"p": masked_softmax(x["score"], x["allowed"])},
    "block": _block,
    "rope": _rope,
    "swiglu": lambda settings, x: {"y": ops.swiglu(x["gate"], x["up"])[0]},
    "philox": lambda settings, x: {"words": philox4x32(x["counter"].T, settings["seed"])},
    "uniform": lambda settings, x: {"uniform": uniforms(settings["seed"], *x["counter"].T)},
    "sampling": _sample,
    "loss": _loss,
    "advantages": lambda settings, x: {
        "advantages": losses.group_advantages(x["rewards"], x["groups"]),
        "centred": losses.group_advantages(x["rewards"], x["groups"], normalise_std=False),
    },
    "clip": _clip,
    "adamw": _adamw,
    "fresh": _fresh,
}
