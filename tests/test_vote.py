"""Answers found in responses, numbers that agree, and majorities with their ties."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.answers.conclusion import extract_answer, normalise
from bridge.evaluation.voting import majority


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} or so, 7 in all", "0.5"),
        (r"\boxed{\frac{2}{6}}", "1/3"),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"<answer>3</answer>, not \boxed{4}", "3"),
        (r"\boxed{40} and then \boxed{4", "40"),  # cut off within the braces
        (r"\boxed{\$1{,}200}", "1200"),
        (r"costs \boxed{\$18.00}", "18"),
        (r"\boxed{ X + Y }", "x + y"),
        ("#### 1,200", "1200"),
        ("steps\n#### 7\nthen 9", "7"),
        ("The answer is 12 apples, of 30.", "12"),
        ("the ANSWER IS: **40**.", "40"),
        ("Answer: $3.50", "3.5"),
        ("The answer is 17 + 25 = 42.", "42"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is blue.", "blue"),
        ("5 bags of 8 make 40 marbles.", "40"),
        ("from 1,234 to 5,678.0", "5678"),
        ("it is -5", "-5"),
        ("it is \u22125", "-5"),
        ("17-25", "25"),
        ("between (2)-3", "3"),
        ("the pair 3,4", "4"),
        ("a half is 1/2", "0.5"),
        ("The answer is 25.0%.", "25%"),
        ("The answer is (3,4).", "(3, 4)"),
        ("The answer is $(3 ,4)$.", "(3, 4)"),
        ("The answer is 2024-01-05.", "2024-01-05"),
        ("#### 1 or 2", "1 or 2"),
        (".50", "0.5"),
        ("costs $7.", "7"),
        ("no number at all", None),
        ("", None),
        (r"\boxed{}", None),
        ("-0.0", "0"),
    ],
)
def test_answers(text, answer):
    assert extract_answer(text) == answer


def test_a_response_that_was_cut_off_answers_only_what_it_states():
    assert extract_answer("5 times 8 is 40 and", complete=False) is None
    assert extract_answer("The answer is 40 and", complete=False) == "40"


@pytest.mark.parametrize("same", ["1200", "1,200", "$1,200.00", "1200.", r"\$1200", " **1200** "])
def test_one_number_in_many_spellings(same):
    assert normalise(same) == "1200"


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_numbers_keep_their_value(number):
    plain = normalise(f"{number:,f}")
    assert Decimal(plain) == number
    assert normalise(plain) == plain


@given(st.fractions(max_denominator=10**6))
def test_fractions_keep_their_value(number):
    plain = normalise(rf"$\frac{{{number.numerator}}}{{{number.denominator}}}$")
    assert Fraction(plain) == number
    assert plain == normalise(str(number)) == normalise(f"{plain} apples")


@given(st.text(), st.booleans())
def test_any_text_has_an_answer_that_is_a_text_or_none(text, complete):
    answer = extract_answer(text, complete)
    assert answer is None or answer


def test_the_majority_wins():
    vote = majority(["It is 3", "#### 4", r"\boxed{4.0}", "none"])
    assert (vote.answer, vote.count, vote.total, vote.tied) == ("4", 2, 4, False)
    assert vote.tallies == {"4": 2, "3": 1}


@pytest.mark.parametrize(
    ("texts", "answer", "count"),
    [
        (["so 25%", "It is 25", "so 0.25"], "25", 2),
        (["so 25%", "It is 1/4", r"\boxed{25\%}"], "0.25", 3),
        (["so 25%", r"\boxed{25\%}", "It is 3"], "25%", 2),
        (["so 0.5%", "It is 0.5", "It is 0.005"], "0.005", 2),  # below 1 % the sign counts
    ],
)
def test_a_percentage_is_the_number_that_other_rows_give_for_it(texts, answer, count):
    vote = majority(texts)
    assert (vote.answer, vote.count) == (answer, count)


def test_a_tie_goes_to_the_earliest_row_and_is_said():
    vote = majority(["9", "7", "8", "7", "8"])
    assert (vote.answer, vote.count, vote.tied) == ("7", 2, True)
    assert list(vote.tallies) == ["7", "8", "9"]


def test_nobody_answers():
    vote = majority(["dunno", ""])
    assert (vote.answer, vote.count, vote.total, vote.tallies) == (None, 0, 2, {})
    assert majority([]).total == 0


def test_incomplete_rows_do_not_vote_by_their_last_number():
    assert majority(["so 5", "so 5", "It is 6"], [False, False, True]).answer == "6"
    with pytest.raises(ValueError):
        majority(["5"], [True, False])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_counts_are_those_of_counting(numbers):
    vote = majority([f"It is {n}" for n in numbers])
    best = max(numbers.count(n) for n in numbers)
    first = next(n for n in numbers if numbers.count(n) == best)
    assert (vote.answer, vote.count, vote.total) == (str(first), best, len(numbers))
    assert vote.tied == (sum(numbers.count(n) == best for n in set(numbers)) > 1)
