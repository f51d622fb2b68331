"""The process that renders chats: one for all, which sees nothing of us and ends with us."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_rewards import PATIENCE, alive, wait_for

import bridge.text.chat
from bridge.errors import BridgeError
from bridge.processes.parent import ChildLost
from bridge.text.chat import render_chat, renderer, watch

SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}{{ x }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def process() -> int:
    """The number of the process that renders."""
    assert render_chat(SAYS, says("here"), {}) == "here"
    assert renderer.child is not None
    return renderer.child.process.pid


def test_one_process_renders_all_and_no_template_sees_another():
    first = process()
    writes = (
        "{% set x = 'kept' %}{% set ns = namespace(x='kept') %}{% macro m() %}kept{% endmacro %}"
        "{% for m in messages %}{% set x = 'kept' %}{% endfor %}{% block b %}kept{% endblock %}"
        "{% set c = cycler('a', 'b') %}{{ c.next() }}"
    )
    reads = "{{ x }}{{ ns }}{{ m }}{{ c }}{{ bos_token }}{{ messages | length }}"
    assert render_chat(writes, says("a") * 3, {"bos_token": "<s>"}) == "kepta"
    assert render_chat(reads, says("b"), {}) == "1"
    assert render_chat(writes, says("a"), {"x": "given"}) == "kepta"
    assert render_chat(SAYS, says("a"), {"x": "given"}) == "agiven"
    assert render_chat(SAYS, says("a"), {}) == "a"
    assert process() == first


def test_it_imports_jinja_and_little_else():
    pid = process()
    if sys.platform == "linux":
        held = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" not in held and "tokenizers" not in held and "torch" not in held
    code = (
        "import sys; from bridge.text.chat import render_chat; "
        "assert 'jinja2' not in sys.modules; print(render_chat('{{ 1 + 1 }}', [], {}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_nothing_of_the_working_directory_runs(tmp_path):
    for name in ("json", "jinja2", "bridge", "signal"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(9)")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "from bridge.text.chat import render_chat\nprint(render_chat('fine', [], {}))"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_from_many_threads_each_gets_its_own_text():
    def one(number: int) -> bool:
        text = f"{number} " * (1 + number % 7 * 1000)
        if number % 50 == 0:
            with pytest.raises(BridgeError, match="processor time"):
                render_chat(ENDLESS, [], {}, seconds=0.05)
        return render_chat(SAYS, says(text), {"x": str(number)}) == f"{text}{number}"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))


def test_one_that_was_killed_is_replaced():
    first = process()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not alive(first))
    second = process()
    assert second != first


def test_one_that_does_not_answer_is_ended_by_the_clock(monkeypatch):
    first = process()
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(bridge.text.chat, "WAIT", 0.1)
    with pytest.raises(BridgeError, match=r"chat_template fails: it took more than 0\.1 s; try"):
        render_chat(SAYS, says("a"), {})
    monkeypatch.undo()
    assert not alive(first)
    assert process() != first


def test_memory_is_looked_at_where_the_system_does_not_limit_it(monkeypatch):
    holds = "{% set ns = namespace(x=[]) %}{% for i in range(20) %}{% set ns.x = [ns.x, "
    holds += "range(99999) | list] %}{% endfor %}" + ENDLESS
    renderer.close()
    first, child = process(), renderer.child
    assert child is not None
    child.begin(json.dumps([PATIENCE, holds, [], {}]).encode(), PATIENCE)
    monkeypatch.setattr(bridge.text.chat, "MEMORY", 1 << 26)
    with pytest.raises(ChildLost, match="takes more than 64 MB of memory"):
        watch(child)
    assert child.closed and not alive(first)
    text, child = says("a"), bridge.text.chat.start()
    child.begin(json.dumps([PATIENCE, SAYS, text, {}]).encode(), PATIENCE)
    watch(child)
    assert child.take() == b"=a"
    child.close()


@pytest.mark.usefixtures("no_collection")
def test_ctrl_c_within_a_chat_leaves_one_that_works():
    here, first = threading.get_ident(), process()

    def press():
        wait_for(renderer.lock.locked)
        signal.pthread_kill(here, signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    with pytest.raises(KeyboardInterrupt):
        presser.start()
        render_chat(ENDLESS, [], {}, seconds=PATIENCE)
    presser.join()
    assert process() != first  # which gets the answer to its own question


FORKS = """
import os
from bridge.text.chat import render_chat
print(render_chat("{{ x }}", [], {"x": "before"}), flush=True)
if os.fork() == 0:
    print(render_chat("{{ x }}", [], {"x": "fork"}), flush=True)
    raise SystemExit
os.wait()
print(render_chat("{{ x }}", [], {"x": "after"}), flush=True)
"""


def test_a_fork_of_ours_has_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\nfork\nafter\n", "")


ENDS = """
import sys, threading
from bridge.text.chat import render_chat, renderer
render_chat("", [], {})
open(sys.argv[1], "w").write(f"{renderer.child.process.pid} ")
if sys.argv[2] == "within":
    render_chat(sys.argv[3], [], {}, seconds=1000)
"""


@pytest.mark.parametrize(
    ("when", "how"),
    [("after", None), ("within", signal.SIGINT), ("within", signal.SIGKILL)],
)
def test_it_ends_with_us(tmp_path, when, how):
    note = tmp_path / "pid"
    command = [sys.executable, "-c", ENDS, str(note), when, ENDLESS]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: note.exists() and note.read_text().endswith(" "))
        pid = int(note.read_text())
        if how is not None:
            assert alive(pid)
            os.killpg(run.pid, how)  # as a terminal does
        run.communicate(timeout=PATIENCE)
        wait_for(lambda: not alive(pid))
    finally:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("error", [PermissionError(1, "no"), ValueError("pass_fds not supported")])
def test_where_no_process_can_be_started_a_line_says_so(monkeypatch, error):
    def refuse(*_: object, **__: object):
        raise error

    renderer.close()
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(BridgeError) as caught:
        render_chat(SAYS, says("a"), {})
    assert str(caught.value) == (
        "tokenizer_config.json: a process for chat_template cannot be started "
        f"({error}); try a raw prompt"
    )
    monkeypatch.undo()
    process()


def test_where_it_cannot_import_what_it_needs_a_line_says_so(monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    renderer.close()
    with pytest.raises(BridgeError) as caught:
        render_chat(SAYS, says("a"), {})
    assert str(caught.value) == (
        "tokenizer_config.json: chat_template fails to load: ImportError: broken; try a raw prompt"
    )
    monkeypatch.undo()
    process()


def test_what_is_no_chat_is_refused(monkeypatch):
    loop: list[object] = []
    loop.append(loop)
    for value in (object(), {1, 2}, b"a", loop):
        with pytest.raises(BridgeError, match=r"^messages: hold what is no JSON"):
            render_chat(SAYS, [{"role": "user", "content": value}], {})  # pyright: ignore
    with pytest.raises(BridgeError, match=r"^messages: each must be an object with role and"):
        render_chat(SAYS, ["a"], {})  # pyright: ignore
    monkeypatch.setattr(bridge.text.chat, "MOST", 1 << 20)
    with pytest.raises(BridgeError, match=r"^messages: are longer than 1 MB"):
        render_chat(SAYS, says("a" * (1 << 20)), {})
    with pytest.raises(BridgeError, match="surrogates not allowed"):
        render_chat(SAYS, says("\ud800"), {})
