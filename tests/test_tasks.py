"""Tasks: the same problems in every process, splits that share none, bad input in one line."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BridgeError
from bridge.tasks import SPLITS, Problem, Scorer, Task, find_task
from bridge.tasks.extraction import PLACES, read_answer
from bridge.tasks.matching import check_match, read_number


def refusal(name, **options) -> str:
    """What `find_task` says, which is one line."""
    with pytest.raises(BridgeError) as caught:
        find_task(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Writes lines to a JSONL file: objects as JSON, texts and bytes as they are."""

    def make(*lines):
        path = tmp_path / "problems.jsonl"
        coded = [x if isinstance(x, str | bytes) else json.dumps(x) for x in lines]
        path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in coded) + b"\n")
        return str(path)

    return make


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user into the working directory."""
    monkeypatch.chdir(tmp_path)
    names = []

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)

    yield make
    for name in names:
        sys.modules.pop(name, None)


# Answers and how they are matched.


@pytest.mark.parametrize(
    ("where", "response", "answer"),
    [
        ("tag", "<answer>1</answer> no, <answer> 2 </answer> so", "2"),
        ("tag", "<answer>a <answer>b</answer>", "b"),
        ("tag", "<answer>one\ntwo</answer>", "one\ntwo"),
        ("tag", "<answer>1", None),
        ("tag", "<answer> </answer>", None),
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", "#### 3", None),
        ("hashes", "steps #### 1,200 \nmore", "1,200"),
        ("number", "17-25 and 1,234.50 of all", "1,234.50"),
        ("number", "none", None),
        ("text", "  the whole\nof it ", "the whole\nof it"),
        ("text", " ", None),
        ("auto", r"#### 1 \boxed{2} <answer>3</answer>", "3"),
        ("auto", r"#### 1 \boxed{2}", "2"),
        ("auto", "The answer is 5.\n#### 1", "1"),
        ("auto", "The answer is **Paris**.", "Paris"),
        ("auto", "The answer is x = 1,200 apples, of 3", "x = 1,200 apples, of 3"),
        ("auto", "The answer is $x$. It is not $y$.", "x"),
        ("auto", r"The answer is $\frac{1}{2}$ or $5.", r"$\frac{1}{2}$ or $5"),
        ("auto", "the answers are 1.5e3 and 25%! Or 7", "1.5e3 and 25%"),
        ("auto", "The answer is 4.\nThe answer is .", "4"),
        ("auto", "#### 7\nso the answer is 8", "8"),
        ("hashes", "##### 3\n#### **12 apples**.", "12 apples"),
        ("boxed", r"\boxed{\left\{ 1 \right.} \boxed{}", r"\left\{ 1 \right."),
        ("boxed", r"\boxed{1} or $\boxed{2}$", r"\boxed{1} or $\boxed{2}"),
        ("number", "it is 12 m^2 of x_1 and H2O", "12"),
        ("number", "it is 1.5e3", "1.5e3"),
        ("number", "on 2024-01-05.", "2024-01-05"),
        ("number", r"so $\frac{3}{4}$.", r"\frac{3}{4}"),
        ("number", "so $5$ of $6.", "$6"),
        ("number", "so $-5$.", "-5"),
        ("number", "so $5$.", "5"),
        ("auto", "5 bags make 40", "40"),
        ("auto", "hm", None),
    ],
)
def test_where_answers_stand(where, response, answer):
    assert read_answer(response, where) == answer


@given(st.text() | st.text(alphabet="<>answer/{}\\boxed# 1,"), st.sampled_from(sorted(PLACES)))
def test_an_answer_is_part_of_the_response_or_none(response, where):
    answer = read_answer(response, where)
    assert answer is None or (answer and answer in response)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,200.0", 1200),
        (r"\$1,200", 1200),
        ("-$5", -5),
        ("\u22123", -3),
        ("2400/2", 1200),
        ("5%", Fraction(1, 20)),
        (r"5\%", Fraction(1, 20)),
        ("1e3", 1000),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("1,2", None),
        ("1/0", None),
        ("1e999999999", None),
        ("nan", None),
        (r"\dfrac{1}{2}", Fraction(1, 2)),
        (r"-\frac12", Fraction(-1, 2)),
        (r"2\tfrac{1}{3}", Fraction(7, 3)),
        (r"\text{12}", 12),
        (r"$90^\circ$", 90),
        ("12 apples", None),
        ("x = 12", None),
        (r"\frac{1}{0}", None),
        ("1_000", None),
        ("", None),
    ],
)
def test_numbers(text, number):
    assert read_number(text) == number


@given(st.fractions(max_denominator=10**6))
def test_numbers_are_read_exactly(number):
    assert read_number(str(number)) == number


def test_matches():
    exact, numeric = check_match("exact", 0), check_match("numeric", 0)
    near, math = check_match("numeric", 0.01), check_match("math", 0)
    assert exact("a  b", "a b") and not exact("a b", "A b") and not exact("1.0", "1")
    assert numeric("0.5", "1/2") and not numeric("0.3", "0.30000000001")
    assert near("100", "101") and not near("100", "101.0001") and not near("0", "0.001")
    assert math(r"2\sqrt{2}", r"\sqrt{8}") and math("1/2", "$0.5$") and math(r"\{1, 2\}", "2, 1")
    assert not math("3", "4") and not math("3", "}{") and not math("x^2", "x")
    with pytest.raises(ValueError, match="right answer"):
        math("", "3")


# reasoning-gym.


def test_a_gym_task_asks_and_scores():
    task = find_task("reasoning-gym:chain_sum", min_terms=2, max_terms=2)
    assert isinstance(task, Task) and task.size("train") is None
    problem = task.problem("test", 3)
    assert problem.number == 3 and "<answer>" in problem.prompt
    question = problem.metadata["entry"]["question"]
    terms = question.rpartition(":")[2].removesuffix("=").strip()
    assert eval(terms) == int(problem.answer)
    with Scorer(task) as scorer:
        right = f"so <answer>{problem.answer}</answer>"
        scores = scorer.score([(problem, right), (problem, problem.answer), (problem, "no")])
    assert [s.value for s in scores] == [1.0, 0.0, 0.0]
    assert [s.problem for s in scores] == [None] * 3
    assert task.read_answer("<answer>1,200.0</answer>") == "1200" and task.read_answer("5") is None


def test_partial_credit_is_kept_and_a_threshold_says_what_is_correct():
    task = find_task("reasoning-gym:countdown", min_numbers=3, max_numbers=3, threshold=0.5)
    assert task.threshold == 0.5
    problem = task.problem("train", 0)
    with Scorer(task) as scorer:
        wrong, right = scorer.score(
            [(problem, "<answer>3</answer>"), (problem, f"<answer>{problem.answer}</answer>")]
        )
    assert wrong.value == 0.05 and right.value == 1.0  # as reasoning-gym's countdown.py has it


def test_splits_of_a_generator_with_few_questions_share_none():
    def asked(**options):
        task = find_task("reasoning-gym:chain_sum", min_terms=2, max_terms=2, **options)
        return {
            split: {task.problem(split, n).metadata["entry"]["question"] for n in range(150)}
            for split in SPLITS
        }

    one = asked(min_digits=1, max_digits=1)
    # Another seed and another config, in which the same questions come up.
    two = asked(min_digits=1, max_digits=2, seed=7)
    for a in SPLITS:
        assert len(one[a]) < 150  # so few that they repeat
        for b in SPLITS:
            assert a == b or not one[a] & (one[b] | two[b])
    assert any(one[split] & two[split] for split in SPLITS)


def test_a_split_that_no_question_is_of_is_refused():
    task = find_task("reasoning-gym:prime_factorization", min_value=7, max_value=7)
    asked, refused = [], []
    for split in SPLITS:
        try:
            asked.append(task.problem(split, 0).answer)
        except BridgeError as error:
            refused.append(str(error))
    assert asked == ["7"]  # the one question there is
    assert len(refused) == 2
    assert all("200 draws, 1 of them distinct" in line and "\n" not in line for line in refused)


# What depends on the hashes of texts, and on the global random state, in reasoning-gym 0.1.25.
UNSTEADY = ("isomorphic_strings", "ransom_note", "polynomial_multiplication", "list_functions")
ASK = """
import json, random, sys
from bridge.tasks import find_task
random.seed(int(sys.argv[1]))
tasks = [find_task(f"reasoning-gym:{name}") for name in sys.argv[2:]]
print(json.dumps([[t.problem("train", n).prompt, t.problem("train", n).answer]
                  for t in tasks for n in (70, *range(40))]))
"""


def test_problems_are_the_same_in_every_process():
    def ask(seed):
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", ASK, seed, *UNSTEADY]
        return json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    first, second = ask("1"), ask("2")
    assert first == second
    assert len({prompt for prompt, _ in first}) == len(first)


def test_order_of_asking_does_not_matter():
    task = find_task("reasoning-gym:list_functions")
    forward = [task.problem("test", n) for n in range(5)]
    task = find_task("reasoning-gym:list_functions")
    assert [task.problem("test", n) for n in reversed(range(5))] == forward[::-1]


def test_bad_gym_tasks(monkeypatch):
    assert "did you mean countdown" in refusal("reasoning-gym:countdwon")
    listing = refusal("reasoning-gym:zzzzzzzz")
    assert "there are ab, " in listing and "zebra_puzzles" in listing
    assert "did you mean min_terms?" in refusal("reasoning-gym:chain_sum", min_term=2)
    assert "it has max_empty, min_empty" in refusal("reasoning-gym:sudoku", zzz=1)
    assert "has no option size" in refusal("reasoning-gym:gcd", size=9)
    said = refusal("reasoning-gym:chain_sum", min_terms=0)
    assert "min_terms=0" in said and "must be positive" in said
    assert "min_terms='x'" in refusal("reasoning-gym:chain_sum", min_terms="x")
    assert "seed must be" in refusal("reasoning-gym:gcd", seed="x")
    assert "extract 'tags'" in refusal("reasoning-gym:gcd", extract="tags")
    assert "threshold must be" in refusal("reasoning-gym:gcd", threshold=float("nan"))
    task = find_task("reasoning-gym:gcd")
    for split, number in (("tests", 0), ("test", -1)):
        with pytest.raises(BridgeError):
            task.problem(split, number)
    with pytest.raises(BridgeError, match="split 'dev' is not known"):
        task.size("dev")
    monkeypatch.setattr("bridge.tasks.gym.find_spec", lambda name: None)
    assert "pip install 'bridge-llm[tasks]'" in refusal("reasoning-gym:gcd")


# JSONL files.


def test_a_file_with_named_splits(write):
    chat = [{"role": "user", "content": "2 + 2?"}]
    task = find_task(
        write(
            {"prompt": "1 + 1?", "answer": 2, "split": "train", "level": 1},
            "",
            {"messages": chat, "answer": "4", "split": "test"},
            {"prompt": "3 + 3?", "answer": "so 3 + 3 = 6\n#### 6", "split": "train"},
        ),
        instruction="Be brief.",
    )
    assert [task.size(split) for split in SPLITS] == [2, 0, 1]
    first, third = task.problem("train", 0), task.problem("train", 1)
    assert first == Problem(0, "1 + 1?\n\nBe brief.", "2", {"level": 1})
    assert (third.number, third.answer, task.match) == (1, "6", "numeric")
    chat = task.problem("test", 0).prompt
    assert chat == [{"role": "user", "content": "2 + 2?\n\nBe brief."}]
    with Scorer(task) as scorer:
        pairs = [(first, "It is 2.0"), (first, "3"), (third, r"\boxed{6}"), (third, "none")]
        assert [s.value for s in scorer.score(pairs)] == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(BridgeError, match=r"problem 1 of test is not there \(has: 0..0\)"):
        task.problem("test", 1)
    with pytest.raises(BridgeError, match=r"problem 0 of validation is not there \(has: none\)"):
        task.problem("validation", 0)


def test_splits_by_hash_depend_on_prompts_alone(write):
    lines = [{"prompt": f"{n} + {n}?", "answer": 2 * n} for n in range(400)]
    lines += lines[:50]  # twice the same prompt is the same split

    def asked(lines):
        task = find_task(write(*lines))
        return [{task.problem(s, n).prompt for n in range(task.size(s))} for s in SPLITS], [
            task.size(s) for s in SPLITS
        ]

    one, sizes = asked(lines)
    two, _ = asked(lines[::-1])
    assert one == two and sum(sizes) == 450 and sum(map(len, one)) == 400
    assert all(20 < len(one[i]) < 65 for i in (1, 2))  # within 4 standard deviations of 40


def test_matches_of_a_file(write):
    path = write({"prompt": "a?", "answer": r"\sqrt{4}", "split": "test"})
    response = r"\boxed{2}"
    for match, value in (("math", 1.0), ("exact", 0.0), (None, 0.0)):
        task = find_task(path, match=match)
        with Scorer(task) as scorer:
            assert [s.value for s in scorer.score([(task.problem("test", 0), response)])] == [value]


def test_each_answer_of_a_file_is_matched_as_what_it_is(write):
    path = write(
        *({"prompt": f"{a}?", "answer": a, "split": "test"} for a in ("12", "Paris", 0.5)),
    )
    for options, near in (({}, 0.0), ({"tolerance": 0.1}, 1.0)):
        task = find_task(path, **options)
        said = ("It is 12.0", "It is 12.1", "Answer: Paris", "Answer: paris", "Answer: 50%")
        pairs = [(task.problem("test", n), s) for n, s in zip((0, 0, 1, 1, 2), said, strict=True)]
        with Scorer(task) as scorer:
            assert [s.value for s in scorer.score(pairs)] == [1.0, near, 1.0, 0.0, 1.0]


GOOD = {"prompt": "a?", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "holds no problem"),
        ((GOOD, "{"), "line 2: is not readable as JSON"),
        ((GOOD, "[" * 100000), "line 2: is not readable as JSON"),
        ((GOOD, "[1]"), "line 2: must be a JSON object"),
        ((GOOD, b'{"prompt": "\xff"}'), "line 2: is not UTF-8"),
        (('{"prompt": "\\ud800", "answer": "1"}',), "line 1: holds half a surrogate pair"),
        (
            ('{"prompt": "a", "prompt": "b", "answer": 1}',),
            "line 1: is not readable",
        ),
        ((GOOD, "", {"answer": "1"}), "line 3: must have prompt or messages"),
        (({**GOOD, "messages": []},), "line 1: must have prompt or messages, one of the two"),
        (({"prompt": 3, "answer": 1},), "line 1: prompt must be text, not 3"),
        (({"prompt": " ", "answer": 1},), "line 1: prompt must be text"),
        (({"messages": [{"role": "user"}], "answer": 1},), "line 1: messages must be a list"),
        (({"messages": [], "answer": 1},), "line 1: messages must be a list"),
        (({"prompt": "a?"},), "line 1: answer is missing"),
        (({"prompt": "a?", "answer": [1]},), "line 1: answer must be text or a number, not [1]"),
        (({"prompt": "a?", "answer": True},), "line 1: answer must be text or a number"),
        ((GOOD, '{"prompt": "b?", "answer": NaN}'), "line 2: answer is NaN, no number of JSON"),
        ((GOOD, '{"prompt": "b?", "answer": 1e400}'), "line 2: answer is 1e400, no number of JSON"),
        ((GOOD, {"prompt": "b?", "answer": "nan"}), "line 2: answer is nan, as where a value"),
        (({"prompt": "a?", "answer": ""},), "line 1: answer must be text or a number"),
        (({**GOOD, "split": "dev"},), "line 1: split must be one of train, validation, test"),
        (({**GOOD, "split": "test"}, GOOD), "line 2: split is missing"),
        (
            ({**GOOD, "split": "test"}, {**GOOD, "split": "train"}),
            "line 2: the prompt of train is that of line 1, which is of test",
        ),
    ],
)
def test_bad_lines(write, lines, said):
    path = write(*lines)
    line = refusal(path)
    assert line.startswith(path) and said in line


def test_bad_options_of_a_file(write, tmp_path):
    path = write(GOOD, {"prompt": "b?", "answer": "one"})
    assert "line 2: answer must be a number for match=numeric" in refusal(path, match="numeric")
    assert "match 'fuzzy' is not known; use one of exact" in refusal(path, match="fuzzy")
    assert "tolerance must be" in refusal(path, match="numeric", tolerance=2)
    assert "not for match=exact" in refusal(write({**GOOD, "answer": "one"}), tolerance=0.1)
    path = write(GOOD, {"prompt": "b?", "answer": "one"})
    assert "tolerance is for match=numeric" in refusal(path, match="exact", tolerance=0.1)
    assert "extract 'box'" in refusal(path, extract="box")
    said = refusal(path, wrong=1)
    assert "'wrong'" in said and "options: match, tolerance, extract" in said
    assert "leave match and tolerance out" in refusal(path, match="exact", reward="json:loads")
    assert "cannot be read (No such file" in refusal(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a directory" in refusal(str(tmp_path / "folder.jsonl"))


def test_math_verify_that_is_missing(write, monkeypatch):
    monkeypatch.setattr("bridge.tasks.matching.find_spec", lambda name: None)
    assert "pip install 'bridge-llm[tasks]'" in refusal(write(GOOD), match="math")


# Functions of the user.

MAKES = """
from bridge.tasks import Problem

class Echo:
    threshold = 0.5
    def __init__(self, size):
        self.name, self.many = "echo", size
    def size(self, split):
        return self.many
    def problem(self, split, number):
        return Problem(number, f"say {split} {number}", f"{split} {number}")
    def score(self, problem, response):
        return float(problem.answer in response)
    def read_answer(self, response):
        return response or None

def make(size=5):
    return Echo(size)

def wrong():
    return 5

def fails():
    raise RuntimeError("no\\nway")

def reward(problem, response):
    return len(response) / problem.metadata["length"]
"""


def test_a_task_of_the_user(module):
    module("echoes", MAKES)
    task = find_task("echoes:make", size=3)
    assert (task.name, task.size("test")) == ("echo", 3)
    with Scorer(task) as scorer:
        problem = task.problem("test", 1)
        scores = scorer.score([(problem, "test 1"), (problem, "test 2")])
        assert [s.value for s in scores] == [1.0, 0.0]


def test_a_reward_of_the_user(module, write):
    module("rewards", MAKES)
    path = write({"prompt": "a?", "length": 4, "split": "test"})
    task = find_task(path, reward="rewards:reward")
    assert task.problem("test", 0).answer is None
    with Scorer(task) as scorer:
        assert [s.value for s in scorer.score([(task.problem("test", 0), "abc")])] == [0.75]


def test_bad_functions(module, write):
    module("makers", MAKES)
    module("broken", "import not_installed_anywhere")
    module("raises", "1 / 0")
    module("leaves", "raise SystemExit(3)")
    assert "there is no module nowhere" in refusal("nowhere:make")
    assert "there is no module json.nowhere" in refusal("json.nowhere:make")
    assert "needs not_installed_anywhere" in refusal("broken:make")
    assert "pip install not_installed_anywhere" in refusal("broken:make")
    assert "its module fails (ZeroDivisionError" in refusal("raises:make")
    assert "its module fails (SystemExit: 3)" in refusal("leaves:make")
    assert "maker is not there in makers; did you mean make?" in refusal("makers:maker")
    assert "__name__ is no function" in refusal("makers:__name__")
    module("holds", "makes, make, NUMBER = 5, print, 7")
    assert "makes is no function in holds; did you mean make?" in refusal("holds:makes")
    assert "NUMBER is no function in holds; mend the name" in refusal("holds:NUMBER")
    assert "must be MODULE:FUNCTION" in refusal("makers:")
    assert "must return a task" in refusal("makers:wrong")
    assert "fails (RuntimeError: no way)" in refusal("makers:fails")
    assert "options: size" in refusal("makers:make", length=3)
    assert "task 'countdown' is not known; give reasoning-gym:NAME" in refusal("countdown")
    assert "reward makers:rewards: rewards is not there" in refusal(
        write(GOOD), reward="makers:rewards"
    )
