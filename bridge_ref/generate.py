"""The loop of generation on token ids, stated once in full (chapters 4 and 6).

`bridge.decoding.engine` is the one that users run, on any backend; this is what it must come
to.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from bridge.contract import BackendModel, Sampling


def generate(
    model: BackendModel,
    prompts: Sequence[Int[np.ndarray, " P"]],
    widths: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Collection[int] = (),
) -> list[list[list[int]]]:
    """The tokens that each row of each prompt says, the one that ended it included.

    A row ends with an EOS token, or with its `max_new_tokens`-th. Its last token is never fed back
    (clause 2.3), and from then on it is not there for the others (clause 4.3).
    """
    rows: list[list[list[int]]] = [[[] for _ in range(width)] for width in widths]
    left = [row for group in rows for row in group]
    decoder = model.prefill(prompts, widths, max_new_tokens)
    while left:
        tokens = decoder.sample(sampling)
        for row, token in zip(left, tokens, strict=True):
            row.append(int(token))
        keep = np.array([r[-1] not in eos_token_ids and len(r) < max_new_tokens for r in left])
        left = [row for row, kept in zip(left, keep, strict=True) if kept]
        if left:
            decoder.advance(tokens, keep)
    return rows
