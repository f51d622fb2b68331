"""Faults of the host, of where blocks stand in it, and of its tensors (chapters 2, 3, 5, 9)."""

from mutations.fault import Edit, Fault

LOGITS = "logits_are_within_the_numerics_rule"
TENSORS = "tensors_come_back_byte_for_byte"
FFN = "            h = layer.feed_forward(h)\n"
BLOCK = """\
            if layer.block is not None:
                h = layer.block(h, cells.grid, cells.active)
        return h"""
FREQUENCIES = "frequencies, factor = inverse_frequencies(rope, head_dim)"
HEADS_FIRST = "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)"


def model(old: str, new: str) -> Edit:
    """An edit of `model.py`."""
    return Edit("model", old, new)


def cells(old: str, new: str) -> Edit:
    """An edit of `cells.py`."""
    return Edit("cells", old, new)


def rope(old: str, new: str) -> Edit:
    """An edit of the tables that all backends share, in `bridge/rope.py`."""
    return Edit("rope", old, new)


def packed(old: str, new: str) -> Edit:
    """An edit of `packed.py`."""
    return Edit("packed", old, new)


FAULTS = (
    Fault(
        "the block comes before the FFN",
        "Weights trained elsewhere act on a stream that they have never seen.",
        "3.7",
        LOGITS,
        packed(FFN + BLOCK, BLOCK.replace("        return h", FFN) + "        return h"),
    ),
    Fault(
        "the block reads the stream before the FFN",
        "What the FFN has just added is shared one layer late.",
        "3.7",
        LOGITS,
        packed(
            FFN + BLOCK,
            "            before, h = h, layer.feed_forward(h)\n"
            + BLOCK.replace(
                "layer.block(h, cells.grid, cells.active)",
                "h + layer.block(before, cells.grid, cells.active) - before",
            ),
        ),
    ),
    Fault(
        "one timestep ahead is read",
        "Training sees the answer; decoding cannot.",
        "5.4",
        "no_future_timestep_influences_an_earlier_one",
        cells(".tril()[None]", ".tril(1)[None]"),
    ),
    Fault(
        "padding on the left is read",
        "An answer depends on how long the other prompts of its batch are.",
        "5.4",
        "inactive_cells_have_no_influence",
        cells("mask = mask & on[:, None, :]", "pass"),
    ),
    Fault(
        "positions of inactive cells are looked up",
        "What a batch is padded with decides whether it is computed at all.",
        "2.3",
        "inactive_cells_have_no_influence",
        cells("positions = only_active(positions, active)", "pass"),
    ),
    Fault(
        "positions that are given are ignored",
        "Rows with gaps are read as if they had none.",
        "2.4",
        LOGITS,
        cells(
            "place = torch.tensor(positions, dtype=torch.int64, device=device)",
            "place = torch.arange(S).expand(len(positions), S)",
        ),
    ),
    Fault(
        "query heads read key heads by modulo",
        "Every checkpoint with fewer key heads than query heads is scrambled.",
        "5.4",
        LOGITS,
        cells(
            HEADS_FIRST,
            f"{HEADS_FIRST}\n"
            "    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))",
        ),
    ),
    Fault(
        "q and k norm come after rope",
        "Qwen3 checkpoints give plausible, worse text.",
        "5.4",
        LOGITS,
        packed(
            "q, k = rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)\n",
            "q, k = rotate(q, rope), rotate(k, rope)\n"
            "            q, k = rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)\n",
        ),
        packed("return rotate(q, rope), rotate(k, rope), v", "return q, k, v"),
    ),
    Fault(
        "windows are one too wide",
        "Mistral and Qwen models read one token more than they were trained to.",
        "5.5",
        LOGITS,
        cells("positions, window):", "positions, window and window + 1):"),
        cells("place[:, None, :] < window", "place[:, None, :] <= window"),
    ),
    Fault(
        "windows count timesteps",
        "Rows with gaps lose what their window still holds.",
        "5.5",
        LOGITS,
        cells(
            "place[:, :, None] - place[:, None, :] < window",
            "torch.arange(S)[:, None] - torch.arange(S) < window",
        ),
        cells("causal_alone(active, positions, window)", "on is None and window is None"),
    ),
    Fault(
        "padding in front needs no mask either",
        "A short prompt in a batch with a longer one reads its padding.",
        "5.4",
        LOGITS,
        Edit("decoding.rows", "(active[:, 1:] & ~active[:, :-1]).any()", "False"),
        package="bridge",
    ),
    Fault(
        "every layer has the first one's window",
        "Models that alternate windows and full attention forget early, or never.",
        "5.5",
        LOGITS,
        model("config.sliding_windows[layer] if", "config.sliding_windows[0] if"),
    ),
    Fault(
        "rope turns the other way",
        "Queries look behind what they look for.",
        "5.6",
        LOGITS,
        rope("np.concatenate([-sin, sin], -1)", "np.concatenate([sin, -sin], -1)"),
        package="bridge",
    ),
    Fault(
        "rope turns neighbours",
        "GPT-J's layout of pairs: every checkpoint in Hugging Face's layout is scrambled.",
        "5.6",
        LOGITS,
        cells(
            "    cos, sin = rope.unsqueeze(-2)",
            "    x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)\n"
            "    cos, sin = rope.unsqueeze(-2)",
        ),
    ),
    Fault(
        "the llama3 factor is dropped",
        "Llama 3.1 and its distillations lose their long context.",
        "5.6",
        LOGITS,
        rope(
            FREQUENCIES,
            "if rope.rope_type == 'llama3':\n"
            "        rope = RopeConfig('default', rope.rope_theta)\n"
            f"    {FREQUENCIES}",
        ),
        package="bridge",
    ),
    Fault(
        "yarn without its ramp",
        "Fast frequencies are stretched too: near tokens blur.",
        "5.6",
        LOGITS,
        rope(
            FREQUENCIES,
            f"{FREQUENCIES}\n"
            "    if rope.rope_type == 'yarn':\n"
            "        linear = RopeConfig('linear', rope.rope_theta, rope.factor)\n"
            "        frequencies, _ = inverse_frequencies(linear, head_dim)",
        ),
        package="bridge",
    ),
    Fault(
        "yarn without its attention factor",
        "Attention over stretched contexts is too flat.",
        "5.6",
        LOGITS,
        rope(FREQUENCIES, f"{FREQUENCIES}[0], 1.0"),
        package="bridge",
    ),
    Fault(
        "angles in the compute dtype",
        "In bfloat16, positions from 257 on are rounded: long texts lose their order.",
        "5.6",
        LOGITS,
        rope("import numpy as np\n", "import ml_dtypes\nimport numpy as np\n"),
        rope(
            "angles = np.arange(length)[:, None] * frequencies",
            "narrow = (np.arange(length)[:, None], frequencies)\n"
            "    place, turn = (a.astype(ml_dtypes.bfloat16) for a in narrow)\n"
            "    angles = (place * turn).astype(float)",
        ),
        dtype="bfloat16",
        package="bridge",
    ),
    Fault(
        "embeddings are scaled",
        "Gemma's habit: other families' streams start too large.",
        "5.2",
        LOGITS,
        packed(
            "F.embedding(tokens, self.embed).to(self.like.dtype)",
            "F.embedding(tokens, self.embed).to(self.like.dtype) * self.config.hidden_size**0.5",
        ),
    ),
    Fault(
        "the final norm has no weight",
        "Every logit is a little wrong, and most tokens are right.",
        "5.2",
        LOGITS,
        packed("rms_norm(h, self.norm,", "rms_norm(h, torch.ones_like(self.norm),"),
    ),
    Fault(
        "logits stay in the compute dtype",
        "Sampling's float32 rules are applied to bfloat16 numbers.",
        "5.2",
        LOGITS,
        packed("return self.head(h).to(wide(h.dtype))", "return self.head(h)"),
        dtype="float16",
    ),
    Fault(
        "norms share one weight",
        "The FFN sees the stream through attention's norm.",
        "5.3",
        LOGITS,
        packed("x = rms_norm(h, self.post_norm,", "x = rms_norm(h, self.input_norm,"),
    ),
    Fault(
        "biases are dropped",
        "Qwen2 checkpoints load, and speak nonsense.",
        "5.1",
        LOGITS,
        Edit("linear", 'x, weight, self.bias, "none"', 'x, weight, None, "none"'),
        Edit("linear", "F.linear(x, weight, self.bias)\n", "F.linear(x, weight)\n"),
    ),
    Fault(
        "the biases of o and of the FFN are dropped",
        "Llama checkpoints with attention_bias or mlp_bias are almost right.",
        "5.1",
        LOGITS,
        Edit(
            "linear",
            'residual, weight, self.bias, "add"',
            'residual, weight, None, "add"',
        ),
        Edit("linear", "weight, self.bias).add_(residual)", "weight).add_(residual)"),
    ),
    Fault(
        "square weights are transposed",
        "A loader for [in, out] weights: nothing complains where widths agree.",
        "2.1",
        LOGITS,
        model(
            "{name: get(name) for name in tensor_shapes(config)}",
            "{n: get(n).T.contiguous() if s[1:] == s[:1] else get(n)\n"
            "            for n, s in tensor_shapes(config).items()}",
        ),
    ),
    Fault(
        "gate and up are swapped",
        "The FFN gates with the wrong half.",
        "5.8",
        LOGITS,
        packed("F.silu(gate) * up", "F.silu(up) * gate"),
    ),
    Fault(
        "tensors are rounded on the way",
        "A checkpoint that went through the backend is no longer the same one.",
        "9.6",
        TENSORS,
        Edit(
            "backend",
            "yield name, to_numpy(part).copy()",
            "yield name, to_numpy(part.bfloat16().to(part.dtype)).copy()",
        ),
    ),
    Fault(
        "tensors come out of order",
        "Two writers of one model give files, and hashes, that differ.",
        "9.3",
        TENSORS,
        Edit(
            "backend",
            "in self.weights.parts():",
            "in reversed([*self.weights.parts()]):",
        ),
    ),
)
