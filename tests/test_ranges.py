"""Numbers that users give: each has a range, the same at every entrance, and is refused in one line
before anything is loaded; and what a machine cannot hold is refused with the figures.

The options are found by walking the command line, so a new one without a range fails here.
"""

import inspect
import json
import re
from dataclasses import fields, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from training_stops import run, toy_run
from training_toys import Graded, write_model
from typer.testing import CliRunner

import bridge
from bridge.checkpoints.conversion import parse_size
from bridge.checkpoints.initialise import init, parse_layers
from bridge.checkpoints.reading import open_checkpoint
from bridge.config.sizes import cache_bytes, prefill_bytes, step_bytes, token_bytes
from bridge.contract import SFT, AdamW, Sampling
from bridge.decoding.requests import check_sampling, row_length
from bridge.errors import BridgeError
from bridge.evaluation.batches import Decoding
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.speed import Workload
from bridge.numbers.machine import available_memory, check_memory, machine_memory
from bridge.numbers.ranges import RANGES, take
from bridge.tasks import Scorer
from bridge.tasks.matching import check_match
from bridge.tasks.problem import check_threshold
from bridge.training import read_settings
from bridge.training.settings import CHOICES, KINDS, range_of
from bridge_cli import train
from bridge_cli.main import app
from bridge_cli.options import Ranged, read_task_options

pytestmark = pytest.mark.usefixtures("one_thread")

TRIED = ["1" + "0" * 20, "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 5000, "x", "", "1_0"]
# What each command needs before its options; of files, none is there, so nothing can be loaded.
NEEDED = {
    "init": ("nowhere", "made"),
    "generate": ("./nowhere", "hi"),
    "demo": (),
    "convert": ("nowhere", "made", "--to", "mlx"),
    "inspect": ("nowhere",),
    "conformance": ("--backend", "nowhere"),
    "agree": ("nowhere", "hi"),
    "bench": ("nowhere",),
    "eval": ("nowhere", "--task", "nowhere"),
    "train sft": ("nowhere", "--out", "made", "--task", "nowhere"),
    "train grpo": ("nowhere", "--out", "made", "--task", "nowhere"),
}


def commands() -> dict[str, Any]:
    """The function of each command."""
    made = app.registered_commands
    found = {c.name or str(getattr(c.callback, "__name__", "")): c.callback for c in made}
    return {**found, **{f"train {kind}": train.command(kind) for kind in KINDS}}


def numeric(function: Any) -> list[tuple[str, Any, Any]]:
    """The parameters that are numbers: name, type, and what typer is told."""
    found = []
    for name, hint in get_type_hints(function, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, option = get_args(hint)
            kinds = {
                kind,
                *get_args(kind),
                *(k for inner in get_args(kind) for k in get_args(inner)),
            }
            if kinds & {int, float}:
                found.append((name, int if int in kinds else float, option))
    return found


OPTIONS = [(c, *rest) for c, function in commands().items() for rest in numeric(function)]


def test_the_walk_finds_the_options():
    names = {(command, name) for command, name, _, _ in OPTIONS}
    wanted = [
        ("generate", "width"),
        ("train grpo", "lr"),
        ("train sft", "betas"),
        ("bench", "rounds"),
    ]
    assert {*wanted, ("demo", "show"), ("inspect", "layer")} <= names and len(names) > 80
    assert set(commands()) == {*NEEDED, "backends"}


@pytest.mark.parametrize("command, name, kind, option", OPTIONS, ids=lambda x: str(x)[:30])
def test_every_numeric_option_has_a_range_of_its_kind(command, name, kind, option):
    assert isinstance(option.parser, Ranged), f"{command}: {name} takes any number; see options.py"
    assert RANGES[option.parser.name].kind is kind
    for text in TRIED:
        try:
            value = option.parser(text)
        except BridgeError as error:
            said = str(error)
            assert said.startswith(f"{name} must be ") and "\n" not in said and len(said) < 400
        else:
            assert type(value) is kind and RANGES[option.parser.name].has(value)
            assert value == kind(text)  # and not something near it
    assert not RANGES[option.parser.name].has(float("nan"))
    default = inspect.signature(commands()[command]).parameters[name].default
    if default is not None and not isinstance(default, tuple):
        assert option.parser(default) == default


@pytest.mark.parametrize("command", NEEDED)
def test_a_number_out_of_range_is_refused_before_all_else(command, tmp_path, monkeypatch):
    """One line, though the checkpoint is not there either."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for name, _, option in numeric(commands()[command]):
        wrong = "nan" if RANGES[option.parser.name].kind is float else "1" + "0" * 20
        given = (wrong, "0.5") if name == "betas" else (wrong,)
        flag = f"--{name.replace('_', '-')}"
        ran = runner.invoke(app, [*command.split(), *NEEDED[command], flag, *given])
        assert ran.exit_code == 2, (command, name, ran.output, ran.exception)
        assert re.fullmatch(f"error: {name} must be [^\n]+\n", ran.stderr), ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_widths_by_commas(tmp_path):
    for text, said in {
        "1,100000000000000000000": "width must be at most 65536",
        "1,nan": "--width must be numbers from 1 on",
        "0": "--width must be numbers from 1 on",
        "9" * 5000: "--width must be numbers from 1 on",
        "": "--width must be numbers from 1 on",
    }.items():
        ran = CliRunner().invoke(app, ["eval", "nowhere", "--task", "x", "--width", text])
        assert ran.exit_code == 2 and ran.stderr.startswith(f"error: {said}"), ran.stderr
        assert ran.stderr.count("\n") == 1 and len(ran.stderr) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_settings_from_a_file_have_the_same_ranges(kind):
    given = {"checkpoint": "c", "out": "o", "task": "t"}
    hints = get_type_hints(KINDS[kind])
    tried = [10**20, -1, 0, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 0.5]
    count = 0
    for f in fields(KINDS[kind]):
        kinds = {hints[f.name], *get_args(hints[f.name])}
        if not kinds & {int, float} or f.metadata["valid"] in CHOICES:
            continue
        count += 1
        known = RANGES[range_of(f)]
        for value in tried:
            try:
                settings = read_settings(kind, {**given, f.name: value}, "run.toml")
            except BridgeError as error:
                assert str(error).startswith(f"run.toml: {f.name} must be "), (f.name, value)
                fits = known.has(value) and (known.kind is float or type(value) is int)
                assert not fits or f.name == "minibatches", (f.name, value)
            else:
                assert known.has(getattr(settings, f.name)) and getattr(settings, f.name) == value
    assert count > 20


def test_a_range_at_its_ends():
    for name, low, high in [
        ("width", 1, 65536),
        ("seed", 0, 2**64 - 1),
        ("train.width", 2, 65536),
        ("eval.groups", 1, 4096),
        ("temperature", 0.0, 1e6),
        ("min_p", 0.0, 1.0),
    ]:
        assert take(name, low) == low and take(name, high) == high
        for beyond in (low - 1, high + 1):
            with pytest.raises(BridgeError, match=f"^{name.rpartition('.')[2]} must be "):
                take(name, beyond)
    assert take("top_p", 1) == 1.0 and type(take("top_p", 1)) is float
    for value in (0, 0.0, np.float32(0), 1.0000001):
        with pytest.raises(BridgeError, match=r"top_p must be in \(0, 1\], not"):
            take("top_p", value)
    with pytest.raises(BridgeError, match=r"lr_end must be in \[0, 1\], not 2$"):
        take("lr_end", 2)
    with pytest.raises(BridgeError, match=r"eps_low must be in \[0, 1\), not 1$"):
        take("eps_low", 1)


def test_what_a_message_says_of_the_end_that_is_passed():
    for name, value, said in [
        ("width", 0, "width must be 1 or above, not 0"),
        ("width", 65537, "width must be at most 65536, not 65537"),
        ("width", 2.5, "width must be 1 or above, not 2.5"),
        ("width", True, "width must be 1 or above, not True"),
        ("lr", 0, "lr must be above 0, not 0"),
        ("lr", 1e-40, "lr must be at least 1e-30, not 1e-40"),
        ("lr", 1e40, "lr must be at most 1e+30, not 1e+40"),
        ("seed", 2**64, "seed must be in 0..2^64-1, not 18446744073709551616"),
        ("temperature", "1", "temperature must be 0 or above, not '1'"),
    ]:
        with pytest.raises(BridgeError) as error:
            take(name, value)
        assert str(error.value) == said


@pytest.mark.parametrize("one", [np.int64(4), np.uint8(4), np.array(4), 4])
def test_numbers_of_numpy_are_numbers(one):
    assert take("width", one) == 4 and type(take("width", one)) is int
    assert take("temperature", one) == 4.0 and type(take("temperature", one)) is float


@pytest.mark.parametrize(
    "other", [np.array([4]), np.array([4, 5]), np.array([4.0]), [4], None, "4"]
)
def test_what_holds_numbers_is_none(other):
    for name in ("width", "temperature"):
        with pytest.raises(BridgeError, match=f"{name} must be "):
            take(name, other)


BAD = [10**20, -1, float("nan"), float("inf"), "x", [1], True]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_the_package_itself_has_the_same_ranges(value, toy_model, tmp_path):
    model = bridge.load(toy_model, backend="numpy")
    for name in ("width", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"):
        with pytest.raises(BridgeError, match=f"^{name} must be |^1 widths|widths for"):
            model.generate(["1+1=", "1+2="], **{name: value})
    for name in ("max_rows", "cache_bytes", "ahead", "prompt_ids"):
        given = [value, 0] if name == "prompt_ids" else value
        with pytest.raises(BridgeError, match=f"^{name} must be "):
            model.generate(["1+1=", "1+2="], **{name: given})
    for name in ("heads", "head_dim", "seed", "norm_eps"):
        with pytest.raises(BridgeError, match=f"^{name} must be "):
            init(toy_model.parent / "model-host", tmp_path / "out", **{name: value})
    for f in fields(Workload):
        with pytest.raises(BridgeError, match=f"^{f.name} must be "):
            replace(Workload(), **{f.name: value}).check(10**9)
    for name in ("problems", "groups", "max_rows", "reward_seconds"):
        with pytest.raises(BridgeError, match=f"^{name} must be "):
            evaluate(model, Whole(), widths=(1,), **{name: value})
    with pytest.raises(BridgeError, match=r"^width must be "):
        evaluate(model, Whole(), widths=(value,))
    with pytest.raises(BridgeError, match=r"^temperature must be "):
        evaluate(model, Whole(), widths=(1,), decoding=Decoding(temperature=value))
    for name in ("time_limit", "processes"):
        with pytest.raises(BridgeError, match=f"^{name} must be "):
            Scorer(Whole(), **{name: value})
    with pytest.raises(BridgeError, match=r"^tolerance must be "):
        check_match("numeric", value)
    assert list(tmp_path.iterdir()) == []


class Whole(Graded):
    """With a split to evaluate on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {**self.sizes, "test": 20}

    def problem(self, split: str, number: int) -> Any:
        return super().problem("train", number)


def test_thresholds_and_sizes():
    for value in (float("nan"), float("inf"), 10**400, "1", True, None):
        with pytest.raises(BridgeError, match="threshold must be a number"):
            check_threshold(value)
    assert check_threshold(-2) == -2.0
    for text in ("9" * 5000 + "GB", "1e400GB", "nanGB", "infGB", "0.1B", "-1GB", "x" * 10**5):
        with pytest.raises(BridgeError, match="shard_size"):
            parse_size(text)
    assert parse_size("1.5kB") == 1500
    for text in ("9" * 5000, f"0-{'9' * 5000}", "0-99999999999", "nan", "-1"):
        with pytest.raises(BridgeError, match="layers: ") as error:
            parse_layers(text, 4)
        assert len(str(error.value)) < 400
    assert parse_layers("0-1,3", 4) == (0, 1, 3)
    for wrong in (10**20, -1, 0):
        with pytest.raises(BridgeError, match="max_new_tokens must be"):
            row_length(wrong, {"prompt 0": 3}, 64)
    sampling = check_sampling(1, 3, None, 0, 2**63)
    assert sampling == Sampling(1.0, 3, None, 0.0, 2**63) and type(sampling.temperature) is float


def test_memory_is_as_the_shapes_say(toy_model):
    config = open_checkpoint(toy_model).config
    token = 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads of keys, width of a head, float32
    assert token_bytes(config, "float32") == token
    caches = token * (2 * 5 + 7 * 9)  # two prompts of the longest's size, and rows' own timesteps
    assert cache_bytes(config, "float32", [5, 3], [3, 4], 10) == caches
    assert cache_bytes(config, "bfloat16", [5, 3], [3, 4], 10) == caches // 2
    D, F, V, heads = 16, 32, config.vocab_size, 2
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (D, F, 2)
    logits, layer = 32 * V, 10 * D + 3 * F  # of a row, and vectors of a cell
    step = 7 * (4 * layer + logits + 8 * (heads * 15 + 2 * 4))  # scores of 15 slots, and of 4 rows
    assert step_bytes(config, "float32", 7, 4, 15) == step
    assert step_bytes(config.without_bridge(), "float32", 7, 4, 15) == step - 7 * 8 * 2 * 4
    read = 2 * (5 * 2 * layer + logits)
    assert prefill_bytes(config, "bfloat16", 2, 5) == read
    assert 2**26 < available_memory() <= machine_memory() < 2**50


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_free_is_what_the_machine_and_its_container_have_left(
    monkeypatch, tmp_path, version
):
    names = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]
    limit, used = names[2 - version]
    dropped = ("total_inactive_file", "inactive_file")[version - 1]
    machine = "bridge.numbers.machine"
    monkeypatch.setattr(f"{machine}.MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(f"{machine}.LIMITS", [str(tmp_path / limit)])
    monkeypatch.setattr(f"{machine}.USED", [(str(tmp_path / used), dropped)])
    # Where nothing says, what the process has not had yet.
    assert 0 < available_memory() < machine_memory()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    7000 kB\n")
    assert available_memory() == 7000 * 1024
    (tmp_path / limit).write_text("5000000\n")
    assert available_memory() == 7000 * 1024  # what the container uses is not said
    assert machine_memory() == 5_000_000
    (tmp_path / used).write_text("4000000\n")
    assert available_memory() == 1_000_000
    stat = f"cache 9\n{dropped} 600000\nx{dropped} 1\n"
    (tmp_path / "memory.stat").write_text(stat)  # of files that were read
    assert available_memory() == 1_600_000
    (tmp_path / used).write_text("6000000\n")
    assert available_memory() == 0
    (tmp_path / limit).write_text("max\n")
    assert available_memory() == 7000 * 1024


def test_what_cannot_fit_is_refused_with_the_figures(monkeypatch):
    monkeypatch.setattr("bridge.numbers.machine.machine_memory", lambda: 2_000_000_000)
    check_memory(2_000_000_000, "x", "y")
    with pytest.raises(BridgeError) as error:
        check_memory(3_210_000_000_000, "8 rows", "lower width")
    assert str(error.value) == (
        "memory: 8 rows need 3.2 TB, and this machine has 2.0 GB; lower width"
    )


@pytest.fixture
def small(monkeypatch):
    """A machine of 4 MB, all of it free, which holds what the other tests of the toy model do."""
    monkeypatch.setattr("bridge.numbers.machine.machine_memory", lambda: 4_000_000)
    monkeypatch.setattr("bridge.decoding.budget.available_memory", lambda: 4_000_000)


def test_rows_that_cannot_fit_are_refused_before_they_are_decoded(toy_model, small):
    model = bridge.load(toy_model, backend="numpy")

    def prefill(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    model.implementation.prefill = prefill  # pyright: ignore[reportAttributeAccessIssue]
    need = r"memory: 2000 rows of up to 50 tokens at once, of width 2000, need [\d.]+ MB"
    with pytest.raises(BridgeError, match=f"{need}, and 3.6 MB are free for them on cpu; low"):
        model.generate("1+1=", width=2_000, max_new_tokens=50)
    with pytest.raises(BridgeError, match=r"and cache_bytes is 2.0 MB; raise it, or lower width"):
        model.generate("1+1=", width=2_000, max_new_tokens=50, cache_bytes=2_000_000)
    with pytest.raises(BridgeError, match="memory: 60000 rows of up to 50 tokens need"):
        model.generate(["1+1="] * 30, width=2_000, max_new_tokens=50, max_rows=2_000)
    with pytest.raises(BridgeError, match="memory: 20 problems by 4096 groups by widths of 16"):
        evaluate(model, Whole(), widths=(16,), groups=4096)
    with pytest.raises(BridgeError, match="memory: 512 rows of up to 60 tokens at once"):
        evaluate(model, Whole(), widths=(512,), decoding=Decoding(max_new_tokens=60))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_cannot_fit_is_refused_before_it_begins(kind, toy_model, tmp_path, small):
    settings = toy_run(toy_model, tmp_path / "run")
    if kind == "grpo":
        wide = replace(settings, width=4096, max_new_tokens=50, micro_batch_tokens=2**31 - 1)
    else:
        given = {**settings.to_json(), "kind": "sft", "samples": 4096, "max_rows": 2**20}
        known = {f.name for f in fields(KINDS["sft"])} | {"kind"}
        wide = read_settings("sft", {k: v for k, v in given.items() if k in known})
        wide = replace(wide, max_new_tokens=50, width=2)
    with pytest.raises(BridgeError, match=r"memory: \d+ rows of .* and this machine has 4.0 MB"):
        run(wide)
    assert not (tmp_path / "run").exists()


def test_blocks_that_cannot_fit_are_refused_before_they_are_written(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    host = tmp_path / "model-host"
    monkeypatch.setattr("bridge.numbers.machine.machine_memory", lambda: 10**9)
    with pytest.raises(BridgeError, match=r"memory: heads 65536 of 65536 in float64 need 549.8 GB"):
        init(host, tmp_path / "out", heads=65536, head_dim=65536)
    monkeypatch.setattr("bridge.numbers.machine.machine_memory", lambda: 10**18)
    with pytest.raises(BridgeError, match=r"heads 65536 of 65536 need .*B, and .*B are left there"):
        init(host, tmp_path / "out", heads=65536, head_dim=65536)
    assert not (tmp_path / "out").exists()


def test_a_bench_that_cannot_fit_is_refused(toy_model, small):
    short = ("--prompt-tokens", "8")
    ran = CliRunner().invoke(
        app,
        ["bench", str(toy_model), "--backend", "numpy", "--width", "9999", *short],
    )
    assert ran.exit_code == 2 and "memory: 9999 rows of up to 33 tokens at once" in ran.stderr
    ran = CliRunner().invoke(
        app,
        ["bench", str(toy_model), "--backend", "numpy", "--rows", "65536", "--prompt-tokens", "8"],
    )
    assert ran.exit_code == 2 and "memory: 65536 rows of 64 tokens in a micro-batch" in ran.stderr


def test_sizes_of_a_config_are_arithmetic_alone(toy_model):
    asked = ["--width", "65536", "--length", "2147483647", "--prompt", "2147483647", "--json"]
    ran = CliRunner().invoke(app, ["inspect", str(toy_model), *asked])
    assert ran.exit_code == 0, ran.output
    memory = json.loads(ran.stdout)["memory"]
    token = 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads of keys, width of a head, float32
    assert memory["row_caches"] == token * 65536 * 2147483647 == memory["prompt_cache"] * 65536


def test_an_optimizer_has_the_ranges_of_the_settings(toy_model):
    model = bridge.load(toy_model, backend="numpy")
    wrongs: list[Any] = [float("nan"), float("inf"), -1, 10**400]
    for wrong in wrongs:
        for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
            with pytest.raises(BridgeError, match=f"{name} must be "):
                model.trainer(SFT(), AdamW(**{name: wrong}))
        with pytest.raises(BridgeError, match="betas must be "):
            model.trainer(SFT(), replace(AdamW(), betas=(0.9, wrong)))
    betas: list[Any] = [5, None, "ab", (0.9,), (0.9, 0.9, 0.9), {0.9: 0.9, 0.8: 0.8}]
    for wrong in betas:
        with pytest.raises(BridgeError, match=r"^betas must be two numbers in \[0, 1\), not "):
            model.trainer(SFT(), AdamW(betas=wrong))
    with pytest.raises(BridgeError, match="eps must be above 0, not 0"):  # clause 7.8
        model.trainer(SFT(), AdamW(eps=0))
    model.trainer(SFT(), AdamW(lr=0.0, max_grad_norm=None))


def test_what_trains_is_given_by_names(toy_model):
    model = bridge.load(toy_model, backend="numpy")
    wrongs: list[Any] = [5, None, [5], [["model.norm.weight"]], ["model.norm.weight", 5], b"all"]
    for wrong in wrongs:
        with pytest.raises(BridgeError, match=r"^trainable must be 'bridge', 'all' or names, not"):
            model.trainer(SFT(), trainable=wrong)
    trainer = model.trainer(SFT(), trainable={"model.norm.weight"})
    assert "master.model.norm.weight" in trainer.state()


@pytest.mark.parametrize("step", [np.nan, -1, np.inf, 2.0**60, 0.5])
def test_the_step_of_a_trainers_state_is_a_number_of_steps(toy_model, step):
    trainer = bridge.load(toy_model, backend="numpy").trainer(SFT())
    state = trainer.state()
    with pytest.raises(BridgeError, match="trainer state: step must be a number of steps, not"):
        trainer.restore({**state, "step": np.array(step)})
    trainer.restore({**state, "step": np.array(7)})
    assert trainer.state()["step"] == 7


def test_options_of_a_task_that_are_too_deep():
    for text in ("[" * 150 + "]" * 150, "[" * 900 + "]" * 900, '{"a":' * 150 + "1" + "}" * 150):
        with pytest.raises(BridgeError, match=r"--task-options .* is nested too deeply"):
            read_task_options([f"x={text}"])
    assert read_task_options(["x=" + "[" * 90 + "]" * 90])["x"][0][0] != []
    assert read_task_options(["x=" + "9" * 5000, "y=1e400"]) == {"x": "9" * 5000, "y": "1e400"}
