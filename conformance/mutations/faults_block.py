"""Faults of the block alone (chapter 3): what each row reads from its group, and how."""

from mutations.fault import Edit, Fault

BLOCK = "block_is_within_the_numerics_rule"
RATIOS = "norm_ratios_are_within_the_numerics_rule"
ATTENTION = "return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)"
OWN_ZEROS = "return keys | torch.eye(N, dtype=torch.bool, device=keys.device)"
# Makes a mask also where all rows of a batch are active and groups are equal.
ALWAYS_MASKED = (
    Edit("block", "if active is None and grid.filled is None:", "if False:"),
    Edit("block", "torch.ones((), dtype=torch.bool)", "torch.ones(G, N, S, dtype=torch.bool)"),
)


def block(old: str, new: str) -> Edit:
    """An edit of `block.py`."""
    return Edit("block", old, new)


def packed(old: str, new: str) -> Edit:
    """An edit of `packed.py`."""
    return Edit("packed", old, new)


FAULTS = (
    Fault(
        "scores are not scaled",
        "Wide heads make attention nearly one-hot: trained weights read a single row.",
        "3.3",
        BLOCK,
        block(ATTENTION, ATTENTION.replace("mask)", "mask, scale=1.0)")),
    ),
    Fault(
        "scores are scaled by all heads",
        "Blocks with more than one head attend too evenly.",
        "3.3",
        BLOCK,
        block(
            ATTENTION,
            ATTENTION.replace("mask)", "mask, scale=(q.shape[1] * q.shape[3]) ** -0.5)"),
        ),
    ),
    Fault(
        "queries and keys are swapped",
        "Each row is weighed by who looks at it instead of by what it looks for.",
        "3.3",
        BLOCK,
        block(ATTENTION, ATTENTION.replace("(q, k, v", "(k, q, v")),
    ),
    Fault(
        "heads are interleaved",
        "Checkpoints of others load, and every head mixes numbers of all of them.",
        "3.3",
        BLOCK,
        block("S, H, -1).permute(0, 2, 3, 1, 4)", "S, -1, H).permute(0, 2, 4, 1, 3)"),
    ),
    Fault(
        "rope on the block",
        "Rows are no longer exchangeable: an answer depends on its place in the batch.",
        "3.3",
        BLOCK,
        block(
            ATTENTION,
            "half, angle = q.shape[3] // 2, torch.arange(q.shape[2])[:, None].to(q)\n"
            "    def turn(x):\n"
            "        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]\n"
            "        c, s = angle.cos(), angle.sin()\n"
            "        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)\n"
            "    q, k = turn(q), turn(k)\n"
            f"    {ATTENTION}",
        ),
    ),
    Fault(
        "keys and values of the timestep before",
        "A row reads what others thought one token ago.",
        "3.3",
        "timesteps_do_not_mix_in_the_block",
        block(
            "map(in_grid, parts)",
            "map(in_grid, (parts[0], *(part.roll(1, 1) for part in parts[1:])))",
        ),
    ),
    Fault(
        "groups are ignored",
        "Rows of different prompts read each other: one user's text leaks into another's answer.",
        "3.4",
        BLOCK,
        block("GridPlan.of(groups)", "GridPlan.of(np.zeros_like(groups))"),
    ),
    Fault(
        "empty places of a short group are read",
        "With groups of unequal width, the short ones read their first row several times.",
        "3.4",
        BLOCK,
        block("None if plan.full else", "None if True else"),
    ),
    Fault(
        "finished rows keep their share",
        "Rows that ended go on taking weight from those that are still writing.",
        "3.4",
        BLOCK,
        block(
            "keys = grid.spread(active).reshape(G, N, S)",
            "keys = torch.ones_like(grid.spread(active)).reshape(G, N, S)",
        ),
    ),
    Fault(
        "a row does not read itself",
        "A group of two swaps its thoughts instead of sharing them.",
        "3.4",
        BLOCK,
        *ALWAYS_MASKED,
        block(
            OWN_ZEROS,
            "own = torch.eye(N, dtype=torch.bool, device=keys.device)\n"
            "    others = keys & ~own\n"
            "    return others | own & ~others.any(-1, keepdim=True)",
        ),
    ),
    Fault(
        "rows read only rows above them",
        "Whoever comes first in a group never hears of the others.",
        "3.4",
        "permuting_rows_permutes_the_block",
        *ALWAYS_MASKED,
        block(
            OWN_ZEROS,
            "eye = torch.eye(N, dtype=torch.bool, device=keys.device)\n"
            "    return keys & eye.new_ones(N, N).tril() | eye",
        ),
    ),
    Fault(
        "padding is multiplied by zero",
        "A NaN in a padded cell becomes the NaN of a whole group.",
        "3.4",
        "blocked_rows_have_no_influence_on_the_block",
        block("else x.masked_fill(~active[..., None], 0)", "else x * active[..., None]"),
    ),
    Fault(
        "softmax in the compute dtype",
        "In bfloat16 a sum of weights stalls at 256: wide groups are read several times over.",
        "3.5",
        "identical_rows_give_the_width_one_result",
        block(
            ATTENTION,
            "score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5\n"
            "    if mask is not None:\n"
            "        score = score.masked_fill(~mask, float('-inf'))\n"
            "    weight = (score - score.amax(-1, keepdim=True)).exp()\n"
            "    total = torch.zeros_like(weight[..., 0])\n"
            "    for column in weight.unbind(-1):\n"
            "        total = total + column\n"
            "    return (weight / total[..., None]) @ v",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "the norm is left out",
        "Blocks see a stream that grows from layer to layer.",
        "3.2",
        BLOCK,
        block("x = rms_norm(x, self.norm, self.eps)", "x = x * self.norm"),
    ),
    Fault(
        "the norm comes after the projection",
        "Queries, keys and values all get length one.",
        "3.2",
        BLOCK,
        block(
            "        x = rms_norm(x, self.norm, self.eps)\n",
            "        x = x * self.norm\n",
        ),
        block(
            "x = self.inward(x)\n",
            "x = self.inward(x)\n        x = rms_norm(x, torch.ones_like(x[0, 0]), self.eps)\n",
        ),
    ),
    Fault(
        "the norm's weight is left out",
        "What the block's norm has learnt has no effect.",
        "3.2",
        BLOCK,
        block(
            "rms_norm(x, self.norm, self.eps)", "rms_norm(x, torch.ones_like(self.norm), self.eps)"
        ),
    ),
    Fault(
        "eps is left out",
        "A zero residual, as padding has, gives NaN.",
        "3.2",
        BLOCK,
        block("_scalar(eps, norm.dtype)", "_scalar(0.0, norm.dtype)"),
    ),
    Fault(
        "the host's eps in the block",
        "Checkpoints whose norm_eps differs from the host's are computed slightly wrongly.",
        "3.2",
        BLOCK,
        block("Norm(D, bridge.norm_eps)", "Norm(D, config.rms_norm_eps)"),
    ),
    Fault(
        "the norm subtracts the mean",
        "LayerNorm in place of RMS norm.",
        "3.2",
        BLOCK,
        block(
            "rms_norm(x, self.norm, self.eps)",
            "rms_norm(x - x.mean(-1, keepdim=True), self.norm, self.eps)",
        ),
    ),
    Fault(
        "inactive rows get output",
        "Padded cells drift, and what is cached of them with them.",
        "3.6",
        BLOCK,
        block("cleared(self.outward(x), active)", "self.outward(x)"),
    ),
    Fault(
        "the block replaces the stream",
        "The residual connection is gone: fresh blocks erase the host.",
        "3.6",
        BLOCK,
        block("return self.outward.add_to(hidden, x)", "return self.outward(x)"),
        block("return hidden + cleared(self", "return cleared(self"),
    ),
    Fault(
        "the block's output is transposed where it is square",
        "Models with H d = D load without complaint and compute another map.",
        "2.1",
        BLOCK,
        Edit(
            "model",
            "{name: get(name) for name in tensor_shapes(config)}",
            "{\n"
            "            n: get(n).T.contiguous()\n"
            "            if n.endswith(('bridge.o_proj.weight', 'bridge.down_proj.weight'))\n"
            "            and s[1:] == s[:1] else get(n)\n"
            "            for n, s in tensor_shapes(config).items()\n"
            "        }",
        ),
    ),
    Fault(
        "P-Match with another activation",
        "The baseline of equal size is another one than the paper's.",
        "8.1",
        BLOCK,
        block("return F.silu(", "return F.gelu("),
    ),
    Fault(
        "the norm ratio counts what rows share once",
        "The wider a group, the less its prompt speaks for it.",
        "7.14",
        "shared_timesteps_change_no_forward_pass",
        packed("(ratio * rows).sum() / rows.sum().clamp(min=1)", "ratio.mean()"),
    ),
    Fault(
        "the norm ratio is one of sums",
        "A few cells of long residuals, first tokens above all, speak for all others.",
        "3.9",
        RATIOS,
        packed(
            "ratio = (added / before)",
            "ratio = (added[before > 0].sum() / before.sum()).expand(before.shape)",
        ),
    ),
    Fault(
        "the norm ratio is of the block's result",
        "A block that adds nothing shows a ratio of 1.",
        "3.9",
        RATIOS,
        packed("for z in (y, h))", "for z in (h + y, h))"),
    ),
    Fault(
        "the norm ratio divides by the block's result",
        "However much a block adds, its ratio stays near 1.",
        "3.9",
        RATIOS,
        packed("for z in (y, h))", "for z in (y, h + y))"),
    ),
    Fault(
        "norm ratios of a stream that lacks the blocks before",
        "Figures of layers that the model does not compute.",
        "3.9",
        RATIOS,
        packed("                h = h + y\n", ""),
    ),
)
