"""Models to trace, and traces made by hand, for the tests of figures and of views."""

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_host import write_host

import bridge
from bridge.checkpoints.initialise import init
from bridge.decoding.events import Response, ResponseSet
from bridge.tracing.trace import Trace


def write_models(out):
    """A host; models of it whose blocks do something, of both kinds; and one with fresh blocks."""
    write_host(out / "host")
    rng = np.random.default_rng(1)
    kinds = {"all": {}, "last": {"layers": "2"}, "mlp": {"kind": "mlp"}}
    for name, options in kinds.items():
        init(out / "host", out / name, heads=2, head_dim=4, **options)
        tensors = load_file(out / name / "model.safetensors")
        for key in tensors:
            if key.endswith(("bridge.o_proj.weight", "bridge.down_proj.weight")):
                tensors[key] = rng.normal(size=tensors[key].shape).astype(np.float32)
            if key.endswith(("bridge.q_proj.weight", "bridge.k_proj.weight")):
                tensors[key] *= 8  # weights that differ from even ones
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})
    init(out / "host", out / "fresh", heads=2, head_dim=4)


def exact(path):
    return bridge.load(path, backend="numpy", dtype="float64")


def answered(prompt, *rows, reasons=None):
    """A group's answers, given."""
    reasons = reasons or ["length"] * len(rows)
    responses = [
        Response(f"row {n}", list(row), reason)
        for n, (row, reason) in enumerate(zip(rows, reasons, strict=True))
    ]
    return ResponseSet("a prompt", list(prompt), responses)


def hand_made(**changes):
    """Two layers with one head; three rows, the last of which ends after one step."""
    even = np.full((3, 3), 1 / 3)
    later = np.array([[0.25, 0.75, 0], [0.5, 0.5, 0], [np.nan] * 3])
    other = np.array([[0.75, 0.25, 0], [1, 0, 0], [np.nan] * 3])
    made = {
        "prompt": "p",
        "prompt_tokens": [1],
        "answers": ["a b", "a c", "d"],
        "reasons": ["length", "length", "eos"],
        "tokens": np.array([[1, 2], [1, 3], [0, -1]]),
        "words": [["a", " b"], ["a", " c"], ["<eos>"]],
        "kind": "attention",
        "layers": (1, 3),
        "attention": np.array([[[even, later]], [[even, other]]]),
        "norm_ratios": np.array([0.5, 0.25]),
        "entropy": np.array([[1.0, 0.5], [2.0, 0.0], [0.0, np.nan]]),
        "greedy": False,
    }
    return Trace(**(made | changes))
