"""Faults of the torch backend's fused decoding step, planted in its C source (chapters 3 to 5)."""

from mutations.fault import Edit, Fault

CACHED = "cached_decoding_equals_teacher_forcing"


GENERATED = "generated_rows_follow_the_rule"


def fused(name: str, harm: str, clause: str, old: str, new: str, check: str = CACHED) -> Fault:
    """A fault in `fused.c`."""
    return Fault(f"fused step: {name}", harm, clause, check, Edit("fused.c", old, new))


FAULTS = (
    fused(
        "the new token does not read itself",
        "Every token is drawn as if the last one had not been said.",
        "4.1",
        "P - p0, step + 1 - t0)",
        "P - p0, step > t0 ? step - t0 : 1)",
    ),
    fused(
        "the last token of a prompt is not read",
        "The first words of an answer miss the end of the question.",
        "4.1",
        "values + t0 * d, P - p0,",
        "values + t0 * d, P - p0 - (P > p0),",
    ),
    fused(
        "prompts are read beyond the window",
        "Mistral's layers read what training never showed them.",
        "5.5",
        "p0 = lost < P ? lost : P, t0 = lost - p0;",
        "p0 = 0, t0 = lost < P ? 0 : lost - P;",
    ),
    fused(
        "key heads of the prompt in reverse",
        "Grouped-query heads read the keys of others.",
        "5.4",
        "((2 * i * K + k) * P + p0)",
        "((2 * i * K + K - 1 - k) * P + p0)",
    ),
    fused(
        "rope turns the other way",
        "Distances are read backwards.",
        "5.6",
        "head[i] = a * cos[i] + b * sin[i];",
        "head[i] = a * cos[i] - b * sin[i];",
    ),
    fused(
        "Qwen3's norm of queries and keys is left out",
        "A family answers nonsense.",
        "5.4",
        "if (weight) norm(",
        "if (0) norm(",
    ),
    fused(
        "SwiGLU without its linear factor",
        "The FFN is another function.",
        "5.8",
        "x[i] / (1 + exponential(-x[i]))",
        "1 / (1 + exponential(-x[i]))",
    ),
    fused(
        "the block reads the first group only",
        "Rows of one prompt read the rows of another.",
        "3.4",
        "in + first * F + E + n * d",
        "in + E + n * d",
        GENERATED,
    ),
    fused(
        "the block leaves out the last row of a group",
        "Nobody hears one of the rows.",
        "3.4",
        "s->last[r] - first, F);",
        "s->last[r] - first - (s->last[r] - first > 1), F);",
    ),
    fused(
        "eps of the norm is added to the sum of squares",
        "Small residuals are scaled wrongly.",
        "3.2",
        "dot(x, x, n) / n + eps",
        "(dot(x, x, n) + eps) / n",
    ),
    fused(
        "the softmax of the block is not divided",
        "The residual grows with the width.",
        "3.5",
        "score[i] /= total;",
        "score[i] /= 1 + 0 * total;",
    ),
    fused(
        "the last outputs of the block's matrices are left out",
        "Widths that are no multiple of a tile lose outputs.",
        "3.3",
        "for (; o < O; o++) tile_of_rows",
        "for (; o < 0; o++) tile_of_rows",
    ),
    fused(
        "the block replaces the residual",
        "What the host had computed is gone.",
        "3.6",
        "linear(h, out, layer->outward, R, D, E);",
        "\n#pragma omp for\n"
        "  for (int64_t i = 0; i < R * D; i++) h[i] = 0;\n"
        "  linear(h, out, layer->outward, R, D, E);",
    ),
    fused(
        "a row that is alone adds its keys",
        "At width 1 the host is harmed.",
        "3.8",
        "s->alone ? 2 * E * D : 0",
        "s->alone ? E * D : 0",
    ),
    fused(
        "the norm after a block is that of the next FFN",
        "Every layer but the first reads a stream that another weight scaled.",
        "5.3",
        "next ? next->input_norm",
        "next ? next->post_norm",
    ),
    fused(
        "the host's eps is the block's",
        "Small residuals are scaled wrongly before a block.",
        "3.2",
        "layer->block_norm, s->block_eps, D)",
        "layer->block_norm, s->eps, D)",
    ),
)
