"""Faults of cached decoding (chapter 4): prefixes, caches, positions, and rows that end."""

from mutations.fault import Edit, Fault

CACHED = "cached_decoding_equals_teacher_forcing"
SHARED = "a_prompt_is_prefilled_once_for_its_group"
DRAWN = "what_was_sampled_is_what_is_fed"
LEAVE = """\
            fed = fed.index_select(0, torch.from_numpy(kept).to(device))
            cache.compact(kept)
            self.uniforms = self._uniforms()
        if len(cache.rows) == 0:"""
POSITIONS = "cache.rows.positions(cache.step)"
LOST = "p0, t0 = lost_to_window(window, P, T)"


def decode(old: str, new: str) -> Edit:
    """An edit of `decode.py`."""
    return Edit("decode", old, new)


def cache(old: str, new: str) -> Edit:
    """An edit of `cache.py`."""
    return Edit("cache", old, new)


def rows(old: str, new: str) -> Edit:
    """An edit of the plan that all backends share, in `bridge/decoding/rows.py`."""
    return Edit("decoding.rows", old, new)


FAULTS = (
    Fault(
        "EOS is fed",
        "A row that ended is read by its group for one timestep more than training ever showed.",
        "4.3",
        CACHED,
        decode(
            LEAVE,
            "            logits = self.forward(self.weights, cache, fed)\n"
            "            cache.step += 1\n"
            "            cache.compact(kept)\n"
            "            cache.step -= 1\n"
            "            self.uniforms = self._uniforms()\n"
            "            self.next_logits = logits[torch.from_numpy(kept)]\n"
            "        elif len(cache.rows) == 0:",
        ),
    ),
    Fault(
        "the block is left out while decoding",
        "Rows are trained to share, and answer alone.",
        "4.1",
        CACHED,
        decode("if layer.block is not None:", "if False:"),
    ),
    Fault(
        "prompts of a request are one group",
        "One user's prompt is read into another's.",
        "4.2",
        SHARED,
        decode("weights.cells(np.arange(G), active", "weights.cells(np.zeros(G, int), active"),
    ),
    Fault(
        "caches stay where they were",
        "After a row ends, those after it remember somebody else's text.",
        "4.3",
        CACHED,
        cache("if new != old:", "if False:"),
    ),
    Fault(
        "the latest timestep is not moved",
        "After a row ends, those after it forget their last token but one.",
        "4.3",
        CACHED,
        cache(
            "self.own[:, :, new, :, : self.step] = self.own[:, :, old, :, : self.step]",
            "n = max(self.step - 1, 0)\n"
            "                self.own[:, :, new, :, :n] = self.own[:, :, old, :, :n]",
        ),
    ),
    Fault(
        "prefixes stay where they were",
        "After a prompt's rows have all ended, others go on from its prompt.",
        "4.3",
        CACHED,
        cache("self.prefix.index_select(2, left)", "self.prefix[:, :, : len(left)]"),
    ),
    Fault(
        "lengths stay where they were",
        "After a prompt's rows have all ended, others jump to its positions.",
        "4.3",
        CACHED,
        rows("lengths=self.lengths[prompts]", "lengths=self.lengths[: len(prompts)]"),
        package="bridge",
    ),
    Fault(
        "padding stays where it was",
        "After a prompt's rows have all ended, others lose the start of theirs, or read padding.",
        "4.3",
        CACHED,
        cache("self.padding.index_select(0, left)", "self.padding[: len(left)]"),
    ),
    Fault(
        "padding of prompts is read",
        "A short prompt beside a long one is answered differently.",
        "4.1",
        CACHED,
        decode("if cache.padding is not None:", "if False:"),
    ),
    Fault(
        "prompts are read at padded positions",
        "A short prompt beside a long one leaves a gap before its answer.",
        "2.4",
        CACHED,
        rows(
            "active, default_positions(active))",
            "active, np.broadcast_to(np.arange(P), active.shape))",
        ),
        package="bridge",
    ),
    Fault(
        "generated tokens are one position late",
        "A gap between every prompt and its answer.",
        "2.4",
        CACHED,
        decode(POSITIONS, POSITIONS.replace("step", "step + 1")),
    ),
    Fault(
        "positions stand still",
        "Every generated token is read where the prompt ended.",
        "2.4",
        CACHED,
        decode(POSITIONS, POSITIONS.replace("cache.step", "0")),
    ),
    Fault(
        "cached windows are one too wide",
        "Decoding reads a token that training never let it see.",
        "5.5",
        CACHED,
        decode(LOST, LOST.replace("T)", "T - 1)")),
    ),
    Fault(
        "windows do not reach the prompt",
        "Long prompts are read in full for ever.",
        "5.5",
        CACHED,
        decode(LOST, LOST + "\n    p0 = 0"),
    ),
    Fault(
        "prompt and answer have softmaxes of their own",
        "The two halves of a row's past weigh the same whatever they hold.",
        "4.1",
        CACHED,
        decode(
            "p = score.softmax(-1).to(q.dtype)",
            "p = torch.cat([part.softmax(-1) for part in score.split([P - p0, T - t0], -1)], -1)\n"
            "    p = p.to(q.dtype) / 2",
        ),
    ),
    Fault(
        "a draw advances",
        "Drawing twice to choose between two tokens feeds one of them.",
        "10.1",
        DRAWN,
        decode(
            "return self.drawn.cpu().numpy().copy()",
            "tokens = self.drawn.cpu().numpy().copy()\n"
            "        if self.cache.step < self.cache.own.shape[4]:\n"
            "            self.advance()\n"
            "        return tokens",
        ),
    ),
    Fault(
        "the likeliest token is fed",
        "The text that is shown is not the text that is read on.",
        "10.1",
        DRAWN,
        decode("fed = self.drawn\n", "fed = self.next_logits.argmax(-1)\n"),
    ),
    Fault(
        "prompts past the context are taken",
        "Positions that the model was never trained on are read without a word.",
        "4.4",
        "what_is_out_of_bounds_is_refused",
        decode("check_prompts(weights.config, prompts, widths, max_new_tokens)", "pass"),
    ),
    Fault(
        "whatever is given is fed",
        "Tokens of another batch, and past the cache's end, go where memory ends.",
        "10.1",
        "what_is_out_of_bounds_is_refused",
        decode(
            "check_advance(V, cache.rows.group, cache.rows.left, drawn, tokens, keep, None)", "pass"
        ),
    ),
    Fault(
        "what stands for dropped rows is refused",
        "A row that ended cannot leave: its next token, which nobody drew, is no token.",
        "10.1",
        "ended_rows_leave_other_groups_unchanged",
        decode("left, tokens, keep)", "left, tokens, None)"),
    ),
)
