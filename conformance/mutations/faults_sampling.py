"""Faults of sampling (chapter 6): filters, ties, the draw, and its one source of randomness."""

from mutations.fault import Edit, Fault

SAMPLED = "sampled_tokens_follow_the_rule"
UNIFORMS = "uniforms(seeds, steps + later, self.row_ids, self.prompt_ids)"
FLOOR = "w.masked_fill_(w < nucleus_floor(w, sampling.top_p), 0)"
MIN_P = "w.masked_fill_(w < sampling.min_p, 0)"


def sampling(old: str, new: str) -> Edit:
    """An edit of `sampling.py`."""
    return Edit("sampling", old, new)


def tabulated(new: str) -> Edit:
    """An edit of how `bridge/decoding/uniforms.py`, which all backends share, calls Philox."""
    return Edit("decoding.uniforms", UNIFORMS, new)


FAULTS = (
    Fault(
        "step and row are swapped",
        "The same seed gives another text than every other backend.",
        "6.2",
        SAMPLED,
        tabulated("uniforms(seeds, self.row_ids, steps + later, self.prompt_ids)"),
        package="bridge",
    ),
    Fault(
        "prompts share their numbers",
        "Two prompts of a request get the same luck in every row.",
        "6.2",
        SAMPLED,
        tabulated("uniforms(seeds, steps + later, self.row_ids, 0 * self.prompt_ids)"),
        package="bridge",
    ),
    Fault(
        "rows share their numbers",
        "All rows of a group write the same text.",
        "6.2",
        SAMPLED,
        tabulated("uniforms(seeds, steps + later, 0 * self.row_ids, self.prompt_ids)"),
        package="bridge",
    ),
    Fault(
        "prompts are numbered by their place in the batch",
        "An answer changes when its request is split over two batches.",
        "6.2",
        SAMPLED,
        Edit("decoding.rows", "if prompt_ids is None else", "if True else"),
        package="bridge",
    ),
    Fault(
        "rows are renumbered when others end",
        "An answer changes with the moment at which its neighbours end.",
        "6.2",
        SAMPLED,
        Edit(
            "decoding.rows",
            "[rows] for name in own}",
            '[rows] for name in own} | {"row_ids": np.arange(len(rows))}',
        ),
        package="bridge",
    ),
    Fault(
        "half of the seed is dropped",
        "Seeds that differ in their upper 32 bits give one text.",
        "6.1",
        SAMPLED,
        tabulated(UNIFORMS.replace("seeds", "seeds & np.uint64(0xFFFFFFFF)")),
        package="bridge",
    ),
    Fault(
        "numbers start with the first draw",
        "A text that goes on from given tokens differs from one drawn from the start.",
        "6.2",
        SAMPLED,
        Edit(
            "decode",
            "rows.steps, seeds_of(sampling, len(rows)))",
            "np.maximum(rows.steps - 1, 0), seeds_of(sampling, len(rows)))",
        ),
    ),
    Fault(
        "filters come before the temperature",
        "A hot temperature does not widen the nucleus, a cold one does not narrow it.",
        "6.7",
        SAMPLED,
        sampling(
            "w.div_(max(sampling.temperature, torch.finfo(z.dtype).tiny)).exp_()",
            "w.exp_()",
        ),
        sampling("    return w\n\n\ndef", "    return w ** (1 / sampling.temperature)\n\n\ndef"),
    ),
    Fault(
        "top-p comes before top-k",
        "With both filters on, tokens stay that the spec leaves out.",
        "6.7",
        SAMPLED,
        sampling(
            "    if cut is not None:\n",
            f"    if sampling.top_p is not None:\n        {FLOOR}\n    if cut is not None:\n",
        ),
        sampling("if sampling.top_p is not None and sampling.top_p < 1:", "if False:"),
    ),
    Fault(
        "top-k cuts ties",
        "Which of two equal tokens can be drawn depends on a sort.",
        "6.4",
        SAMPLED,
        sampling(
            "cut = z < z.topk(sampling.top_k, sorted=True).values[:, -1:]",
            "kept = z.topk(sampling.top_k, sorted=True).indices\n"
            "        cut = torch.ones_like(z, dtype=torch.bool).scatter(-1, kept, False)",
        ),
    ),
    Fault(
        "top-k keeps one more",
        "A filter of one token is not greedy.",
        "6.4",
        SAMPLED,
        sampling("z.topk(sampling.top_k,", "z.topk(sampling.top_k + 1,"),
    ),
    Fault(
        "top-p keeps one token too few",
        "The token that completes the nucleus can never be drawn.",
        "6.5",
        SAMPLED,
        sampling("(before < top_p)", "(share < top_p)"),
    ),
    Fault(
        "top-p cuts ties",
        "Which of two equal tokens can be drawn depends on a sort.",
        "6.5",
        SAMPLED,
        sampling(
            FLOOR,
            "order = w.argsort(dim=-1, descending=True, stable=True)\n"
            "        ranked = w.gather(-1, order)\n"
            "        before = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True)\n"
            "        late = before >= sampling.top_p\n"
            "        late = late.scatter(-1, order, late)\n"
            "        w.masked_fill_(late, 0)",
        ),
    ),
    Fault(
        "min-p asks for a probability",
        "Flat distributions lose all but their head.",
        "6.6",
        SAMPLED,
        sampling(MIN_P, "w.masked_fill_(w / w.sum(-1, keepdim=True) < sampling.min_p, 0)"),
    ),
    Fault(
        "tokens are drawn in order of weight",
        "The right distribution, and other tokens than every other backend.",
        "6.7",
        SAMPLED,
        sampling(
            '    if w.device.type != "cpu":',
            "    w, order = w.sort(-1, descending=True)\n    if False:",
        ),
        sampling(
            "return found[:, 0].clamp_(max=cumulative.shape[-1] - 1)",
            "return order.gather(-1, found.clamp_(max=cumulative.shape[-1] - 1))[:, 0]",
        ),
    ),
    Fault(
        "of equal logits the highest id wins",
        "Greedy texts differ between backends as soon as two logits tie.",
        "6.8",
        SAMPLED,
        sampling(
            "return logits.argmax(-1)", "return logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)"
        ),
    ),
    Fault(
        "temperature 0 still draws",
        "Greedy decoding is not.",
        "6.8",
        SAMPLED,
        sampling("if sampling.temperature == 0:", "if False:"),
        sampling(
            "w.div_(max(sampling.temperature, torch", "w.div_(max(sampling.temperature or 1, torch"
        ),
    ),
)
