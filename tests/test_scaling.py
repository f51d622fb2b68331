"""`docs/scaling.md` shows what `benchmarks/scaling.py` computes now, which agrees with itself."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import scaling

MEND = "python benchmarks/scaling.py --write"


def test_the_tables_of_the_document_are_those_of_now():
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert all("\n".join(table()) in text for table in scaling.TABLES.values()), MEND
    assert scaling.with_tables(text) == text


def test_the_longest_response_is_the_last_that_fits():
    case = scaling.training("1.5B", scaling.KINDS[1])
    tokens = scaling.longest(case, 22e9, False)
    assert 0 < tokens < case.config.max_position_embeddings - scaling.WORK.prompt
    fits, not_any_more = (
        scaling.bytes_of(case, replace(scaling.WORK, response=n), "bfloat16").total
        for n in (tokens, tokens + 1)
    )
    assert fits <= 22e9 < not_any_more


def test_what_is_computed_again_is_less_than_a_third_of_what_a_frozen_host_costs():
    case = scaling.training("7B", scaling.KINDS[1])
    whole = scaling.update(case.config, case.trained, scaling.WORK)
    assert 0.4 < scaling.forward(case) / whole < 0.5  # forward, of forward and back to activations
