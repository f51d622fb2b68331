"""Faults of groups that come to a decoder under way, and of settings a row (clauses 4.5, 6.9 and
10.1): in what all backends plan alike, and in torch's two steps."""

from mutations.fault import Edit, Fault
from mutations.faults_decode import POSITIONS, cache, decode, rows, step

COMES = "groups_that_come_are_answered_as_if_alone"
HELD = "what_others_held_does_not_reach_a_group"
DRAWN = "rows_draw_by_settings_of_their_own"
REFUSED = "what_may_not_come_is_refused"
JOINED = "        return Rows(**both)\n"

PLANNED = (
    Fault(
        "groups that come are taken for those that are there",
        "One user's rows read those of another who came later.",
        "4.5",
        COMES,
        rows('both["group"][len(self) :] += len(self.lengths)', "pass"),
        package="bridge",
    ),
    Fault(
        "rows that come are at the step of those that are there",
        "An answer begins with a gap, as long as the answers beside it.",
        "4.5",
        COMES,
        rows(
            JOINED,
            '        both["steps"][len(self) :] = self.steps.max(initial=0)\n' + JOINED,
        ),
        package="bridge",
    ),
    Fault(
        "rows that come may have what those that are there may",
        "A request for 10 tokens gets 1,000, since another asked for them.",
        "10.1",
        REFUSED,
        rows(JOINED, '        both["limits"][:] = both["limits"].max()\n' + JOINED),
        package="bridge",
        through="bridge_ref",  # torch's fused step would write past its caches
    ),
    Fault(
        "rows that come draw by the step of those that are there",
        "An answer changes with how far its neighbours were when it began.",
        "6.2",
        DRAWN,
        Edit("decoding.uniforms", "seeds, steps + later,", "seeds, steps[:1] + later,"),
        package="bridge",
    ),
    Fault(
        "all rows draw by the first one's seed",
        "Of requests that run together only one gets what its seed gives.",
        "6.9",
        DRAWN,
        Edit("decoding.uniforms", "[one.seed for one in", "[sampling[0].seed for _ in"),
        package="bridge",
    ),
    Fault(
        "all rows draw by the first one's settings",
        "A greedy request beside a hot one is answered hot.",
        "6.9",
        DRAWN,
        Edit("decoding.uniforms", "if len(rows) == 1:", "if rows:"),
        Edit("decoding.uniforms", "[(one, None) for one in rows]", "[(next(iter(rows)), None)]"),
        package="bridge",
    ),
    Fault(
        "rows of one temperature draw by the filters of the first of them",
        "Top-p is lost where somebody else has the same temperature.",
        "6.9",
        DRAWN,
        Edit(
            "decoding.uniforms",
            "rows.setdefault(replace(one, seed=0) if one.seed else one, [])",
            "rows.setdefault(\n"
            "            next((o for o in rows if o.temperature == one.temperature), one), []\n"
            "        )",
        ),
        package="bridge",
    ),
    Fault(
        "more settings than rows are taken",
        "A scheduler that lost count draws for rows that left.",
        "10.1",
        REFUSED,
        Edit("decoding.uniforms", "if len(sampling) != rows:", "if len(sampling) < rows:"),
        Edit("decoding.uniforms", "for one in sampling], np", "for one in sampling[:rows]], np"),
        package="bridge",
    ),
)

TORCH = (
    Fault(
        "rows that come write where the first row does",
        "What they say lands behind a gap, and the gap is read.",
        "4.5",
        COMES,
        step(
            "at = int(rows.steps[0]) if rows.in_step else", "at = int(rows.steps[0]) if True else"
        ),
    ),
    Fault(
        "rows that come stand at the positions of those furthest on",
        "A new answer is read as if it were an old one.",
        "2.4",
        COMES,
        step(POSITIONS, "torch.from_numpy(rows.lengths[rows.group] + rows.steps.max())"),
    ),
    Fault(
        "places of timesteps that were not yet are read",
        "Rows that came later read as many zeros as they came late.",
        "4.5",
        COMES,
        cache("hidden = (back < 0) | (back >=", "hidden = (back >= np.inf) | (back >="),
    ),
    Fault(
        "windows are counted from the row furthest on",
        "Rows that came later lose what is inside their windows.",
        "5.5",
        COMES,
        cache("back = steps - np.arange(-P, T)", "back = steps.max() - np.arange(-P, T)"),
    ),
    Fault(
        "prompts do not move to the end of longer places",
        "A long prompt that comes takes the end off those that are there.",
        "4.5",
        COMES,
        cache("slice(-slots, None) if at_end else slice(slots)", "slice(slots)"),
    ),
    Fault(
        "logits of groups that come stand before the others",
        "The first token of a new answer is drawn for an old one.",
        "10.1",
        COMES,
        decode(
            "torch.cat([self.next_logits, last.index_select(0, group)])",
            "torch.cat([last.index_select(0, group), self.next_logits])",
        ),
    ),
    Fault(
        "places that are used again are not cleared",
        "One answer that broke down breaks all that come after it.",
        "4.5",
        HELD,
        cache("cache[:, :, used:count] = 0", "pass"),
    ),
    Fault(
        "what a row leaves behind as it moves is kept",
        "A row that takes the place of a longer one multiplies its numbers by 0, NaN too.",
        "4.5",
        HELD,
        cache("self.own[:, :, new, :, step : steps[new]] = 0", "pass"),
    ),
    Fault(
        "rows alike draw by the luck of the first rows",
        "Of requests that run together, answers change with the settings of others.",
        "6.9",
        DRAWN,
        Edit("sampling", "uniform[rows], settings)", "uniform[: len(rows)], settings)"),
    ),
    Fault(
        "a draw outlives the coming of a group",
        "What is fed next was drawn for others.",
        "10.1",
        REFUSED,
        decode(
            "        self._forget()\n\n    def _forget",
            '        if not hasattr(self, "drawn"):\n            self._forget()\n\n    def _forget',
        ),
    ),
    Fault(
        "fused step: rows that come write where the first row does",
        "What they say lands behind a gap, and the gap is read.",
        "4.5",
        COMES,
        Edit(
            "fused.c", "step = s->steps[r];", "step = s->steps[0] < T ? s->steps[0] : s->steps[r];"
        ),
    ),
)

FAULTS = (*PLANNED, *TORCH)
