"""`bridge bench --peers`: what is planned, done and shown, of an engine that computes nothing.

No figure of this machine is asserted: the fake engine makes its own up, and they are known.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_host import write_host
from typer.testing import CliRunner

from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import open_checkpoint
from bridge.config import parse_config
from bridge.errors import BridgeError
from bridge.evaluation.peers import limit, measure
from bridge.evaluation.peers import plan as planning
from bridge.evaluation.peers.engine import Call, Decoded, Entry
from bridge.evaluation.peers.limit import Limit, step_parameters
from bridge.evaluation.peers.measure import run
from bridge.evaluation.peers.plan import PEERS, Peer, Plan, plan
from bridge.evaluation.peers.results import Found, Results, Seconds, Workload
from bridge.registry import BackendInfo
from bridge_cli.main import app

FAKE = Peer(
    "fake_peer",
    ("numpy",),
    ("float32", "bfloat16", "float16", "float64", "int8", "int4"),
    ("float32", "bfloat16"),
    prepares=True,
)
BACKENDS = [
    BackendInfo("torch", True, ["cpu"], {"cpu": ["float32", "bfloat16"]}),
    BackendInfo("jax", True, ["cpu"], {"cpu": ["float32", "bfloat16"]}),
    BackendInfo("numpy", True, ["cpu"], {"cpu": ["float64", "float32"]}),
    BackendInfo("mlx", False, problem="backend 'mlx' cannot be imported; try: pip install it"),
]


class FakeRates:
    """A machine of round numbers."""

    def __init__(self, device, threads):
        self.looks = 0

    def look(self):
        return Limit(bandwidth=1e6, rate=8e6)

    def close(self):
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("peers")
    init(write_host(out / "host"), out / "bridge", heads=2, head_dim=4)
    return out / "bridge"


@pytest.fixture
def fake(monkeypatch):
    """The only peer is the fake one, on a machine of round numbers."""
    for name in list(PEERS):
        monkeypatch.delitem(PEERS, name)
    monkeypatch.setitem(PEERS, "fake", FAKE)
    monkeypatch.setitem(PEERS, "gone", replace(FAKE, needs=("no_such_module",)))
    monkeypatch.setattr(measure, "Rates", FakeRates)
    monkeypatch.setattr(measure, "SETTLE", 0.0)


def fakes(*weights):
    entries = [Entry("fake", w, False, "fake_peer", "numpy", prepares=True) for w in weights]
    return Plan(entries, [])


@pytest.fixture
def narrow(monkeypatch):
    """Of the backends, torch makes integers of 8 bits on CPUs."""

    def able(backend, device):
        return ["int8"] * (backend + device == "torchcpu")

    monkeypatch.setattr(planning, "find_backend", lambda name: name)
    monkeypatch.setattr(planning, "weights_of", able)


def labels(planned):
    return [entry.label for entry in planned.entries]


def test_the_best_backend_shows_all_it_can_and_others_their_first(narrow):
    planned = plan(BACKENDS, "cpu", peers={})
    assert labels(planned) == [
        "bridge torch, float32, blocks",
        "bridge torch, float32",
        "bridge torch, bfloat16, blocks",
        "bridge torch, int8, blocks",
        "bridge jax, float32, blocks",
    ]
    assert [(a.name, a.why) for a in planned.absent] == [("bridge mlx", BACKENDS[3].problem)]
    host = plan(BACKENDS, "cpu", blocks=False, engines=["numpy"], peers={})
    assert labels(host) == ["bridge numpy, float32"]


def test_engines_and_weights_by_name(narrow):
    def planned(engines, weights):
        return labels(plan(BACKENDS, "cpu", engines=engines, weights=weights, peers={"Fake": FAKE}))

    assert planned(["fake", "JAX"], ["bfloat16"]) == [
        "bridge jax, bfloat16, blocks",
        "Fake, bfloat16",
    ]
    assert planned(["torch", "jax"], ["int8"]) == ["bridge torch, int8, blocks"]
    assert planned(["fake"], ["int8", "float32"]) == ["Fake, int8", "Fake, float32"]
    assert planned(["fake"], []) == ["Fake, float32", "Fake, bfloat16"]


def test_what_cannot_be_measured_is_told(narrow):
    gone = replace(FAKE, needs=("numpy", "no_such_module"))
    planned = plan(BACKENDS, "cpu", peers={"gone": gone})
    mend = "not installed (no_such_module is missing): pip install 'bridge-llm[peers]'"
    assert ("gone", mend) in [(absent.name, absent.why) for absent in planned.absent]
    on_gpu = [BackendInfo("torch", True, ["cuda:0", "cpu"], {"cuda:0": ["float32"]}), BACKENDS[1]]
    planned = plan(on_gpu, "cuda:0", peers={"fake": FAKE})
    assert labels(planned) == ["bridge torch, float32, blocks", "bridge torch, float32"]
    told = {absent.name: absent.why for absent in planned.absent}
    assert told == {"bridge jax": "does not run on cuda", "fake": "is not measured on cuda"}


@pytest.mark.parametrize(
    "named,message",
    [
        ({"engines": ["vroom"]}, "engine 'vroom' is not known; use some of torch, jax"),
        ({"weights": ["int7"]}, "dtype 'int7' is not known"),
        ({"engines": ["mlx"]}, "there is nothing to measure .*pip install it"),
        ({"engines": ["jax"], "weights": ["float64"]}, "no engine has such weights"),
    ],
)
def test_what_is_not_there_is_refused(narrow, named, message):
    with pytest.raises(BridgeError, match=message):
        plan(BACKENDS, "cpu", peers={"fake": FAKE}, **named)


def test_a_step_waits_for_the_memory_or_for_the_arithmetic():
    machine = Limit(bandwidth=4e9, rate=32e9)
    assert machine.tokens_per_second(10**9, 1) == 1.0  # 4e9 bytes, a second
    assert machine.tokens_per_second(10**9, 16) == 16.0  # where the two meet
    assert machine.tokens_per_second(10**9, 32) == 16.0
    assert machine.tokens_per_second(10**9, 1, size=2) == 2.0


def test_what_a_step_multiplies_by():
    raw = {"model_type": "llama", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 2 * 4
    for tied in (True, False):  # either way one matrix of the vocabulary
        config = parse_config({**raw, "tie_word_embeddings": tied})
        assert step_parameters(config) == layer + 4 + 10 * 4


def test_a_machine_is_measured(monkeypatch):
    monkeypatch.setattr(limit, "ARRAY", 2**16)
    monkeypatch.setattr(limit, "SIDE", 32)
    monkeypatch.setattr(limit, "SECONDS", 0.001)
    assert all(rate > 0 for rate in limit.measure("cpu").values())
    read, multiply = limit._by_numpy()
    assert read() == 2**14 and multiply().sum() == 32**3


def test_figures_are_medians_of_decoding_alone():
    found = Found(Entry("fake", "float32", False, "fake_peer", "numpy"), "1")
    found.new[4] = 11
    found.seconds[4] = [Seconds(1.0, 3.0), Seconds(5.0, 6.0), Seconds(2.0, 7.0)]
    assert found.tokens_per_second(4) == 4 * 10 / 2.0
    assert found.first_token(4) == 2.0
    assert found.tokens_per_second(8) is None and found.first_token(8) is None
    found.seconds[4] = [Seconds(2.0, 2.0)]
    assert found.tokens_per_second(4) is None


def test_an_engine_with_another_model_is_seen():
    results = Results(Workload(), 1, [])
    for name, backend, weights, likeliest in (
        ("bridge torch", "torch", "float32", [3, 1, 4, 1]),
        ("good", "", "float32", [3, 1, 4, 1]),
        ("other", "", "float32", [3, 1, 5, 1]),
        ("silent", "", "float32", []),
        ("narrow", "", "int8", [2, 7]),
    ):
        entry = Entry(name, weights, False, "fake_peer", "numpy", backend)
        results.found.append(Found(entry, "1", likeliest=likeliest))
    assert results.doubts() == {"other, float32": 2}


def test_what_was_not_asked_for_is_no_answer():
    call = Call((1, 2), width=2, new=3)
    Decoded(0.0, 1.0, [[1, 2, 3], [4, 5, 6]]).check(call)
    for tokens in ([[1, 2, 3]], [[1, 2, 3], [4, 5]]):
        with pytest.raises(RuntimeError, match="asked for 2 rows of 3 tokens"):
            Decoded(0.0, 1.0, tokens).check(call)


def test_engines_are_measured_in_processes_of_their_own(checkpoint, fake):
    heard = []
    work = Workload(widths=(1, 4), new=5, prompt_tokens=3, rounds=2, threads=1)
    results = run(
        open_checkpoint(checkpoint), fakes("float32", "bfloat16"), "cpu", work, heard.append
    )
    one, other = results.found
    assert [one.tokens_per_second(w) for w in (1, 4)] == [2.0, 2.0]
    assert [other.tokens_per_second(w) for w in (1, 4)] == [4.0, 4.0]
    assert one.first_token(4) == 1.0 and len(one.seconds[4]) == 2
    assert one.likeliest == [1] * 5  # which are the threads that it was given
    assert results.failed == [] and results.limit == Limit(1e6, 8e6)
    # 16 wide, 24 between, 3 layers, 8 of keys and values, 257 words, not tied
    layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16
    assert results.parameters == 3 * layer + 16 + 257 * 16
    assert results.bound(1) == pytest.approx(1e6 / (4 * results.parameters))
    turns = [text for text in heard if text.startswith("round")]
    assert turns[0] == "round 1 of 2, width 1, fake, float32"
    assert turns[4] == "round 2 of 2, width 1, fake, bfloat16"  # in turn, and the other way round


def test_what_is_slow_is_cut_short_and_what_is_slower_left_out(checkpoint, fake):
    work = Workload(widths=(1, 4), new=50, prompt_tokens=3, rounds=1, seconds=100.0)
    [found] = run(open_checkpoint(checkpoint), fakes("int8"), "cpu", work).found
    assert found.new == {1: 4}  # 1 s, and three times 30 s
    assert found.tokens_per_second(1) == pytest.approx(1 / 30)
    assert found.left_out == {4: "121 s for two tokens at width 4"}
    work = replace(work, seconds=50.0)  # of which two tokens of one row take more than half
    [found] = run(open_checkpoint(checkpoint), fakes("int8"), "cpu", work).found
    assert found.new == {1: 2} and found.left_out == {4: "31 s for two tokens at width 1"}


def test_what_fails_is_told_and_the_others_go_on(checkpoint, fake):
    work = Workload(widths=(1, 4), new=4, prompt_tokens=3, rounds=1)
    planned = fakes("float16", "int4", "float64", "float32")
    planned.entries.append(Entry("lost", "float32", False, "no_such_engine", "no-such"))
    results = run(open_checkpoint(checkpoint), planned, "cpu", work)
    assert {failed.name: failed.why for failed in results.failed} == {
        "lost, float32": "ModuleNotFoundError: No module named 'no_such_engine'",
        "fake, float16, width 4": "RuntimeError: out of fakes",
        "fake, int4, width 4": "it ended its process (exit status 3)",
        "fake, float64, width 4": "RuntimeError: asked for 4 rows of 4 tokens, it gave 3 of [4]",
    }
    rates = {f.entry.weights: [f.tokens_per_second(w) for w in (1, 4)] for f in results.found}
    assert rates["float32"] == [2.0, 2.0] and rates["float16"] == [2.0, None]
    assert rates["int4"] == [None, None]  # it was gone when the rounds began


def test_what_no_machine_like_this_holds_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("bridge.numbers.machine.machine_memory", lambda: 1000)
    with pytest.raises(BridgeError, match=r"memory: 2 engines at once need .*--dtypes"):
        run(open_checkpoint(checkpoint), fakes("float32", "int8"), "cpu", Workload())


SMALL = ("--widths", "4,1", "--new", "4", "--prompt-tokens", "3", "--rounds", "1", "--threads", "1")


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_as_tables_and_a_plot(checkpoint, fake, tmp_path):
    done = invoke(
        checkpoint, "--peers", "--engines", "fake,gone", *SMALL, "--plot", tmp_path / "p.png"
    )
    assert done.exit_code == 0, done.output
    version = re.escape(np.__version__)
    for weights, rates in (("float32", "2 +2"), ("bfloat16", "4 +4")):
        assert re.search(rf"fake {version} +{weights} +no +{rates}\n", done.stdout)
    assert re.search(r"what the machine allows +float32 +no +\d+ +\d+\n", done.stdout)
    assert re.search(rf"fake {version} +float32 +no +1000 +1000\n", done.stdout)
    assert "4 new tokens a row; medians of 1, in turn; threads of each: 1; on" in done.stdout
    assert "memory is read at 0.0 GB/s" in done.stdout
    mend = "not installed (no_such_module is missing): pip install 'bridge-llm[peers]'"
    assert f"not measured: gone: {mend}" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_for_machines(checkpoint, fake, tmp_path):
    drawn, saved = tmp_path / "p.svg", tmp_path / "p.json"
    done = invoke(
        *(checkpoint, "--peers", "--engines", "fake", "--dtypes", "float32,int8", *SMALL),
        *("--seconds", "40", "--json", "--plot", drawn, "--save", saved),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(saved.read_text())
    assert found["workload"]["widths"] == [1, 4] and found["machine"]["threads"] == 1
    assert found["machine"]["device"] and found["limit"]["rate"] == 8e6
    assert found["limit"]["float32_tokens_per_second"]["4"] > 0
    one, slow = found["engines"]
    assert (one["name"], one["weights"], one["blocks"]) == ("fake", "float32", False)
    assert one["version"] == np.__version__ and one["widths"]["4"]["tokens_per_second"] == 2.0
    assert one["widths"]["1"]["seconds"] == [{"first": 1.0, "all": 2.5}]
    assert slow["widths"]["1"]["new"] == 2 and list(slow["left_out"]) == ["4"]
    text = drawn.read_text()
    assert "<svg" in text
    again = invoke(checkpoint, "--peers", "--engines", "fake", *SMALL, "--save", saved)
    assert again.exit_code == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    "options,message",
    [
        (("--widths", "1"), "--widths: only with --peers"),
        (("--peers", "--figures", "train"), "--figures: not with --peers"),
        (("--peers", "--widths", "1,x"), "widths must be an integer"),
        (("--peers", "--widths", ","), "widths: name some"),
        (("--peers", "--new", "1"), "new must be 2 or above"),
        (("--peers", "--threads", "0"), "threads must be 1 or above"),
        (("--peers", "--new", "200000"), "prompt_tokens and new go past the context of 200000"),
        (("--peers", "--plot", "p.gif"), "p.gif: name a .png or a .svg file"),
        (("--peers", "--save", "nowhere/p.json"), "nowhere: no such directory"),
        (("--peers", "--engines", "vroom"), "engine 'vroom' is not known"),
    ],
)
def test_it_says_what_to_mend(checkpoint, options, message):
    done = invoke(checkpoint, *options)
    assert done.exit_code == 2 and message in done.stderr, done.output
