"""Faults of cached decoding (chapter 4): prefixes, caches, positions, and rows that end."""

from mutations.fault import Edit, Fault

CACHED = "cached_decoding_equals_teacher_forcing"
SHARED = "a_prompt_is_prefilled_once_for_its_group"
DRAWN = "what_was_sampled_is_what_is_fed"
LEAVE = """\
            self.cache.keep(places)
            fed = fed.index_select(0, torch.from_numpy(places).to(device))
            self.next_logits = self.next_logits[: len(places)]
            self._rows_changed()
        self._forget()
        self.fed = fed if len(fed) else None"""
POSITIONS = "torch.from_numpy(rows.positions)"
LOST = "p0, t0 = lost_to_window(window, P, T)"
CHECKED = "kept, back = check_advance(V, rows.group, rows.left, self.drawn, tokens, keep, back)"
MOVED = "self.own[:, :, new, :, :step] = self.own[:, :, old, :, :step]"


def decode(old: str, new: str) -> Edit:
    """An edit of `decode.py`."""
    return Edit("decode", old, new)


def step(old: str, new: str) -> Edit:
    """An edit of `step.py`."""
    return Edit("step", old, new)


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
            "            logits = self.forward(self.weights, self.cache, fed)\n"
            "            self.cache.rows = self.cache.rows.fed(1)\n"
            "            self.cache.keep(places)\n"
            "            self.cache.rows = self.cache.rows.fed(-1)\n"
            "            self._rows_changed()\n"
            "            self.next_logits = logits[torch.from_numpy(places)]\n"
            "            fed = fed[:0]\n"
            "        self._forget()\n"
            "        self.fed = fed if len(fed) else None",
        ),
    ),
    Fault(
        "the block is left out while decoding",
        "Rows are trained to share, and answer alone.",
        "4.1",
        CACHED,
        step("if layer.block is not None:", "if False:"),
    ),
    Fault(
        "prompts of a request are one group",
        "One user's prompt is read into another's.",
        "4.2",
        SHARED,
        decode(
            "weights.cells(np.arange(len(prompts)), active",
            "weights.cells(np.zeros(len(prompts), int), active",
        ),
    ),
    Fault(
        "caches stay where they were",
        "After a row ends, those after it remember somebody else's text.",
        "4.3",
        CACHED,
        cache("if new != old:\n                step =", "if False:\n                step ="),
    ),
    Fault(
        "the latest timestep is not moved",
        "After a row ends, those after it forget their last token but one.",
        "4.3",
        CACHED,
        cache("step = steps[old]", "step = max(steps[old] - 1, 0)"),
    ),
    Fault(
        "prefixes stay where they were",
        "After a prompt's rows have all ended, others go on from its prompt.",
        "4.3",
        CACHED,
        cache("self.prefix[:, :, new] = self.prefix[:, :, old]", "pass"),
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
        cache(
            "        self._lay_out()\n\n    def back",
            "        padding = self.padding\n"
            "        self._lay_out()\n"
            "        self.padding = None if padding is None else padding[: len(prompts)]\n\n"
            "    def back",
        ),
    ),
    Fault(
        "padding of prompts is read",
        "A short prompt beside a long one is answered differently.",
        "4.1",
        CACHED,
        step("if hidden is not None:", "if False:"),
    ),
    Fault(
        "prompts are read at padded positions",
        "A short prompt beside a long one leaves a gap before its answer.",
        "2.4",
        CACHED,
        decode("active, positions)", "active, positions + lengths.max() - lengths[:, None])"),
    ),
    Fault(
        "generated tokens are one position late",
        "A gap between every prompt and its answer.",
        "2.4",
        CACHED,
        step(POSITIONS, POSITIONS.replace("positions", "positions + 1")),
    ),
    Fault(
        "positions stand still",
        "Every generated token is read where the prompt ended.",
        "2.4",
        CACHED,
        step(POSITIONS, POSITIONS.replace("positions", "positions - rows.steps")),
    ),
    Fault(
        "cached windows are one too wide",
        "Decoding reads a token that training never let it see.",
        "5.5",
        CACHED,
        cache(LOST, LOST.replace("T)", "T - 1)")),
    ),
    Fault(
        "windows do not reach the prompt",
        "Long prompts are read in full for ever.",
        "5.5",
        CACHED,
        cache(LOST, LOST + "\n            p0 = 0"),
    ),
    Fault(
        "prompt and answer have softmaxes of their own",
        "The two halves of a row's past weigh the same whatever they hold.",
        "4.1",
        CACHED,
        step(
            "p = score.softmax(-1).to(q.dtype)",
            "p = torch.cat([part.softmax(-1) for part in score.split([P, T], -1)], -1)\n"
            "        p = p.to(q.dtype) / 2",
        ),
    ),
    Fault(
        "a draw advances",
        "Drawing twice to choose between two tokens feeds one of them.",
        "10.1",
        DRAWN,
        decode(
            "return self.drawn[:, 0].copy()",
            "tokens = self.drawn[:, 0].copy()\n"
            "        if (rows.left > 0).all():\n"
            "            self.advance()\n"
            "        return tokens",
        ),
    ),
    Fault(
        "the likeliest token is fed",
        "The text that is shown is not the text that is read on.",
        "10.1",
        DRAWN,
        decode("fed = self.next_tokens\n", "fed = self.next_logits.argmax(-1)\n"),
    ),
    Fault(
        "prompts past the context are taken",
        "Positions that the model was never trained on are read without a word.",
        "4.4",
        "what_is_out_of_bounds_is_refused",
        decode("check_prompts(self.weights.config, prompts, widths, max_new_tokens)", "pass"),
    ),
    Fault(
        "whatever is given is fed",
        "Tokens of another batch, and past the cache's end, go where memory ends.",
        "10.1",
        "what_is_out_of_bounds_is_refused",
        decode(
            CHECKED,
            "kept = np.ones(len(rows), bool) if keep is None else keep\n"
            "        back = np.zeros(len(rows), int)",
        ),
    ),
    Fault(
        "what stands for dropped rows is refused",
        "A row that ended cannot leave: its next token, which nobody drew, is no token.",
        "10.1",
        "ended_rows_leave_other_groups_unchanged",
        decode(
            CHECKED,
            CHECKED.replace("keep,", "None,")
            + "\n        kept = kept if keep is None else np.asarray(keep)",
        ),
    ),
)
