"""The code that a checkpoint carries for transformers, run by transformers, against the reference.

Models are random and tiny, of every family, in float64 with transformers' casts to float32 lifted,
so that what differs is the code and not the rounding. The modules are cached in a directory of the
test's own, and nothing asks the network.
"""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria
from true_float64 import true_float64

import bridge
from bridge import remote_code
from bridge.checkpoints.reading import open_checkpoint
from bridge.checkpoints.tensor_specs import TensorSpec
from bridge.checkpoints.writing import write_checkpoint
from bridge.config import FAMILIES, SPEC_VERSION, bridge_shapes
from bridge.decoding.inputs import default_positions
from bridge.errors import BridgeError
from bridge_conformance import strategies
from bridge_conformance.cases import ModelCase, rows_of
from bridge_conformance.tolerance import DTYPES, allowance, error, proxy
from bridge_ref.backend import Reference

KINDS = ("attention", "mlp")
EOS, PAD = 1, 0


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """transformers copies a checkpoint's code to a cache before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", list(sys.path))
        yield
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]


def raw_config(family="llama", kind="attention", **changes):
    """Three layers, of which the middle one has no block."""
    return {
        "model_type": family,
        "vocab_size": 13,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        **({"sliding_window": None} if family == "mistral" else {}),
        "bridge": {
            "spec_version": SPEC_VERSION,
            "kind": kind,
            "num_heads": 2,
            "head_dim": 3,
            "layers": [0, 2],
            "norm_eps": 1e-5,
        },
        **changes,
    }


def write(path: Path, case: ModelCase, dtype="float32", code=True) -> Path:
    """A checkpoint by bridge's own writer, and the code in it."""
    tensors = case.tensors(dtype)
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    write_checkpoint(path, case.raw, specs, tensors.items())
    if code:
        raw = remote_code.add(path, case.raw, "torch")
        (path / "config.json").write_text(json.dumps(raw))
    return path


def load(path: Path, dtype=torch.float64):
    """By transformers, which must find every tensor and no other."""
    model, said = AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=True,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(said.values()), said
    return model.eval()


def whole(groups: torch.Tensor) -> dict[str, torch.Tensor]:
    """`groups`, and the `widths` of them when none is parted."""
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    return {"groups": groups, "widths": counts[group]}


def reference(case: ModelCase, dtype="float64"):
    return Reference().load(case.config, case.tensors("float32"), device="cpu", dtype=dtype)


def assert_conforms(got, case: ModelCase, arguments, cells):
    """The rule of clause 10.2 for float64, at some cells of teacher-forced rows."""
    exact, own = (reference(case, T).logits(*arguments)[cells] for T in ("float64", "float32"))
    assert error(got, exact) <= allowance(exact, own, "float64")


@st.composite
def models(draw, family):
    raw = draw(strategies.host_configs((family,)))
    layers = st.sets(st.sampled_from(range(raw["num_hidden_layers"])), min_size=1)
    raw["bridge"] = {
        "spec_version": SPEC_VERSION,
        "kind": draw(st.sampled_from(KINDS)),
        "num_heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 5)),
        "layers": sorted(draw(layers)),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }
    return ModelCase(raw, draw(strategies.SEEDS))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(data=st.data())
def test_logits_are_the_references(family, data, tmp_path_factory):
    case = data.draw(models(family))
    widths = data.draw(strategies.WIDTHS)
    # No gaps: a window spans timesteps in transformers, and positions here.
    pattern = st.sampled_from(["full", "left", "right", "both", "none"])
    patterns = data.draw(st.lists(pattern, min_size=sum(widths), max_size=sum(widths)))
    rows = rows_of(case, widths, 7, patterns, data.draw(st.booleans()), data.draw(strategies.SEEDS))
    with true_float64(), torch.no_grad():
        model = load(write(tmp_path_factory.mktemp("model") / "it", case))
        tokens, groups, active, positions = map(torch.from_numpy, rows.arguments)
        said = {"attention_mask": active.long(), "position_ids": positions, **whole(groups)}
        got = model(tokens, **said)
        again = model(tokens, **said, active=active)
    assert_conforms(got.logits.numpy()[rows.active], case, rows.arguments, rows.active)
    assert torch.equal(got.logits, again.logits)


class EndsAt(StoppingCriteria):
    """Row b ends with its token `ends[b]`, counted from 1."""

    def __init__(self, prompt: int, ends: list[int]) -> None:
        self.prompt, self.ends = prompt, torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        return self.ends == input_ids.shape[1] - self.prompt


def generate(model, prompts, mask, **settings):
    """Tokens `[B, P + T]` of a `generate`, and the logits of every step `[B, T, V]` as the model
    gave them: `generate` itself would round them to float32."""
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[2][:, -1:]))
    said = model.generate(prompts, attention_mask=mask, pad_token_id=PAD, **settings)
    hook.remove()
    return said.numpy(), torch.cat(steps, dim=1).numpy()


def assert_teacher_forced(case, said, logits, mask, groups, ends=None):
    """What `generate` computed is what the reference gives to the tokens that it said. `ends [B]`:
    with which token each row ended; None: with its first EOS. Gives them back."""
    P, T = mask.shape[1], logits.shape[1]
    made = said[:, P:]
    if ends is None:
        ends = np.where((made == EOS).any(axis=1), (made == EOS).argmax(axis=1) + 1, T)
    fed = np.arange(1, T) < np.asarray(ends)[:, None]
    active = np.concatenate([mask.numpy().astype(bool), fed], axis=1)
    arguments = (said[:, :-1], np.asarray(groups), active, default_positions(active))
    # Logits of the first step are those after the prompt, whose last cell every row feeds.
    cells = active & (np.arange(active.shape[1]) >= P - 1)
    assert_conforms(logits[cells[:, P - 1 :]], case, arguments, cells)
    return ends


# Left padding: two prompts of different lengths.
PROMPTS = torch.tensor([[PAD, PAD, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_rows_read_each_other_until_they_end(family, kind, tmp_path):
    case = ModelCase(raw_config(family, kind), 0)
    widths, seeds = set(), 4
    with true_float64():
        model = load(write(tmp_path / "it", case))
        for seed in range(seeds):
            torch.manual_seed(seed)
            said, logits = generate(
                model, PROMPTS, MASK, num_return_sequences=4, do_sample=True, max_new_tokens=8
            )
            mask = MASK.repeat_interleave(4, dim=0)
            ends = assert_teacher_forced(case, said, logits, mask, np.repeat([0, 1], 4))
            widths |= {len(set(group)) for group in np.split(ends, 2)}
    assert max(widths) > 1  # rows of a group did end at different times


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_of_given_groups_end_by_any_criterion(family, tmp_path):
    """Without an EOS, generate goes on to say and feed tokens of rows that have ended."""
    case = ModelCase(raw_config(family, eos_token_id=None), 1)
    prompts = torch.tensor([[2, 3, 4], [5, 6, 7], [PAD, 8, 9], [2, 3, 5], [PAD, 9, 8]])
    mask = (prompts != PAD).long()
    groups, ends = [7, 2, 7, 2, 2], [2, 5, 6, 1, 3]
    with true_float64():
        model = load(write(tmp_path / "it", case))
        said, logits = generate(
            model,
            prompts,
            mask,
            groups=torch.tensor(groups),
            do_sample=False,
            max_new_tokens=6,
            stopping_criteria=[EndsAt(3, ends)],
        )
    assert_teacher_forced(case, said, logits, mask, groups, ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_groups_every_row_stands_alone(family, tmp_path):
    case = ModelCase(raw_config(family), 2)
    with true_float64():
        model = load(write(tmp_path / "it", case))
        torch.manual_seed(0)
        said, logits = generate(model, PROMPTS, MASK, do_sample=True, max_new_tokens=6)
        assert_teacher_forced(case, said, logits, MASK, [0, 1])
        with torch.no_grad():
            together = model(PROMPTS, attention_mask=MASK).logits
            alone = model(PROMPTS[1:]).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_how_generate_computes_changes_nothing(kind, tmp_path):
    case = ModelCase(raw_config(kind=kind, max_position_embeddings=64), 3)
    ways = (
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 3},
        {"groups": torch.tensor([4, 9])},
    )
    tokens = set()
    with true_float64():
        model = load(write(tmp_path / "it", case))
        for way in ways:
            torch.manual_seed(0)
            said = model.generate(
                PROMPTS,
                attention_mask=MASK,
                pad_token_id=PAD,
                num_return_sequences=4,
                do_sample=True,
                max_new_tokens=10,
                **way,
            )
            tokens.add(json.dumps(said.tolist()))
    assert EOS in said[:, 4:-1]
    assert len(tokens) == 1


def test_a_cache_goes_on_where_it_was(tmp_path):
    """A second turn: the rows that were said, and more, on the keys and values of the first."""
    case = ModelCase(raw_config(), 4)
    settings = {"groups": torch.tensor([0, 0]), "do_sample": False}
    with true_float64():
        model = load(write(tmp_path / "it", case))
        first = model.generate(
            PROMPTS,
            attention_mask=MASK,
            pad_token_id=PAD,
            max_new_tokens=3,
            min_new_tokens=3,
            return_dict_in_generate=True,
            **settings,
        )
        more = torch.cat([first.sequences, torch.tensor([[7, 2], [3, 9]])], dim=1)
        mask = torch.cat([MASK, torch.ones(2, 5, dtype=torch.long)], dim=1)
        name = "cache" if "cache" in first else "past_key_values"  # the older name
        said, logits = generate(
            model, more, mask, max_new_tokens=4, **{name: first[name]}, **settings
        )
    assert_teacher_forced(case, said, logits, mask, [0, 0])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 2},
        {"dola_layers": "low"},
        {"assistant_model": True},
        {"custom_generate": "someone/something"},
        {"cache_implementation": "paged"},
        {"active": torch.ones(1, 2)},
        {"groups": torch.tensor([0, 1])},
        {"groups": torch.tensor([0]), "widths": torch.tensor([2])},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_would_mix_rows_is_refused_in_one_line(settings, tmp_path):
    model = load(write(tmp_path / "it", ModelCase(raw_config(), 0)))
    if "assistant_model" in settings:
        settings = {"assistant_model": model}
    with pytest.raises(ValueError) as refusal:
        model.generate(torch.tensor([[3, 4]]), pad_token_id=PAD, max_new_tokens=3, **settings)
    assert "\n" not in str(refusal.value)
    assert any(word in str(refusal.value) for word in ("rows", "Bridge", "groups"))


def test_continuous_batching_is_refused_however_it_begins(tmp_path):
    model = load(write(tmp_path / "it", ModelCase(raw_config(), 0)))
    for begin in (
        model.init_continuous_batching,
        lambda: model.continuous_batching_context_manager().__enter__(),
        lambda: model.generate_batch([[3, 4]]),
        lambda: model.generate_batch([]),
    ):
        with pytest.raises(ValueError, match="continuous batching would part rows"):
            begin()


def test_a_mask_that_says_nothing_of_cells_is_refused(tmp_path):
    model = load(write(tmp_path / "it", ModelCase(raw_config(), 0)))
    square = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"say with active"):
        model(torch.tensor([[3, 4]]), attention_mask=square)
    model(torch.tensor([[3, 4]]), attention_mask=square, active=torch.ones(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(block=strategies.block_cases())
def test_the_block_conforms_in_narrow_dtypes(dtype, block, tmp_path_factory):
    rows, config = block.rows, block.rows.model.config
    path = remote_code.add(tmp_path_factory.mktemp("code"), rows.model.raw, "torch")["auto_map"]
    assert path["AutoModelForCausalLM"].startswith("modeling_bridge.")
    code = pytest.importorskip("bridge.remote_code.modeling_bridge")
    tensors = rows.model.tensors(dtype)
    module = code.BridgeBlock(config.hidden_size, config.bridge.to_json())
    prefix = f"model.layers.{block.layer}.bridge."
    names = [name.removeprefix(prefix) for name in bridge_shapes(config, block.layer)]
    T = getattr(torch, dtype)
    state = {n: torch.from_numpy(tensors[prefix + n].astype(np.float32)).to(T) for n in names}
    module.to(T).load_state_dict(state)
    hidden = block.hidden(dtype).astype(np.float32)
    groups, active = torch.from_numpy(rows.groups), torch.from_numpy(rows.active)
    layout = code.Layout.of(groups, len(groups))
    with torch.no_grad():
        got = module(torch.from_numpy(hidden).to(T), layout, active)
        dirty = torch.from_numpy(hidden).to(T).masked_fill(~active[..., None], torch.nan)
        dirty[groups != groups[0]] = torch.inf
        seen = module(dirty, layout, active)
    exact, own = (
        Reference()
        .load(config, tensors, device="cpu", dtype=name)
        .block(block.layer, block.hidden(dtype), rows.groups, rows.active)[rows.active]
        for name in ("float64", proxy(dtype))
    )
    assert error(got.float().numpy()[rows.active], exact) <= allowance(exact, own, dtype)
    first = active & (groups == groups[0])[:, None]
    assert torch.equal(got[first], seen[first])


@pytest.mark.parametrize("code", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_who_does_not_trust_the_code_gets_the_host(family, code, tmp_path):
    case = ModelCase(raw_config(family), 6)
    path = write(tmp_path / "it", case, code=code)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with true_float64(), torch.no_grad():
        model, said = AutoModelForCausalLM.from_pretrained(
            path,
            trust_remote_code=False,
            dtype=torch.float64,
            attn_implementation="eager",
            output_loading_info=True,
        )
        got = model(tokens).logits.numpy()
    assert type(model).__module__.startswith("transformers.models.")
    assert not said["missing_keys"]
    assert all(".bridge." in name for name in said["unexpected_keys"])
    host = ModelCase({k: v for k, v in case.raw.items() if k != "bridge"}, 6)
    weights = {n: a for n, a in case.tensors("float32").items() if ".bridge." not in n}
    ones = np.ones((2, 3), bool)
    arguments = (tokens.numpy(), np.arange(2), ones, default_positions(ones))
    exact, own = (
        Reference().load(host.config, weights, device="cpu", dtype=T).logits(*arguments)
        for T in ("float64", "float32")
    )
    assert error(got, exact) <= allowance(exact, own, "float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_bridge_loads(family, tied, dtype, kind, tmp_path):
    case = ModelCase(raw_config(family, kind, tie_word_embeddings=tied), 7)
    model = load(write(tmp_path / "it", case, dtype), getattr(torch, dtype))
    model.save_pretrained(tmp_path / "saved")
    opened = open_checkpoint(tmp_path / "saved")
    assert opened.config == case.config
    for name, array in case.tensors(dtype).items():
        assert opened.tensors[name].dtype == DTYPES[dtype]
        assert opened.tensors[name].tobytes() == array.tobytes(), name
    again = load(tmp_path / "saved", getattr(torch, dtype))
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    groups = torch.tensor([0, 0])
    with torch.no_grad():
        said = whole(groups)
        assert torch.equal(model(tokens, **said).logits, again(tokens, **said).logits)
    ours = bridge.load(tmp_path / "saved", backend="numpy", dtype="float32")
    got = ours.logits(tokens.numpy(), groups=groups.numpy())
    ones = np.ones((2, 3), bool)
    arguments = (tokens.numpy(), groups.numpy(), ones, default_positions(ones))
    assert np.array_equal(got, reference_of(case, dtype).logits(*arguments))


@pytest.mark.parametrize("form", ["torch", "jax", "mlx"])
def test_an_adapter_is_no_model_for_transformers(form, tmp_path):
    """Its blocks alone would be a host of random numbers."""
    path = write(tmp_path / "it", ModelCase(raw_config(), 0), code=False)
    bridge.convert(path, tmp_path / "adapter", to=form, adapter=True)
    for trust in (True, False):
        with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=trust)


def reference_of(case, dtype):
    return Reference().load(case.config, case.tensors(dtype), device="cpu", dtype="float32")


def test_fresh_blocks_change_nothing(tmp_path):
    path = write(tmp_path / "it", ModelCase(raw_config(), 0))
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    host = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    lacking, left_over = host.load_state_dict(model.state_dict(), strict=False)
    assert not lacking and all(".bridge." in name for name in left_over)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        got = model(tokens, **whole(torch.tensor([0, 0]))).logits
        want = host(tokens).logits
    assert torch.equal(got, want)


def test_a_config_of_another_spec_is_refused(tmp_path):
    path = write(tmp_path / "it", ModelCase(raw_config(), 0))
    raw = json.loads((path / "config.json").read_text())
    for changed in (None, {**raw["bridge"], "spec_version": "2.0"}, {**raw["bridge"], "kind": "x"}):
        (path / "config.json").write_text(json.dumps({**raw, "bridge": changed}))
        with pytest.raises(ValueError, match=r"config\.json: bridge must be as spec 1\.0"):
            load(path)


def test_the_code_needs_transformers_alone():
    source = Path(remote_code.__file__).with_name("modeling_bridge.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {node.module.split(".")[0] for node in imports}
    names |= {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert names == {"functools", "typing", "torch", "transformers"}
    assert not any(node.level for node in imports)


def test_code_is_added_where_it_is_of_use(tmp_path):
    raw = raw_config("qwen3")
    (tmp_path / "again").mkdir()
    (tmp_path / "one").mkdir()
    said = remote_code.add(tmp_path / "one", raw, "torch")
    assert said == {
        **raw,
        "architectures": ["BridgeQwen3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_bridge.BridgeQwen3ForCausalLM"},
    }
    assert remote_code.without(said) == raw
    of_host = {"architectures": ["Qwen3ForCausalLM"], **raw}
    said = remote_code.add(tmp_path / "again", of_host, "torch")
    assert said["architectures"] == ["BridgeQwen3ForCausalLM"]
    assert list(remote_code.without(said).items()) == list(of_host.items())
    theirs = {**said, "architectures": ["Theirs"]}
    assert remote_code.without(theirs) == {**raw, "architectures": ["Theirs"]}
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["modeling_bridge.py"]
    with pytest.raises(BridgeError, match="jax"):
        remote_code.add(tmp_path, raw, "jax")
    with pytest.raises(BridgeError, match="no blocks"):
        remote_code.add(tmp_path, {**raw, "bridge": None}, "torch")
