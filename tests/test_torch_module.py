"""A torch model is an `nn.Module` with the checkpoint's names: what torch's own tools do with one
they do with it, and decoding is by its weights as they are, however they were changed."""

import copy
import ctypes
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bridge.config import parse_config, tensor_shapes
from bridge.contract import SFT, AdamW, Batch
from bridge.errors import BridgeError
from bridge_conformance.cases import random_tensors
from bridge_torch import fused
from bridge_torch.backend import TorchBackend
from bridge_torch.block import PackedBlock
from bridge_torch.linear import can_block, stacked

pytestmark = pytest.mark.usefixtures("one_thread")

RAW = {
    "model_type": "llama",
    "attention_bias": True,
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
BLOCKS = {"spec_version": "1.0", "num_heads": 2, "head_dim": 8, "layers": [0, 1], "norm_eps": 1e-6}
ATTENTION, MLP = ({**BLOCKS, "kind": kind} for kind in ("attention", "mlp"))
PROMPTS = [np.arange(10), np.arange(3)]
B, S = 4, 6
TOKENS = np.random.default_rng(0).integers(0, 40, (B, S))
ACTIVE = np.ones((B, S), bool)
ACTIVE[0, 4:] = ACTIVE[3, :2] = False
GROUPS = np.array([0, 0, 1, 1])
POSITIONS = np.maximum(np.cumsum(ACTIVE, 1) - 1, 0)
TARGETS = np.roll(TOKENS, -1, 1)
BATCH = Batch(TOKENS, GROUPS, ACTIVE, TARGETS, ACTIVE)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load(dtype="float32", **changes):
    config = parse_config({**RAW, "bridge": ATTENTION, **changes})
    return TorchBackend().load(config, random_tensors(config, 0, dtype), device="cpu", dtype=dtype)


def forward(module):
    """Logits of the active cells."""
    cells = module.cells(GROUPS, ACTIVE, POSITIONS)
    return module(torch.from_numpy(TOKENS), cells)[torch.from_numpy(ACTIVE)]


def gradients(module):
    """Of a loss that every parameter has a part in, by name."""
    module.zero_grad()
    forward(module).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def first_logits(model):
    return model.prefill(PROMPTS, [2, 1], 4).logits()


# What the module is.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", [ATTENTION, MLP, None], ids=["attention", "mlp", "host"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_its_state_is_the_checkpoint(tied, blocks, family):
    changes = {} if family == "llama" else {"model_type": family, "head_dim": 4}
    model = load("bfloat16", tie_word_embeddings=tied, bridge=blocks, **changes)
    state = model.transformer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert list(shapes.items()) == list(tensor_shapes(model.config).items())
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert [name for name, _ in model.transformer.named_parameters()] == list(state)


def test_building_one_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_computes_what_the_backend_does():
    model = load("float64")
    expected = model.logits(TOKENS, GROUPS, ACTIVE, POSITIONS)[ACTIVE]
    np.testing.assert_allclose(forward(model.transformer).detach(), expected, rtol=1e-10)


def test_gradients_are_the_backends():
    model = load("float64", tie_word_embeddings=False)
    _, expected = model.loss_and_grads(BATCH, SFT(), list(tensor_shapes(model.config)))
    module = model.transformer
    targets = torch.from_numpy(TARGETS[ACTIVE])
    nn.functional.cross_entropy(forward(module), targets).backward()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-14)


def test_gradients_are_asked_for_as_they_were_before():
    model = load()
    asked = {name: i % 2 == 0 for i, name in enumerate(tensor_shapes(model.config))}
    for name, parameter in model.transformer.named_parameters():
        parameter.requires_grad_(asked[name])
    model.loss_and_grads(BATCH, SFT(), [Q_PROJ])
    assert asked == {name: p.requires_grad for name, p in model.transformer.named_parameters()}


# What torch's tools do with it.


def test_a_state_goes_into_another_model():
    model, other = load().transformer, load(tie_word_embeddings=False).transformer
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    with torch.no_grad():
        other.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert torch.equal(forward(other), forward(model))


def test_hooks_run():
    module, seen = load().transformer, []
    hook = module.model.layers[1].bridge.register_forward_hook(lambda *args: seen.append(args[2]))
    forward(module)
    hook.remove()
    forward(module)
    assert [tuple(out.shape) for out in seen] == [(B, S, 16)]


def test_it_is_a_function_of_its_parameters():
    module = load("float64").transformer
    parameters = {name: p.detach() * 1.5 for name, p in module.named_parameters()}
    cells, tokens = module.cells(GROUPS, ACTIVE, POSITIONS), torch.from_numpy(TOKENS)
    there = torch.from_numpy(ACTIVE)

    def loss(parameters):
        logits = torch.func.functional_call(module, parameters, (tokens, cells))
        return logits[there].square().mean()

    found = torch.func.grad(loss)(parameters)
    other = copy.deepcopy(module)
    other.load_state_dict(parameters)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-14)


def test_it_compiles():
    module = load("float64", num_hidden_layers=1, bridge={**ATTENTION, "layers": [0]}).transformer
    expected = gradients(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    cells, there = module.cells(GROUPS, ACTIVE, POSITIONS), torch.from_numpy(ACTIVE)
    logits = compiled(torch.from_numpy(TOKENS), cells)[there]
    torch.testing.assert_close(logits, forward(module), rtol=1e-10, atol=0)
    module.zero_grad()
    logits.square().mean().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-14)


class LowRank(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.lora_B = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight  # PEFT's has it too

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self):
        base = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            base.weight += self.lora_B.weight @ self.lora_A.weight
        return base


def test_projections_can_be_wrapped_and_merged():
    model = load("float64")
    module = model.transformer
    attention = module.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear  # what PEFT looks for
    attention.q_proj = LowRank(attention.q_proj)
    found = forward(module)
    found.square().mean().backward()
    assert attention.q_proj.lora_B.weight.grad.abs().max() > 0
    assert attention.q_proj.base_layer.weight.grad is None
    with pytest.raises(BridgeError, match=r"layers.0.self_attn.q_proj is a LowRank.* merge it"):
        first_logits(model)
    attention.q_proj = attention.q_proj.merged()
    torch.testing.assert_close(forward(module), found, rtol=1e-9, atol=1e-12)
    logits = model.logits(TOKENS, GROUPS, ACTIVE, POSITIONS)[ACTIVE]
    np.testing.assert_allclose(logits, found.detach(), rtol=1e-9, atol=1e-12)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_is_sharded_from_outside_and_saved(one_process, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = load("float64", tie_word_embeddings=False)
    plain, module = copy.deepcopy(model.transformer), model.transformer
    mesh = init_device_mesh("cpu", (1,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    state = module.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    torch.testing.assert_close(forward(module), forward(plain), rtol=1e-12, atol=0)
    expected = gradients(plain)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name], rtol=1e-9, atol=1e-14)
    with pytest.raises(BridgeError, match=r"is a DTensor.* gather it"):
        first_logits(model)

    dcp.save({"model": state}, checkpoint_id=tmp_path / "saved")
    fresh = load("float64", tie_word_embeddings=False).transformer
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    dcp.load({"model": fresh.state_dict()}, checkpoint_id=tmp_path / "saved")
    assert torch.equal(forward(fresh), forward(plain))


# Decoding is by the weights as they are.


def by_an_optimizer(model):
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=0.05)
    forward(model.transformer).square().mean().backward()
    first_logits(model)
    optimizer.step()


def by_loading_a_state(model):
    state = model.transformer.state_dict()
    model.transformer.load_state_dict({name: tensor * 1.5 for name, tensor in state.items()})


def by_assigning_a_state(model):
    state = {name: tensor * 1.5 for name, tensor in model.transformer.state_dict().items()}
    model.transformer.load_state_dict(state, assign=True)


def by_writing_to_data(model):
    for parameter in model.transformer.parameters():
        parameter.data.copy_(parameter.data * 1.5)


def by_one_number_of_data(model):
    model.transformer.model.layers[0].self_attn.v_proj.weight.data[0, 0] += 3


def by_an_alias_kept_from_before(model):
    alias = model.transformer.model.layers[1].mlp.up_proj.weight.data
    first_logits(model)
    alias.mul_(1.5)


def by_writing_to_memory(model):
    weight = model.transformer.model.layers[0].mlp.down_proj.weight
    ctypes.memset(weight.data_ptr(), 0, weight.nbytes)


def by_multiplying(model):
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1.5)


def by_another_parameter(model):
    attention = model.transformer.model.layers[0].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach() * 1.5)


def by_another_submodule(model):
    mlp = model.transformer.model.layers[0].mlp
    mlp.gate_proj = nn.Linear(16, 24, bias=False, dtype=mlp.gate_proj.weight.dtype)


def by_a_trainer(model):
    model.trainer(SFT(), AdamW(lr=0.05), list(tensor_shapes(model.config))).step(BATCH)


def by_taking_a_trainer_back(model):
    trainer = model.trainer(SFT(), AdamW(lr=0.05), list(tensor_shapes(model.config)))
    state = trainer.state()
    moved = {key: a * 1.5 if key.startswith("master") else a for key, a in state.items()}
    first_logits(model)
    trainer.restore(moved)


def by_another_dtype(model):
    """Narrower; bfloat16, whose numbers float16 may hold as they are, becomes larger too."""
    if model.dtype == "bfloat16":
        model.transformer.to(torch.float16)
        by_multiplying(model)
    else:
        model.transformer.to(torch.bfloat16)


CHANGES = [change for name, change in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_weights_is_decoded_by(change, dtype):
    model = load(dtype, tie_word_embeddings=dtype != "bfloat16")
    before = first_logits(model)
    change(model)
    after = first_logits(model)
    fresh = TorchBackend().load(
        model.config, dict(model.tensors()), device="cpu", dtype=model.dtype
    )
    np.testing.assert_array_equal(after, first_logits(fresh))
    assert np.abs(after - before).max() > 1e-4


def test_a_bias_may_be_the_only_one_of_its_stack():
    model = load("float64")
    mlp = model.transformer.model.layers[0].mlp
    mlp.up_proj = nn.Linear(16, 24, dtype=torch.float64)
    logits = model.logits(TOKENS, GROUPS, ACTIVE, POSITIONS)[ACTIVE]
    np.testing.assert_allclose(logits, forward(model.transformer).detach(), rtol=1e-9)


def decoded(model, between=lambda: None):
    """Logits of three steps, the second and third after `between`."""
    decoder, found = model.prefill(PROMPTS, [2, 1], 4), []
    for step in range(3):
        decoder.advance(np.array([1, 2, 3]))
        found.append(decoder.logits())
        if step == 0:
            between()
    return np.stack(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "change", [by_a_trainer, by_taking_a_trainer_back], ids=["step", "restore"]
)
def test_a_decoder_under_way_keeps_its_weights(change, dtype):
    expected = decoded(load(dtype))
    model = load(dtype)
    found = decoded(model, lambda: change(model))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(decoded(model) - expected).max() > 1e-4


@pytest.mark.parametrize("change", [by_writing_to_data, by_multiplying, by_an_optimizer])
def test_a_decoder_with_blocked_weights_keeps_them_whoever_writes(change):
    if not can_block("cpu", torch.float32):
        pytest.skip("this build of torch has no oneDNN layout")
    expected = decoded(load())
    model = load()
    model.transformer  # noqa: B018
    np.testing.assert_array_equal(decoded(model, lambda: change(model)), expected)


# Memory.


def test_there_is_one_of_the_weights():
    """Packing empties the module; going on with training drops what was packed."""
    model = load()
    first_logits(model)
    packed = weakref.ref(model.weights.packed())
    module = model.weights._module
    assert all(parameter.is_meta for parameter in module.model.layers.parameters())
    model.loss_and_grads(BATCH, SFT(), [Q_PROJ])
    assert packed() is None
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_a_model_is_whole_after_packing_that_was_cut_off(monkeypatch):
    model, blocks = load(tie_word_embeddings=False), []
    expected = {name: array.tobytes() for name, array in model.tensors()}

    def block(**fields):
        if blocks:
            raise KeyboardInterrupt
        blocks.append(PackedBlock(**fields))
        return blocks[0]

    with monkeypatch.context() as patched:
        patched.setattr("bridge_torch.packing.PackedBlock", block)
        with pytest.raises(KeyboardInterrupt):
            first_logits(model)
    assert {name: array.tobytes() for name, array in model.tensors()} == expected
    assert np.isfinite(first_logits(model)).all()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_without_the_blocked_layout_packing_copies_nothing(dtype, monkeypatch):
    """Of a model that was lent, too: what is packed are its parameters, where they lie."""
    monkeypatch.setattr(fused, "kernels", lambda: None)  # which have 16 bits in a layout of theirs
    model = load(dtype)
    module, packed = model.transformer, model.weights.packed()
    mine = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    assert {name: part.data_ptr() for name, part in packed.parts()} == mine
    module.to(torch.float32).to(getattr(torch, dtype))  # no stacks any more
    apart = model.weights.packed().layers[0].qkv.weight
    assert apart.data_ptr() != module.model.layers[0].self_attn.q_proj.weight.data_ptr()


def test_a_stack_is_only_what_lies_in_a_row():
    whole = torch.arange(24.0).reshape(6, 4)
    a, b, c = whole.split([1, 2, 3])
    assert stacked([a, b, c]).data_ptr() == whole.data_ptr()
    for parts in ([b, a], [a, c], [a, b.clone(), c], [whole.T], [b, b]):
        assert torch.equal(stacked(parts), torch.cat(list(parts)))
        assert stacked(parts).data_ptr() != parts[0].data_ptr()
