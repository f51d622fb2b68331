"""Chat templates: as transformers renders them, however long the chat; a hostile one ends in time.

The templates in tests/data/chat are in the manner of the models that they are named after.
"""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import bridge.text.chat
from bridge.errors import BridgeError
from bridge.text.chat import render_chat

TEMPLATES = {path.stem: path.read_text() for path in Path(__file__).parent.glob("data/chat/*")}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def theirs():
    """What transformers makes of a template and messages."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)

    def render(template, messages):
        return fast.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )

    return render


def turns(*contents, system=None):
    """A chat: the user says the first, the assistant the second, and so on."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


THOUGHT = "<think>\nFirst, add.\n</think>\n\n 42 \n"
CHATS = {
    "a question": turns(" What is 6 * 7?\n"),
    "with a system message": turns("Hi", system="  Be brief. "),
    "several turns": turns("6 * 7?", THOUGHT, "And 7 * 7?", "49</think>49", "Thanks", system="S"),
    "an answer that goes on": turns("6 * 7?", THOUGHT),
    "signs and scripts": turns("<b>&amp; {{ x }} {% if %} '\"\\ \t\r\n", "日本 🦊 é ́\u2028", "x"),
    "keys without a value": [{"role": "user", "content": "a", "tool_calls": None, "name": "b"}],
    "nothing said": turns("", "", ""),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_as_in_transformers(name, chat, theirs):
    ours = render_chat(TEMPLATES[name], CHATS[chat], TOKENS)
    assert ours == theirs(TEMPLATES[name], CHATS[chat])
    assert CHATS[chat][0]["content"].strip() in ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_of_a_million_characters_is_rendered(name, theirs):
    said = "Lorem ipsum \U0001f98a dolor.\n" * 20
    thought = "<think>\n" + said + "</think>\n\n" + said
    for chat in (
        turns(said * 2500),
        turns("Hi", thought * 1250, "And then?"),
        turns(*[said, thought] * 800, "Why?"),
    ):
        assert sum(len(message["content"]) for message in chat) > 1_000_000
        text = render_chat(TEMPLATES[name], chat, TOKENS)
        # Not `==` in the assert: pytest would look for the differences of a million characters.
        same = text == theirs(TEMPLATES[name], chat)
        assert same


def test_a_loop_over_each_character_of_a_long_chat():
    template = "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
    text = "abcd" * 250_000
    assert (render_chat(template, turns(text), {}) == text) is True


def test_the_features_that_templates_use(theirs):
    template = (
        "{% macro shout(x) %}{{ x | upper ~ '!' }}{% endmacro %}{{ bos_token }}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ shout(m.role) }}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content.strip().split(' ') | join('_') }}{% endgeneration %}"
        "{% endfor %}{{ ns.n }}{{ '%s' | format('x') }}{{ '{}-{}'.format(1, 2) }}{{ '-' * 3 }}"
    )
    text = render_chat(template, MESSAGES, {"bos_token": "<s>"})
    assert text == theirs(template, MESSAGES)
    assert text == (
        '<s>SYSTEM!{"role": "system", "content": "Be brief."}'
        'USER!{"role": "user", "content": "Hi <b>"}Hi_<b>2x1-2---'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(indent=4) }}{{ 'é' | tojson(ensure_ascii=true) }}",
        "{{ messages | map(attribute='content') | map('length') | sum }}{{ messages | pprint }}",
        "{{ tools is none }}{{ documents is none }}{{ documents is defined }}{{ pad_token }}",
        "{{ '<b>x</b>' | striptags }}{{ 'a.example' | urlize }}{{ {'a': 1} | xmlattr }}",
        "{{ 1.25 | round(1) }}{{ 2 ** 10 }}{{ 7 // 2 * 3 }}{{ 'ab' * 2 }}{{ [1] * 2 }}",
    ],
)
def test_filters_take_what_they_take_in_transformers(template, theirs):
    assert render_chat(template, MESSAGES, TOKENS) == theirs(template, MESSAGES)


# What is refused. SHORT: seconds of processor time for what would take all that there are.

SHORT = 0.25
LOOP = "{% for i in range(99999) %}"
GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}" + LOOP
NEST = (
    "{% set ns = namespace(x=[], y=[]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
TUPLES = NEST.replace("=[]", "=()").replace("[ns.x, ns.x]", "(ns.x, ns.x)")
DEEP = (
    "{% set ns = namespace(x=[], y=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}"
)
HOSTILE = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by a filter": "{{ (messages | attr('__class__')).mro() }}",
    "attributes by a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop in itself": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "power": "{{ 9**9**9 }}",
    "powers by multiplication": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition of a list": "{{ [1] * 10**9 }}",
    "endless text": LOOP + "{{ 'a' * 9999 }}{% endfor %}",
    "a huge range": "{{ range(10**9) | list }}",
    "deep lists compared": DEEP + "{{ ns.x == ns.y }}",
    "deep lists printed": DEEP + "{{ ns.x }}",
    "deep lists in its own words": DEEP + "{{ raise_exception(ns.x) }}",
    "deep lists as JSON": DEEP + "{{ ns.x | tojson }}",
    "itself as JSON": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x | tojson }}",
    "a number of many digits": "{{ ('f' * 999999) | int(0, 16) }}",
    "loops that Python cannot nest": "{% for a in messages %}" * 25 + "{% endfor %}" * 25,
    "conditions that Python cannot nest": "{% if messages %}" * 150 + "{% endif %}" * 150,
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "negations": "{{ " + "not " * 30_000 + "1 }}",
    "a long template": "{{ 1 }}" * 40_000,
    "half a character": "{{ '\\ud800' }}",
    "lipsum": "{{ lipsum(99999) }}",
    "chance": "{{ [1, 2] | random }}",
    "syntax": "{% if %}",
    "missing": "{{ messages[9]['role'] }}",
    "its own words": "{{ raise_exception('roles must\nalternate') }}",
    "its own words, many": "{{ raise_exception('a' * 9999999) }}",
}
ENDLESS = {
    "nested loops": LOOP + LOOP + "{% endfor %}{% endfor %}",
    "work in each turn": "{% set x = 'a' * 9999999 %}" + LOOP + "{% if 'b' in x %}{% endif %}"
    "{% endfor %}",
    "lists of lists": NEST + "{{ ns.x }}",
    "lists of lists compared": NEST + "{{ ns.x == ns.y }}",
    "lists of lists looked for": NEST + "{{ ns.x in [ns.y] }}",
    "lists of lists sorted": NEST + "{{ [ns.x, ns.y] | sort }}",
    "lists of lists hashed": TUPLES + "{% if {ns.x: 1} %}{% endif %}",
    "lists of lists as JSON": NEST + "{{ ns.x | tojson }}",
    "lists of lists in its own words": NEST + "{{ raise_exception(ns.x) }}",
    "many places": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "many slices": "{{ [1] | slice(10**9) | list }}",
    "sorting": "{{ ((range(99999) | list) * 99) | map('string') | sort }}",
    "lists added one by one": "{{ range(99999) | map('string') | map('list') | sum(start=[]) }}",
    "a quadratic filter": "{{ ('www.' * 999999) | urlize | length }}",
    "division": "{{ (('f' * 9999999) | int(0, 16)) // (('e' * 4999999) | int(0, 16)) }}",
    "macros two by two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a template that is hard to read": "{{ messages" + ".a" * 60_000 + " }}",
}
BOMBS = {
    "filter width": "{{ 'a' | center(10**9) }}",
    "method width": "{{ 'a'.ljust(10**9) }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "percent format with a star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000d}'.format(1) }}",
    "format within a format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "decimal places": "{{ '%.1000000000f' % 1.5 }}",
    "tabs": "{{ '\t'.expandtabs(2000000000) }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "addition": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replacement": "{{ 'aaa' | replace('', 'a' * 99999) | replace('', 'a' * 99999) }}",
    "join": "{{ ('a' * 999999) | list | join('b' * 999999) }}",
    "a list of one long text": "{{ ''.join(['a' * 9999999] * 9999) }}",
    "items one by one": "{{ (['a' * 999999] * 9999) | map('upper') | join }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "lists of ranges": "{% set ns = namespace(x=[]) %}" + LOOP + "{% set ns.x = [ns.x, "
    "range(99999) | list] %}{% endfor %}",
    "a block that is set": "{% set x %}" + LOOP + "{{ 'a' * 99999 }}{% endfor %}{% endset %}",
}


def refusal(template, **limits):
    """The reason that a template is refused for."""
    with pytest.raises(BridgeError) as caught:
        render_chat(template, MESSAGES, {}, **limits)
    message = str(caught.value)
    before, after = "tokenizer_config.json: chat_template fails: ", "; try a raw prompt"
    assert message.startswith(before) and message.endswith(after)
    assert message.isprintable() and len(message) < 300
    return message.removeprefix(before).removesuffix(after)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_templates_get_one_line(name):
    assert "seconds" not in refusal(HOSTILE[name])
    assert render_chat(CHATML, MESSAGES, {}).startswith("<|im_start|>system\nBe brief.")


@pytest.mark.parametrize("name", ENDLESS)
def test_what_takes_for_ever_is_ended(name):
    reason = refusal(ENDLESS[name], seconds=SHORT)
    assert reason == f"it takes more than {SHORT} s of processor time"


@pytest.mark.parametrize("name", BOMBS)
def test_what_takes_all_the_memory_is_ended(name, monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setattr(bridge.text.chat, "MEMORY", 1 << 27)
        bridge.text.chat.renderer.close()  # the next process has this limit
        assert refusal(BOMBS[name], seconds=60.0) == "it takes more than 128 MB of memory"
        bridge.text.chat.renderer.close()
    else:
        assert refusal(BOMBS[name], seconds=SHORT).startswith("it takes more than ")


def test_what_breaks_the_interpreter_breaks_its_own():
    """Python hashes tuples within tuples on the stack, as deep as they go."""
    deep = "{% for i in range(9999) %}{% set ns.x = " + "(" * 40 + "ns.x" + ",)" * 40 + " %}"
    template = "{% set ns = namespace(x=()) %}" + deep + "{% endfor %}"
    bridge.text.chat.renderer.close()
    assert refusal(template + "{% if {ns.x: 1} %}{% endif %}", seconds=60.0) in (
        "it killed its process (SIGSEGV)",
        "it killed its process (SIGBUS)",
        f"it takes more than {bridge.text.chat.MEMORY >> 20} MB of memory",
    )
    assert render_chat(CHATML, MESSAGES, {}).endswith("assistant\n")
