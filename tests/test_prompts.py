"""What users pass to the Python interface: numbers, arrays and tensors where one would expect them,
and one line for the rest; and which end tokens a checkpoint's files may name."""

import json
from pathlib import Path

import numpy as np
import pytest
from scripted import EOS, ScriptedModel, byte_tokenizer, scripted
from tiny_host import write_host

import bridge
from bridge.errors import BridgeError
from bridge.model import Model

torch = pytest.importorskip("torch")


def answered(prompts, **options):
    """What is prefilled for prompts, at a width of 2 where none is said: ids, widths, numbers."""
    seen = []

    class Watched(ScriptedModel):
        def prefill(self, prompts, widths, max_new_tokens, prompt_ids=None):
            ids = list(prompt_ids or ())
            assert all(type(number) is int for number in (*widths, *ids, max_new_tokens))
            seen.append(([prompt.tolist() for prompt in prompts], list(widths), ids))
            return super().prefill(prompts, widths, max_new_tokens, prompt_ids)

    script = {(p, n): [5, EOS] for p in range(9) for n in range(4)}
    model = Model(Watched(script), "scripted", byte_tokenizer(), (EOS,))
    sets = model.generate(prompts, **{"width": 2, **options})
    assert json.dumps([s.to_json() for s in sets])  # plain numbers all through
    [one] = seen
    return one


ONE = [[3, 4, 5]]
FORMS = {
    "a list": ([3, 4, 5], ONE),
    "a tuple": ((3, 4, 5), ONE),
    "a list of numbers of NumPy's": ([np.int64(3), np.int32(4), np.uint8(5)], ONE),
    "an array": (np.array([3, 4, 5]), ONE),
    "a tensor": (torch.tensor([3, 4, 5]), ONE),
    "a list of tensors of one number": ([torch.tensor(3), torch.tensor(4), torch.tensor(5)], ONE),
    "a list of arrays": ([np.array([3, 4]), np.array([5])], [[3, 4], [5]]),
    "a list of tensors": ([torch.tensor([3, 4]), torch.tensor([5])], [[3, 4], [5]]),
    "an array of prompts": (np.array([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
    "a tensor of prompts": (torch.tensor([[3, 4], [5, 6]], dtype=torch.int32), [[3, 4], [5, 6]]),
    "an array of texts": (np.array(["a", "b"]), [byte_tokenizer().encode(c) for c in "ab"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_every_form(form):
    given, wanted = FORMS[form]
    assert answered(given) == (wanted, [2] * len(wanted), list(range(len(wanted))))


def test_numbers_in_every_form():
    prompts = [[3], [4]]
    for width in (3, np.int64(3), np.uint8(3), torch.tensor(3), np.array([3, 3]), (3, np.int8(3))):
        assert answered(prompts, width=width)[1] == [3, 3]
    for ids in ([7, 8], np.array([7, 8]), torch.tensor([7, 8]), (np.int64(7), 8)):
        assert answered(prompts, prompt_ids=ids)[2] == [7, 8]
    options = dict(max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, seed=2)
    kinds = (np.float32, np.int64, torch.tensor)
    for kind in kinds:
        whole = {k: v for k, v in options.items() if isinstance(v, int)}
        given = {k: np.int16(v) if kind is np.float32 else kind(v) for k, v in whole.items()}
        if kind is not np.int64:
            given |= {k: kind(v) for k, v in options.items() if isinstance(v, float)}
        assert answered(prompts, **given) == answered(prompts, **options)


def test_logits_take_tensors():
    model, backend = scripted("ab")
    seen = []
    backend.logits = lambda *given: seen.append(given)
    tokens, active = [[1, 2], [3, 4]], [[True, True], [True, False]]
    model.logits(tokens, groups=[0, 0], active=active)
    model.logits(torch.tensor(tokens), groups=torch.tensor([0, 0]), active=torch.tensor(active))
    for one, other in zip(*seen, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


def test_logits_take_only_what_is_regular():
    model, backend = scripted("ab")
    backend.logits = lambda *given: given
    for active in ([[True], [True, False]], [[True, "x"]]):
        with pytest.raises(BridgeError, match=r"^active must be bool \[1, 2\], [^\n]+$"):
            model.logits([[1, 2]], groups=[0], active=active)
    with pytest.raises(BridgeError, match=r"^groups: 18446744073709551615 is beyond int64$"):
        model.logits([[1, 2]], groups=[2**64 - 1])
    assert model.logits([[1, 2]], groups=[-1])[1].tolist() == [-1]


REFUSED = {
    "prompts must be a list or a text, not 5": ({}, 5),
    "prompts must be a list or a text, not None": ({}, None),
    "prompts must be a list or a text, not {'role'": ({}, {"role": "user", "content": "a"}),
    "prompts must be a list or a text, not b'go'": ({}, b"go"),
    "prompt 0 must be integers with 1 axes, none empty; not float64 [2]": ({}, [4.0, 5.0]),
    "prompt 0 must be integers with 1 axes, none empty; not float64 [1]": ({}, [1.5]),
    "prompt 0: 18446744073709551615 is beyond int64": ({}, [[1, 2**64 - 1]]),
    "prompt 0: 18446744073709551614 is beyond int64": ({}, np.array([2**64 - 2], np.uint64)),
    "prompt 0: -9223372036854775809 is beyond int64": ({}, [[-(2**63) - 1]]),
    "prompt 0: 9223372036854775807 is outside 0..": ({}, [[2**63 - 1]]),
    "prompt 1 must be a text, ids or messages, not None": ({}, ["a", None]),
    "prompt 0 must be integers with 1 axes": ({}, np.zeros((1, 1, 1), np.int64)),
    "prompt 0 must be integers": ({}, torch.tensor([[0.5]])),
    "prompt 0 must hold messages alone": ({}, [{"role": "user", "content": "a"}, "b"]),
    "no prompt given": ({}, np.zeros(0, np.int64)),
    "width must be 1 or above, not '4'": ({"width": "4"}, "go"),
    "width must be 1 or above, not 4.0": ({"width": np.float64(4)}, "go"),
    "width must be 1 or above, not True": ({"width": True}, "go"),
    "width must be 1 or above, not None": ({"width": None}, "go"),
    "stop must be a text or a list of texts, not 5": ({"stop": 5}, "go"),
    "stop must hold texts": ({"stop": [b"a"]}, "go"),
    "stop must be text in UTF-8, not": ({"stop": ["a", "\udcff"]}, "go"),
    "prompt_ids must be a list, not 3": ({"prompt_ids": 3}, "go"),
    "prompt_ids must be in 0..2^32-1": ({"prompt_ids": ["a"]}, "go"),
    "max_rows must be 1 or above, not 0": ({"max_rows": 0}, "go"),
    "max_rows must be 1 or above, not None": ({"max_rows": None}, "go"),
    "max_new_tokens must be 1 or above, not '5'": ({"max_new_tokens": "5"}, "go"),
    "temperature must be 0 or above, not 1000": ({"temperature": 10**400}, "go"),
    "system must be a text, not 5": ({"system": 5, "chat": True}, "go"),
    "system goes with a text in a chat, but prompt 0 is a text": ({"system": "brief"}, "go"),
    "system goes with a text in a chat, but prompt 0 is ids": ({"system": "brief"}, [[1, 2]]),
    "system goes with a text in a chat, but prompt 1 is messages; put a system message into": (
        {"system": "brief", "chat": True},
        ["go", [{"role": "user", "content": "a"}]],
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_the_rest_is_refused_in_one_line(message):
    options, prompts = REFUSED[message]
    model, backend = scripted("ab")
    model.tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(BridgeError) as caught:
        model.generate(prompts, **{"width": 1} | options)
    said = str(caught.value)
    assert message in said and "\n" not in said and len(said) < 400
    assert backend.prefills == []


def test_a_system_message_is_read_or_refused():
    model, _ = scripted("ab")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )

    def read(**options):
        return model.tokenizer.decode(model.encode("hi", **options))

    assert read(chat=True) == "<user>hi"
    assert read(chat=True, system="brief") == "<system>brief<user>hi"
    assert read(chat=True, system="") == "<system><user>hi"  # not the template's own
    with pytest.raises(BridgeError, match="ask for chat, or put it into the prompt"):
        model.encode("hi", system="brief")


@pytest.mark.parametrize("name", ["", 5, False, b""])
def test_a_name_that_is_none_is_not_the_bundled_model(name):
    with pytest.raises(BridgeError, match=r"checkpoint is .*; name a directory, or None for the"):
        bridge.load(name, backend="numpy")
    with pytest.raises(BridgeError, match=r"base is .*; name a directory$"):
        bridge.load(base=name, backend="numpy")


def eos_of(directory: Path) -> tuple[int, ...]:
    return bridge.load(directory, backend="numpy").eos_ids


def test_end_tokens_of_generation_config(tmp_path):
    host = write_host(tmp_path / "host", eos_token_id=0)
    settings = host / "generation_config.json"
    for said, wanted in ((7, (7,)), ([7, 256], (7, 256)), (None, (0,)), ([], (0,))):
        settings.write_text(json.dumps({"eos_token_id": said}))
        assert eos_of(host) == wanted
    for said, bad in ((257, "257"), ([0, 257], "257"), (-1, "-1"), (True, "True"), ("0", "'0'")):
        settings.write_text(json.dumps({"eos_token_id": said}))
        with pytest.raises(BridgeError) as caught:
            bridge.load(host, backend="numpy")
        assert str(caught.value) == (
            f"{settings}: eos_token_id {bad} is not a token of the model's vocabulary 0..256; "
            "correct it, or take it out"
        )


def test_an_end_token_that_the_tokenizer_has_and_the_model_has_not(tmp_path):
    host = write_host(tmp_path / "host", vocab_size=200)
    assert eos_of(host) == (0,)
    (host / "tokenizer_config.json").write_text('{"eos_token": "\u0143"}')  # a byte's letter
    with pytest.raises(BridgeError, match=r"tokenizer_config.json: eos_token is 256 .*0\.\.199"):
        bridge.load(host, backend="numpy")
    with pytest.raises(BridgeError, match=r"prompt 0 \(by tokenizer.json\): .* is outside 0..199"):
        (host / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        bridge.load(host, backend="numpy").generate("í")  # the byte 0xAD
