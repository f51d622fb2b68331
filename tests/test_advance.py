"""What a decoder may be told: `check_advance` and `seeds_of`, each refusal in its words; and the
reference, which refuses whatever comes between a table of steps and the advance that follows it."""

import numpy as np
import pytest
from test_ref_train import model

from bridge.contract import Sampling
from bridge.decoding.inputs import check_advance
from bridge.decoding.uniforms import alike, seeds_of
from bridge.errors import BridgeError

# Three rows of two groups; of four columns, the second row ended in the second one.
GROUP, LEFT = np.array([4, 4, 9]), np.array([2, 2, 1])
TABLE = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [7, 0, 1, 2]])
TOKENS = np.array([1, 2, 3])


def check(tokens=TOKENS, keep=None, back=None, *, drawn=TABLE, left=LEFT):
    given = (None if one is None else np.asarray(one) for one in (tokens, keep, back))
    return check_advance(8, GROUP, left, drawn, *given)


KEPT = "advance: a row that has ended is kept; drop it, or go back before it"
PAST = (
    "advance: this step is past the max_new_tokens that a row came with; prefill or admit with more"
)
APART = "advance: back differs between rows of a group; they go back together"
REFUSED = [
    (dict(tokens=[1, 2]), "advance: tokens is [2], but there are 3 rows; give each one"),
    (dict(keep=[True]), "advance: keep is [1], but there are 3 rows; give each one"),
    (dict(back=[[0, 0, 0]]), "advance: back is [1, 3], but there are 3 rows; give each one"),
    (dict(keep=[1, 0, 1]), "advance: keep must be bool, not int64"),
    (dict(back=[0.0, 0.0, 0.0]), "advance: back must be integer, not float64"),
    (dict(tokens=None, drawn=None), "advance: no tokens given and none drawn; call sample first"),
    (dict(tokens=[8, 0, 0]), "advance: tokens has an id outside 0..7"),
    (dict(tokens=[0, 0, -1]), "advance: tokens has an id outside 0..7"),
    (dict(back=[4, 4, 0]), "advance: back 4 is outside 0..3, what sample_ahead fed"),
    (dict(back=[2, 2, -1]), "advance: back -1 is outside 0..3, what sample_ahead fed"),
    (dict(back=[1, 1, 1], drawn=None), "advance: back 1 is outside 0..0, what sample_ahead fed"),
    (
        dict(tokens=None, back=[2, 2, 0]),
        "advance: back needs tokens, those to go on with",
    ),
    (dict(back=[2, 3, 0]), APART),
    (dict(), KEPT),
    (dict(back=[1, 1, 0]), KEPT),
    (dict(back=[2, 2, 0], left=LEFT * 0), PAST),
    (dict(keep=[False, False, True], left=LEFT * 0), PAST),
]


@pytest.mark.parametrize("given,message", REFUSED)
def test_what_may_not_be_fed_is_refused_in_one_line(given, message):
    with pytest.raises(BridgeError) as refused:
        check(**given)
    assert str(refused.value) == message and "\n" not in message


def test_rows_go_back_to_where_one_of_them_ended_and_no_less_far():
    for back in (2, 3):  # the second column is where it drew its last token
        kept, steps = check(back=[back, back, 0])
        assert kept.tolist() == [True] * 3 and steps.tolist() == [back, back, 0]
    # A limit counts from where a row goes back to.
    assert check(back=[2, 2, 3], left=LEFT - 3)[1].tolist() == [2, 2, 3]


def test_what_is_given_for_a_dropped_row_is_not_read():
    keep = [True, False, True]
    kept, steps = check([1, -9, 3], keep, [1, -9, 0], left=LEFT * [1, -1, 1])
    assert kept.tolist() == keep and steps.tolist() == [1, 0, 0]
    none = [False] * 3
    assert check([99, 99, 99], none, [9, 8, 7])[1].tolist() == [0, 0, 0]
    assert check(None, keep)[0].tolist() == keep  # the last column


def test_rows_that_draw_alike_but_for_their_seeds_draw_together():
    hot, cold = Sampling(2.0, top_k=3, seed=5), Sampling(0.0)
    settings = [hot, cold, Sampling(2.0, top_k=3, seed=6), Sampling(2.0, seed=5), cold]
    assert [(one.temperature, one.top_k, own.tolist()) for one, own in alike(settings)] == [
        *((2.0, 3, [0, 2]), (0.0, None, [1, 4]), (2.0, None, [3])),
    ]
    assert seeds_of(settings, 5).tolist() == [5, 0, 6, 5, 0]
    assert alike(hot) == [(hot, None)] and seeds_of(hot, 2).tolist() == [5, 5]
    ((same, rows),) = alike([hot, Sampling(2.0, top_k=3, seed=2**64 - 1)])
    assert rows is None and same == Sampling(2.0, top_k=3)
    assert seeds_of([Sampling(seed=2**64 - 1)], 1).tolist() == [2**64 - 1]
    assert alike([]) == [] and seeds_of([], 0).dtype == np.uint64


@pytest.mark.parametrize("count", [0, 2, 4])
def test_settings_are_one_or_one_a_row(count):
    message = f"sample: {count} settings for 3 rows; give one, or one for every row"
    with pytest.raises(BridgeError) as refused:
        seeds_of([Sampling()] * count, 3)
    assert str(refused.value) == message


def test_after_a_table_advance_comes_next():
    prompt, plain = np.arange(3), Sampling(seed=1)
    decoder = model().prefill([prompt], [2], 6)
    table = decoder.sample_ahead(plain, 3, ())
    assert table.shape == (2, 3)
    for what, call in (
        ("sample", lambda: decoder.sample(plain)),
        ("sample_ahead", lambda: decoder.sample_ahead(plain, 1, ())),
        ("admit", lambda: decoder.admit([prompt], [1], 2)),
    ):
        with pytest.raises(BridgeError) as refused:
            call()
        assert str(refused.value) == f"{what}: tokens were drawn ahead; call advance first"
    decoder.advance()
    one = decoder.sample_ahead(plain, 1, ())  # a table of one column is a draw
    assert one[:, 0].tolist() == decoder.sample(plain).tolist()
    decoder.admit([prompt], [1], 2)
    assert len(decoder.logits()) == 3


def test_a_decoder_without_rows_gives_arrays_of_none_and_groups_may_come():
    prompt, plain = np.arange(3), Sampling(seed=1)
    decoder = model().prefill([prompt], [2], 6)
    decoder.advance(np.zeros(2, int), np.zeros(2, bool))
    assert decoder.logits().shape == (0, 11) and decoder.sample(plain).shape == (0,)
    assert decoder.sample_ahead(plain, 4, (1,)).shape == (0, 1)
    decoder.advance(None, np.zeros(0, bool))
    decoder.admit([prompt], [1], 2, [7])
    alone = model().prefill([prompt], [1], 2, [7])
    assert decoder.logits().tolist() == alone.logits().tolist()
    assert decoder.sample(plain).tolist() == alone.sample(plain).tolist()
