"""Faults of what training shares, parts and swaps, and of low-rank updates (5.10, 6.10, 7.14 to
7.16): planted in the reference, with shared timesteps computed once, and in what all backends plan.
"""

from mutations.fault import Edit, Fault

GRADIENT = "shared_timesteps_change_no_gradient"
FORWARD = "shared_timesteps_change_no_forward_pass"
PARTS = "logits_in_parts_make_the_same_update"
SWAP = "the_start_stands_in_for_what_was_learnt"
ADDED = "updates_are_added_to_the_hosts_maps"
LEARNT = "updates_have_the_right_gradients"
DECODED = "updates_are_decoded_with"
NEXT = "next_log_probabilities_are_those_of_the_loss"

# The reference computes row by row; what is at fault here is its other form.
ONCE = (
    Edit(
        "train",
        "from bridge_ref.model import Tensors, backward, forward\n",
        "from bridge_ref.model import Tensors\nfrom bridge_ref.once import backward, forward\n",
    ),
    Edit(
        "backend",
        "from bridge_ref.model import block_weights, forward, norm_ratios\n",
        "from bridge_ref.model import block_weights, forward\n"
        "from bridge_ref.once import norm_ratios\n",
    ),
)


def once(name: str, harm: str, clause: str, check: str, *edits: tuple[str, str]) -> Fault:
    """A fault of the reference's form of 7.14."""
    planted = (Edit("once", old, new) for old, new in edits)
    return Fault(name, harm, clause, check, *ONCE, *planted, package="bridge_ref")


def reference(
    name: str, harm: str, clause: str, check: str, module: str, *edits: tuple[str, str]
) -> Fault:
    """A fault of a module of the reference."""
    planted = (Edit(module, old, new) for old, new in edits)
    return Fault(name, harm, clause, check, *planted, package="bridge_ref")


def plan(name: str, harm: str, old: str, new: str) -> Fault:
    """A fault of what all backends plan alike."""
    return Fault(name, harm, "7.14", GRADIENT, Edit("decoding.shared", old, new), package="bridge")


ROWS = (
    once(
        "a shared cell learns from one row alone",
        "A prompt's gradient is an eighth of what it should be in a group of eight.",
        "7.14",
        GRADIENT,
        (
            "np.add.at(dcells[:, 0], cells.places[active], dlogits[active])",
            "dcells[cells.places[active], 0] = dlogits[active]",
        ),
    ),
    once(
        "a row reads the prompt of another group",
        "One user's text leaks into another's training.",
        "7.14",
        GRADIENT,
        ("allowed = of_mine & (self.group[:, None] == self.group)", "allowed = of_mine.copy()"),
    ),
    once(
        "a row attends to what others of its group have alone",
        "Training sees more than decoding can.",
        "7.14",
        GRADIENT,
        ("self.shared | (self.row[:, None] == self.row)", "self.row[:, None] > -1"),
    ),
    once(
        "a row forgets the prompt",
        "Answers are trained without their question.",
        "7.14",
        GRADIENT,
        (
            "self.shared | (self.row[:, None] == self.row)",
            "(self.shared == self.shared[:, None]) & (self.row[:, None] == self.row)",
        ),
    ),
    once(
        "a shared timestep sees those after it",
        "A prompt's first token knows its last: a mask that suits the rest is used for both.",
        "7.14",
        GRADIENT,
        (
            "(self.timestep <= self.timestep[:, None])",
            "(self.shared | (self.timestep <= self.timestep[:, None]))",
        ),
    ),
    once(
        "padding of the shared piece is read",
        "A short prompt changes with the longest of its batch.",
        "7.14",
        GRADIENT,
        ("& self.active & self.active[:, None]", "& self.active[:, None]"),
    ),
    once(
        "a window is counted in cells that are computed",
        "Rows with gaps, or of a short prompt, see further back than in decoding.",
        "5.5",
        GRADIENT,
        (
            "self.position[:, None] - self.position < window",
            "np.subtract.outer(np.arange(len(self.row)), np.arange(len(self.row))) < window",
        ),
    ),
    once(
        "a window does not reach over the prompt's end",
        "The first tokens of an answer lack what is right before them.",
        "5.5",
        GRADIENT,
        (
            "self.position[:, None] - self.position < window",
            "(self.position[:, None] - self.position < window)"
            " & (self.shared == self.shared[:, None])",
        ),
    ),
    once(
        "shared timesteps have no block",
        "Identical rows add the width-1 value, which is not nothing.",
        "3.8",
        GRADIENT,
        (
            "token, cells.met, active, position, attend",
            "token, cells.met, active & ~cells.shared[:, None], position, attend",
        ),
    ),
    once(
        "rows of all groups meet in the block",
        "Once rows begin at their group's own timestep, who is beside whom is easily lost.",
        "3.4",
        GRADIENT,
        ("self.group * (self.timestep.max(initial=0) + 1) + self.timestep", "self.timestep"),
    ),
    once(
        "rows meet at the timestep of the piece, not of the batch",
        "Of two groups in one line, a row reads across at another time than its own.",
        "7.14",
        GRADIENT,
        (
            "self.group * (self.timestep.max(initial=0) + 1) + self.timestep",
            "(self.group + 1) * (self.timestep + 1) % (self.timestep.max(initial=0) + 2)",
        ),
    ),
    once(
        "a shared cell counts once in a mean",
        "The norm ratio of a run depends on how long its prompts are.",
        "7.14",
        FORWARD,
        ("cell_ratios(cache[-1])[cells.places, 0]", "cell_ratios(cache[-1])[:, 0]"),
        ("ratio[active].sum() / max(active.sum(), 1)", "ratio[cells.active].mean()"),
    ),
)
PLAN = (
    plan(
        "the lead is one too long",
        "The first token that rows have of their own is that of the first row.",
        "np.minimum(lead, longest)",
        "np.minimum(lead + 1, longest)",
    ),
    plan(
        "positions are not compared",
        "Rows that stand elsewhere in their texts are rotated as the first one is.",
        "for cells in (only_active(tokens, active), only_active(positions, active)):",
        "for cells in (only_active(tokens, active),):",
    ),
    plan(
        "every group has the lead of the longest",
        "Groups of short prompts lose the beginnings of their answers.",
        "np.minimum.at(lead, grid.line, agreed)",
        "np.minimum.at(lead, grid.line, agreed.max())",
    ),
)
PARTED = (
    Fault(
        "a part of no targets is taken",
        "A setting of 0 trains nothing, or hangs.",
        "7.15",
        PARTS,
        Edit("decoding.inputs", 'take("loss_chunk", loss_chunk)', "loss_chunk"),
        package="bridge",
        through="bridge_ref",
    ),
)
SWAPPED = (
    reference(
        "a swap gives what it was given",
        "The present values are lost, and the run goes on from its start.",
        "7.16",
        SWAP,
        "backend",
        ("before = {name: self._tensors[name].copy() for name in given}", "before = dict(given)"),
    ),
    reference(
        "a swap is not computed with",
        "The reference policy is the present one: the KL is always 0.",
        "7.16",
        SWAP,
        "backend",
        ("self._tensors[name] = array.astype(DTYPES[self.dtype])", "pass"),
    ),
    reference(
        "a swap that is refused is half done",
        "After a mistake, a model is neither what it was nor what was asked.",
        "7.16",
        SWAP,
        "backend",
        (
            "given = check_swap(self.config, tensors, self.dtype, self._narrow)\n"
            "        before = {name: self._tensors[name].copy() for name in given}\n",
            "given, before = {}, {}\n"
            "        for n in tensors:\n"
            "            given |= check_swap(self.config, {n: tensors[n]}, self.dtype)\n"
            "            before[n] = self._tensors[n].copy()\n"
            "            self._tensors[n] = given[n].astype(DTYPES[self.dtype])\n",
        ),
    ),
    reference(
        "an update goes on from what was swapped in",
        "Each look at the reference policy takes training back to its start.",
        "7.16",
        SWAP,
        "train",
        (
            "names = list(self.adamw.master)\n",
            "names = list(self.adamw.master)\n"
            "        for n in names:\n"
            "            own = self.tensors[n]\n"
            "            if (rounded(self.adamw.master[n], own.dtype) != own).any():\n"
            "                self.adamw.master[n] = wide(own)\n",
        ),
    ),
)
UPDATES = (
    reference(
        "an update is scaled by alpha",
        "Every model with LoRA of another trainer says something else here.",
        "5.10",
        ADDED,
        "linear",
        ("return lora.scale if", "return lora.alpha if"),
    ),
    reference(
        "updates of the feed-forward are left out",
        "LoRA is taken for what it once was, updates of attention.",
        "5.10",
        ADDED,
        "linear",
        (
            'name.rpartition(".")[2] in lora.targets',
            '"attn" in name and name.rpartition(".")[2] in lora.targets',
        ),
    ),
    reference(
        "an update replaces its bias",
        "qwen2's queries lose their biases as soon as they have updates.",
        "5.10",
        ADDED,
        "linear",
        (
            'y, cache = ops.linear(x, tensors[f"{name}.weight"], bias)',
            "y, cache = ops.linear(\n"
            '        x, tensors[f"{name}.weight"], None if update_scale(config, name) else bias\n'
            "    )",
        ),
    ),
    reference(
        "nothing flows back through an update",
        "Layers below learn as if it were not there.",
        "5.10",
        LEARNT,
        "linear",
        ("dx = dx + dx_low", "pass"),
    ),
    reference(
        "gradients of an update lack its scale",
        "The rate that is set is another one.",
        "5.10",
        LEARNT,
        "linear",
        ("rounded(scale * wide(dy), dy.dtype), b_cache", "dy, b_cache"),
    ),
    reference(
        "decoders have no updates",
        "Rollouts are of the host, and training is of another policy.",
        "5.10",
        DECODED,
        "decode",
        (
            "self.config, self.tensors = config, tensors\n",
            "object.__setattr__(config := __import__('copy').copy(config), 'lora', None)\n"
            "        self.config, self.tensors = config, tensors\n",
        ),
    ),
)
SCORED = (
    reference(
        "next tokens are scored without the temperature",
        "The gap between rollout and training is that between two temperatures.",
        "6.10",
        NEXT,
        "decode",
        ("log_softmax(self.next_logits / temperature)", "log_softmax(self.next_logits)"),
    ),
    reference(
        "next tokens are scored by logits alone",
        "What is no probability is compared with one.",
        "6.10",
        NEXT,
        "decode",
        ("logp, _ = log_softmax(self.next_logits / temperature)", "logp = self.next_logits"),
    ),
    Fault(
        "next tokens are scored at temperature 0",
        "A division by 0 is written into a run's log.",
        "6.10",
        NEXT,
        Edit(
            "decoding.inputs",
            'if not 0 < temperature < float("inf"):\n        raise BridgeError(f"logprobs',
            'if not 0 <= temperature < float("inf"):\n        raise BridgeError(f"logprobs',
        ),
        package="bridge",
        through="bridge_ref",
    ),
)
FAULTS = ROWS + PLAN + PARTED + SWAPPED + UPDATES + SCORED
