"""Quantised hosts on the MLX backend: the same model as their dequantised numbers, by the checks of
conformance; packed in memory; blocks that can be trained, and packed tensors that cannot."""

import gc
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.checkpoints.packing import Packed, quantise
from bridge.config import bridge_shapes, parse_config, tensor_shapes
from bridge.config.quantization import BITS, Quantization
from bridge.contract import GRPO, SFT, AdamW, Batch, Sampling
from bridge.errors import BridgeError
from bridge_conformance import checks_decode, checks_model, checks_train, strategies
from bridge_conformance.cases import ModelCase, TrainCase, random_tensors
from bridge_conformance.tolerance import DTYPES, allowance, error
from bridge_conformance.trial import Target

mx = pytest.importorskip("mlx.core")

from bridge_mlx import linear  # noqa: E402
from bridge_mlx.backend import DTYPES as MLX  # noqa: E402
from bridge_mlx.backend import MlxBackend, from_numpy, to_numpy  # noqa: E402


class Held(dict):
    """Dequantised tensors, float64 where that is their exact value, and those that are packed."""

    packings: dict[str, Packed]

    def packed(self, name: str) -> Packed | None:
        return self.packings.get(name)


@dataclass(frozen=True)
class Quantised(ModelCase):
    """A model whose host's matrices, or some of them, are packed; each by one of `hows`."""

    hows: tuple[Quantization | None, ...] = ()
    fresh: bool = False

    def tensors(self, dtype: str, *, fresh: bool = False) -> Held:
        """`bridge_ref` reads the numbers, rounded to its dtype; bridge_mlx what is packed."""
        tensors = Held(super().tensors(dtype, fresh=fresh or self.fresh))
        tensors.packings = {}
        rng = np.random.default_rng(self.seed)
        for name, array in tensors.items():
            how = self.hows[rng.integers(len(self.hows))]
            if array.ndim == 1 or ".bridge." in name or how is None:
                continue
            if array.shape[1] % how.group_size == 0:
                packed = quantise(array.astype(DTYPES[dtype]), how)
                tensors.packings[name] = packed
                tensors[name] = packed.dequantise(dtype=np.float64)
        assert tensors.packings or not any(self.hows)
        return tensors


PACKINGS = [Quantization(bits, size) for bits in BITS for size in (32, 64)]


@st.composite
def quantised(draw, cases):
    """A case of conformance, its model wide enough to be packed: all alike, or mixed."""
    case = draw(cases)
    rows = case.rows if isinstance(case, TrainCase) else case
    model = rows.model
    sizes = {"head_dim": draw(st.sampled_from([32, 64])), "hidden_size": 64}
    raw = {**model.raw, **sizes, "intermediate_size": 64 * draw(st.integers(1, 2))}
    hows = draw(st.lists(st.sampled_from([*PACKINGS, None]), min_size=1, max_size=3))
    # Weights of extreme magnitudes are for the arithmetic of floats, which is the same here.
    packed = Quantised(raw, model.seed, hows=(draw(st.sampled_from(PACKINGS[::2])), *hows))
    if isinstance(case, TrainCase):
        tensors = packed.tensors("float32")
        names = tuple(name for name in tensors if name not in tensors.packings)
        return replace(case, rows=replace(case.rows, model=packed), trainable=names)
    return replace(case, model=packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(max_examples=12)
@given(data=st.data())
def test_a_quantised_host_conforms(dtype, data):
    """Clause 10.2 around the exact value of what is packed: teacher-forced and cached."""
    target = Target(MlxBackend(), "cpu", dtype)
    rows = data.draw(quantised(strategies.rows_cases(magnitudes=("plain",))))
    checks_model.logits_are_within_the_numerics_rule(target, rows)
    decoding = data.draw(quantised(strategies.decode_cases()))
    checks_decode.cached_decoding_equals_teacher_forcing(target, decoding)
    checks_decode.a_prompt_is_prefilled_once_for_its_group(target, decoding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(max_examples=8)
@given(data=st.data())
def test_what_a_quantised_host_holds_as_floats_can_be_trained(dtype, data):
    """Gradients pass through packed layers, to blocks, norms, biases, and weights of a stack whose
    others are packed: clauses 7.4, 7.5 and 10.2."""
    target = Target(MlxBackend(), "cpu", dtype)
    case = data.draw(quantised(strategies.train_cases()))
    checks_train.loss_and_gradients_are_within_the_numerics_rule(target, case)


RAW = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bridge": {
        "spec_version": "1.0",
        "kind": "attention",
        "num_heads": 2,
        "head_dim": 8,
        "layers": [0, 2],
        "norm_eps": 1e-6,
    },
}
CONFIG = parse_config(RAW)


def pack(dtype: str = "float32", *hows: Quantization | None) -> Held:
    """The tensors of RAW; `hows` are taken in turn for the host's matrices."""
    tensors = Held(random_tensors(CONFIG, 0, dtype))
    tensors.packings = {}
    for i, name in enumerate(n for n in tensors if tensors[n].ndim == 2 and ".bridge." not in n):
        if (how := (hows or (Quantization(4, 64),))[i % max(len(hows), 1)]) is not None:
            packed = tensors.packings[name] = quantise(tensors[name], how)
            tensors[name] = packed.dequantise()
    return tensors


def load(tensors: Held, dtype: str = "float32"):
    return MlxBackend().load(CONFIG, tensors, device="cpu", dtype=dtype)


def batch() -> Batch:
    """Two rows of a group, every token the target of the cell before it."""
    tokens = np.random.default_rng(0).integers(0, 512, (2, 6))
    active = np.ones((2, 6), bool)
    return Batch(
        tokens,
        np.zeros(2, int),
        active,
        np.roll(tokens, -1, 1),
        active,
        advantages=np.array([1, -1]),
    )


MIXED = (Quantization(4, 64), Quantization(6, 64), None, Quantization(4, 32))


@pytest.mark.parametrize("hows", [(Quantization(4, 64),), (Quantization(8, 32),), MIXED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_given_back_dequantised(hows, dtype):
    """In canonical order, with the bytes that `Packed.dequantise` gives; others as they were."""
    tensors = pack(dtype, *hows)
    got = dict(load(tensors, dtype).tensors())
    assert list(got) == list(tensor_shapes(CONFIG))
    for name, array in got.items():
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes(), name


def memory():
    """Bytes in use. MLX's own thread lets go of its work only after the result is there."""
    mx.synchronize()
    mx.clear_cache()  # a buffer that is used again may be larger than what it holds
    return mx.get_active_memory()


@pytest.mark.parametrize("hows", [(Quantization(4, 64),), (Quantization(8, 32),), MIXED])
def test_memory_is_that_of_what_is_packed(hows):
    """No float copy is kept, neither after loading nor after all that a model does."""
    tensors = pack("bfloat16", *hows)
    stored = sum(a.nbytes for n, a in tensors.items() if n not in tensors.packings)
    stored += sum(
        array.nbytes
        for packed in tensors.packings.values()
        for array in (packed.weight, packed.scales, packed.biases)
    )
    gc.collect()  # what earlier tests left must not go in between
    before = memory()
    model = load(tensors, "bfloat16")
    held = [memory() - before]
    rows = batch()
    model.logits(rows.tokens, rows.groups, rows.active, np.broadcast_to(np.arange(6), (2, 6)))
    decoder = model.prefill([np.arange(4)], [2], 4)
    decoder.advance(decoder.sample(Sampling()))
    del decoder
    assert sum(array.nbytes for _, array in model.tensors()) > 1.5 * stored
    held.append(memory() - before)
    floats = sum(array.nbytes for array in tensors.values())
    assert floats > 1.5 * stored
    # Beside the weights: rope's tables, and what an allocation is rounded up to.
    for bytes_ in held:
        assert stored <= bytes_ < stored + 0.1 * (floats - stored)


@pytest.mark.parametrize("objective", [SFT(), GRPO()])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_training_blocks_leaves_the_host_packed(objective, checkpoint_activations):
    tensors = pack("float32", *MIXED)
    model = load(tensors)
    names = [name for i in range(3) for name in bridge_shapes(CONFIG, i)]
    trainer = model.trainer(
        objective, AdamW(lr=0.01), names, checkpoint_activations=checkpoint_activations
    )
    gc.collect()
    before = memory()
    metrics = [trainer.step(batch()) for _ in range(4)]
    assert min(each["grad_norm"] for each in metrics) > 0
    if isinstance(objective, SFT):
        assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert memory() - before < 0.1 * sum(a.nbytes for a in tensors.values())
    changed = {n for n, a in model.tensors() if a.tobytes() != tensors[n].tobytes()}
    assert changed == set(names)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_is_packed_cannot_be_trained(name):
    model = load(pack())
    for use in (
        lambda names: model.trainer(SFT(), AdamW(), names),
        lambda names: model.loss_and_grads(batch(), SFT(), names),
    ):
        with pytest.raises(BridgeError, match=f"{name} is quantised, which cannot be trained"):
            use([name])
        with pytest.raises(BridgeError, match="is quantised, which cannot be trained"):
            use(list(tensor_shapes(CONFIG)))  # trainable="all"
    # What is not packed can be, also where its neighbours are.
    for kept in ("model.layers.1.input_layernorm.weight", "model.norm.weight"):
        _, grads = model.loss_and_grads(batch(), SFT(), [kept])
        assert np.abs(grads[kept]).max() > 0


def test_a_packed_tensor_of_another_shape_is_named():
    tensors = pack()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors.packings[name] = tensors.packings["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(BridgeError, match=rf"{name} is \[128, 256\], need \[256, 256\]"):
        load(tensors)


@pytest.mark.parametrize("part", ["scales", "biases", "weight"])
def test_what_is_packed_and_too_large_for_float16_is_named(part):
    tensors = pack()
    stem = "model.layers.0.self_attn.o_proj"
    packed = tensors.packings[f"{stem}.weight"]
    scales, biases = (np.zeros(packed.scales.shape, np.float32) for _ in range(2))
    largest = int(packed.dequantise(dtype=np.float32).argmax() // packed.shape[1])
    row = scales if part == "scales" else biases if part == "biases" else None
    if row is None:  # each is within float16, and what they make is not
        scales[largest], biases[largest] = 60000.0, 60000.0
    else:
        row[largest, 0] = -1e5
    changed = replace(packed, scales=scales, biases=biases)
    tensors.packings[f"{stem}.weight"] = changed
    with pytest.raises(BridgeError, match=rf"{stem}.{part}' holds .*too large for float16"):
        load(tensors, "float16")
    names = dict(load(tensors, "float32").tensors())
    np.testing.assert_array_equal(names[f"{stem}.weight"], changed.dequantise(dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_long_sums_are_added_up_in_float32(dtype):
    """A product over 4096 inputs, and its gradient over 4096 outputs: each within clause 10.2."""
    rng = np.random.default_rng(0)
    for shape, gradient in (((8, 4096), False), ((4096, 64), True)):
        weight = rng.normal(size=shape) / np.sqrt(shape[1]) + 0.1
        packed = quantise(weight.astype(DTYPES[dtype]), Quantization(4, 64))
        # Of one sign: what is added up so far soon outgrows what is added.
        x = rng.random((3, shape[0] if gradient else shape[1])).astype(DTYPES[dtype])
        scales, biases = (from_numpy(a, MLX[dtype]) for a in (packed.scales, packed.biases))
        layer = linear.Quantised(from_numpy(packed.weight, mx.uint32), scales, biases, 4, 64)
        with mx.stream(mx.cpu):
            given_ = from_numpy(x, MLX[dtype])
            if gradient:
                at = mx.zeros((3, shape[1]), MLX[dtype])
                _, (out,) = mx.vjp(lambda x, layer=layer: layer.product(x, None), [at], [given_])
            else:
                out = layer.product(given_, None)
            got = to_numpy(out)
        wide, narrow = (packed.dequantise(dtype=t) for t in (np.float64, None))
        exact = x.astype(np.float64) @ (wide if gradient else wide.T)
        narrow = narrow.astype(np.float32)
        own = (x.astype(np.float32) @ (narrow if gradient else narrow.T)).astype(DTYPES[dtype])
        assert got.dtype == DTYPES[dtype]
        assert error(got, exact) <= allowance(exact, own, dtype)
