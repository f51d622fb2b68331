r"""A table of right answers and responses: what the task scores, and what the vote counts together.

The table is `answer_pairs.py`; the tasks are files of its right answers, so that all is as a user
has it. Votes and tasks must read the same, and agree on which answers are the same.
"""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.answers.conclusion import extract_answer, normalise
from bridge.answers.numbers import read_bare, read_quantity
from bridge.evaluation.voting import majority
from bridge.tasks import find_task
from bridge.tasks.extraction import read_answer
from tests.answer_pairs import EXACT, MATH, NUMERIC, PAIRS


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """By match, a task of a file with those right answers; the file for None holds all."""
    folder = tmp_path_factory.mktemp("answers")

    def make(match):
        path = folder / f"{match}.jsonl"
        lines = [
            {"prompt": f"pair {n}?", "answer": pair[0], "split": "test"}
            for n, pair in enumerate(PAIRS)
            if match in (None, pair[2])
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = find_task(str(path), match=match)
        numbered = [int(line["prompt"][5:-1]) for line in lines]
        return task, {n: task.problem("test", i) for i, n in enumerate(numbered)}

    return {match: make(match) for match in (EXACT, NUMERIC, MATH, None)}


def name(n):
    return f"{n}-{PAIRS[n][2]}-{PAIRS[n][0]}"


@pytest.mark.parametrize("n", range(len(PAIRS)), ids=name)
def test_the_score_of_each_pair(tasks, n):
    right, said, match, verdict, _ = PAIRS[n]
    task, problems = tasks[match]
    assert task.score(problems[n], said) == verdict
    if match == NUMERIC and read_bare(right) is not None:  # nor do other lines of a file matter
        task, problems = tasks[None]
        assert task.score(problems[n], said) == verdict


@pytest.mark.parametrize("n", range(len(PAIRS)), ids=name)
def test_the_vote_of_each_pair(tasks, n):
    right, said, match, verdict, _ = PAIRS[n]
    task, _ = tasks[match]
    assert extract_answer(said) == task.read_answer(said)
    assert extract_answer(said, complete=False) in (extract_answer(said), None)
    if match != MATH:  # which formulas are equal a vote cannot say
        vote = majority([said, f"<answer>{right}</answer>"])
        assert vote.count == 1 + verdict


def test_the_table_is_large_and_says_where_it_comes_from():
    assert len(PAIRS) >= 60 and len({pair[:3] for pair in PAIRS}) == len(PAIRS)
    assert all(source for *_, source in PAIRS)
    for match in (EXACT, NUMERIC, MATH, None):
        assert {verdict for _, _, m, verdict, _ in PAIRS if m == match} == {0, 1}


WRITINGS = (
    "{n}", "{n:,}", "${n}$", r"\${n:,}.00", "{n}.0", "**{n}**", "{n} apples", "x = {n}", "{n}e0",
    r"\frac{{{n}}}{{1}}", r"\text{{{n}}}", r"{n}\text{{ cm}}^2", r"\({n}\) km/h", "about {n}",
    "{n}, which is a number", r"{n}^\circ", "{n}\u00b0C", "the {n}th", "{n}/1", "\u20ac{n:,}",
)  # fmt: skip
STATEMENTS = ("The answer is {}.", "So the answer is: {}", "#### {}", "<answer>{}</answer>",
              r"\boxed{{{}}}", "**Answer:** {}\nThat took 3 steps.")  # fmt: skip


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(WRITINGS),
    st.sampled_from(STATEMENTS),
    st.integers(0, 10**9),
)
def test_a_number_in_any_spelling_is_that_number(number, writing, statement, other):
    said = statement.format(writing.format(n=number))
    answer = read_answer(said, "auto")
    assert answer is not None
    found = read_quantity(answer)
    assert found is not None and found.value == number
    assert majority([said, f"It is {number}"]).count == 2
    if other != number:
        assert majority([said, f"It is {other}"]).count == 1


PIECES = st.sampled_from(
    ["1", "20", ",", "300", ".", "-", "/", "%", "$", "(", ")", "{", "}", " ", "\n", "=", "x", "or",
     " apples", "e3", "^", r"\frac", r"\boxed", r"\text", r"\(", r"\]", "####", "answer is ", "!"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=12).map("".join) | st.text())
def test_reading_never_raises_and_says_the_same_again(text):
    normal = normalise(text)
    assert normalise(normal) == normal
    bare, stated = read_bare(text), read_quantity(text)
    assert bare is None or bare == stated
    answer = read_answer(text, "auto")
    assert extract_answer(text) == (None if answer is None else normalise(answer) or None)


@pytest.mark.parametrize(
    "text",
    [
        "(1" + ",111" * 20000,
        "The answer is " + "a" * 50000 + "!",
        "The answer is 1" + " 111" * 400 + "x",
        "The answer is x" + ")" * 50000,
        r"\(" * 50000,
        "$$ " * 30000,
        r"\boxed{" * 20000,
        "1" * 100000,
        "answer is " * 10000,
    ],
    ids=lambda text: text[:20],
)
def test_long_texts_are_read_at_once(text):
    answer = extract_answer(text)  # patterns that try every way would not come back
    assert answer is None or read_bare(answer) is None or isinstance(normalise(answer), str)


def test_mixed_numbers_and_powers():
    for text, value in ((r"-1\frac{1}{4}", Fraction(-5, 4)), ("2 \u00d7 10\u207b\u00b2", 0.02)):
        found = read_quantity(text)
        assert found is not None and found.value == Fraction(str(value))
