"""Responses are learnt as a row would say them after the prompt: together they decode to the
prompt and then the response, whatever the tokenizer does to a text of its own."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import CONFIG
from tokenizers import Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_of_all_kinds import ALL, byte_level

from bridge.config import parse_config
from bridge.errors import BridgeError
from bridge.model import BUNDLED, Model
from bridge.text.tokenizer import Tokenizer, read_tokenizer
from bridge.training.settings import SFTSettings
from bridge.training.sft import read_samples

MADE = {name: Tokenizer(make(), {"eos_token": "<eos>"}) for name, make in ALL.items()}
SPACED = ["llama 2", "metaspace always", "metaspace first", "byte level, prefix space"]
WHOLE = ["byte level", "byte level, prefix space", "llama 2"]
LETTERS = st.text(st.sampled_from("ab 2+=4\né😀"), min_size=1, max_size=8)


@pytest.mark.parametrize("name", SPACED)
def test_no_space_comes_between_prompt_and_response(name):
    tokenizer = MADE[name]
    prompt = tokenizer.encode("2+2=")
    apart = tokenizer.fast.encode("4", add_special_tokens=False).ids
    assert tokenizer.fast.decode([*prompt, *apart]).strip() == "2+2= 4"  # which nobody wrote
    for response in ("4", " 4", "4 a", "a  b"):
        ids = tokenizer.encode_after(prompt, response, "it")
        assert tokenizer.fast.decode([*prompt, *ids]).strip() == f"2+2={response}"
    assert tokenizer.encode_after(prompt, "", "it") == []


@pytest.mark.parametrize("name", WHOLE)
@given(prompt=LETTERS.filter(str.strip), response=LETTERS)
def test_whatever_the_texts_are(name, prompt, response):
    tokenizer = MADE[name]
    ids = tokenizer.encode(prompt)
    said = tokenizer.encode_after(ids, response, "it")
    decoded = tokenizer.fast.decode(ids)
    assert tokenizer.fast.decode([*ids, *said]) == decoded + response


@given(prompt=LETTERS.filter(str.strip), response=LETTERS)
def test_byte_level_tokenizers_read_a_response_by_itself(prompt, response):
    """What a row says after the prompt's ids are tokens of its own, whatever would merge."""
    tokenizer = MADE["byte level"]
    said = tokenizer.encode_after(tokenizer.encode(prompt), response, "it")
    assert said == tokenizer.fast.encode(response, add_special_tokens=False).ids


def test_the_bundled_tokenizer_splits_at_spaces():
    tokenizer = read_tokenizer(BUNDLED)
    prompt = tokenizer.encode("3 5 2 7 = 8 ?")
    said = tokenizer.encode_after(prompt, "3 + 5 = 8", "it")
    assert said == tokenizer.encode("3 + 5 = 8")
    with pytest.raises(BridgeError, match=r"^it: '3 \+ x' would be learnt as ' 3 \+ <eos>'"):
        tokenizer.encode_after(prompt, "3 + x", "it")


def test_what_a_normalizer_changes_is_no_disagreement():
    fast = byte_level()
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer = Tokenizer(fast)
    said = tokenizer.encode_after(tokenizer.encode("a="), "E\u0301", "it")  # as two characters
    assert tokenizer.decode(said) == "\u00e9"


def test_a_space_by_other_means_is_found_in_the_whole_text():
    fast = FastTokenizer(models.BPE({"▁": 0, "a": 1, "=": 2, "b": 3}, []))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex("^(?!▁)"), "▁")]
    )
    fast.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(fast)
    prompt = tokenizer.encode("a=")
    assert prompt == [0, 1, 2] and tokenizer.encode("b") == [0, 3]
    assert tokenizer.encode_after(prompt, "b", "it") == [3]
    fast = byte_level()
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"^{n}"), f" {n}") for n in "24"]
    )
    tokenizer = Tokenizer(fast)
    prompt = tokenizer.encode("2=")
    assert tokenizer.decode(tokenizer.encode("4")) == " 4"
    assert tokenizer.decode(tokenizer.encode_after(prompt, "4", "it")) == "4"


TURNS = (
    "{% for m in messages %}{{ '[a]' if m.role == 'user' else LEAD }}{{ m.content }}{% endfor %}"
)
SPACE, PLAIN = TURNS.replace("LEAD", "' '"), TURNS.replace("LEAD", "''")
NEVER = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + PLAIN


def read(tmp_path, tokenizer, lines, **settings):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = parse_config({**RAW, "vocab_size": tokenizer.fast.get_vocab_size()})

    class Implementation:
        pass

    Implementation.config = config
    model = Model(Implementation(), "none", tokenizer, (0,))
    given = SFTSettings(checkpoint="x", out="y", data=str(data), **settings)
    return read_samples(data, model, given)


RAW = {
    "model_type": "llama",
    "hidden_size": CONFIG.hidden_size,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def decoded(tokenizer, correct):
    prompt = tokenizer.fast.decode(correct.prompt)
    whole = [tokenizer.fast.decode([*correct.prompt, *said]) for said in correct.responses]
    assert all(said[-1] == 0 for said in correct.responses)
    return [text.removeprefix(prompt) for text in whole]


@pytest.mark.parametrize("name", ["byte level", *SPACED])
def test_a_file_is_learnt_as_it_is_written(tmp_path, name):
    tokenizer = MADE[name]
    line = {"prompt": "2+2=", "responses": ["4", "4 a", " 4"]}
    [correct] = read(tmp_path, tokenizer, [line])
    assert correct.prompt == tokenizer.encode("2+2=")
    assert decoded(tokenizer, correct) == ["4", "4 a", " 4"]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [(SPACE, [" 4", " a", " b", ""]), (PLAIN, ["4", "a", " b", ""]), (NEVER, ["4", "a", " b", ""])],
)
def test_in_a_chat_the_template_says_whether_a_space_leads(tmp_path, template, wanted):
    """`text` of a row leaves out the space that it begins with, so a file cannot show it."""
    tokenizer = Tokenizer(ALL["metaspace never"](), {"eos_token": "<eos>"}, template)
    llama = Tokenizer(ALL["llama 2"](), {"eos_token": "<eos>"}, template)
    line = {"prompt": "2+2=", "responses": ["4", "a", " b", ""]}
    [correct] = read(tmp_path, llama, [line])
    assert decoded(llama, correct) == wanted
    [correct] = read(tmp_path, tokenizer, [line])
    assert decoded(tokenizer, correct) == line["responses"]  # here a row's text shows it
    [correct] = read(tmp_path, llama, [line], raw=True)
    assert decoded(llama, correct) == line["responses"]


def test_what_cannot_be_said_is_refused_by_line_and_response(tmp_path):
    lines = [{"prompt": "2=", "responses": ["4", "4"]}, {"prompt": "2=", "responses": ["4", "4x"]}]
    with pytest.raises(BridgeError) as caught:
        read(tmp_path, MADE["no decoder"], lines)
    assert str(caught.value) == (
        f"{tmp_path / 'data.jsonl'}, line 2: response 1: '4x' would be learnt as ' <unk>', which "
        "is what tokenizer.json makes of it; mend the text, or leave it out"
    )
