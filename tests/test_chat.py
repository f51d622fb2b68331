"""Chat templates: Hugging Face's conventions work; a hostile one neither escapes nor hangs."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bridge.chat import render_chat
from bridge.errors import BridgeError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chatml_renders_as_in_transformers():
    ours = render_chat(CHATML, MESSAGES, {})
    theirs, _ = render_jinja_template([MESSAGES], chat_template=CHATML, add_generation_prompt=True)
    assert ours == theirs[0]
    assert ours.endswith("<|im_start|>assistant\n")


def test_the_features_that_templates_use():
    template = (
        "{% macro shout(x) %}{{ x | upper ~ '!' }}{% endmacro %}{{ bos_token }}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ shout(m.role) }}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content.strip().split(' ') | join('_') }}{% endgeneration %}"
        "{% endfor %}{{ ns.n }}{{ '%s' | format('x') }}{{ '{}-{}'.format(1, 2) }}{{ '-' * 3 }}"
    )
    assert render_chat(template, MESSAGES, {"bos_token": "<s>"}) == (
        '<s>SYSTEM!{"role": "system", "content": "Be brief."}'
        'USER!{"role": "user", "content": "Hi <b>"}Hi_<b>2x1-2---'
    )


def test_a_long_conversation_is_not_refused():
    messages = [{"role": "user", "content": "x" * 50_000}] * 20
    assert len(render_chat(CHATML, messages, {})) > 1_000_000


GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}"
HOSTILE = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "nested loops": "{% for a in 'a' * 9999 %}{% for b in 'a' * 9999 %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "power": "{{ 9**9**9 }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition of a list": "{{ [1] * 10**9 }}",
    "filter width": "{{ 'a' | center(10**9) }}",
    "method width": "{{ 'a'.ljust(10**9) }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:1000000000d}'.format(1) }}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "addition": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replacement": "{{ 'aaa' | replace('', 'a' * 99999) | replace('', 'a' * 99999) }}",
    "join": "{{ ('a' * 999999) | list | join('b' * 999999) }}",
    "endless text": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "a list of one long text": "{{ ''.join(['a' * 9999999] * 9999) }}",
    "items one by one": "{{ (['a' * 999999] * 9999) | map('upper') | join }}",
    "lists of lists": "{% set ns = namespace(x=[]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "powers by multiplication": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "work in each turn": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}"
    "{% if 'b' in x %}{% endif %}{% endfor %}",
    "loops that Python cannot nest": "{% for a in messages %}" * 25 + "{% endfor %}" * 25,
    "conditions that Python cannot nest": "{% if messages %}" * 150 + "{% endif %}" * 150,
    "half a character": "{{ '\\ud800' }}",
    "lipsum": "{{ lipsum(99999) }}",
    "syntax": "{% if %}",
    "missing": "{{ messages[9]['role'] }}",
    "its own words": "{{ raise_exception('roles must\nalternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_templates_get_one_line(name, monkeypatch):
    if name == "work in each turn":  # which takes all the time there is
        monkeypatch.setattr("bridge.chat.MAX_SECONDS", 0.5)
    with pytest.raises(BridgeError) as caught:
        render_chat(HOSTILE[name], MESSAGES, {})
    message = str(caught.value)
    assert message.startswith("tokenizer_config.json: chat_template fails: ")
    assert "\n" not in message and len(message) < 300
