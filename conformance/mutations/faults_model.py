"""Faults of the host, of where blocks stand in it, and of its tensors (chapters 2, 3, 5, 9)."""

from mutations.fault import Edit, Fault

LOGITS = "logits_are_within_the_numerics_rule"
TENSORS = "tensors_come_back_byte_for_byte"
FFN = "        h = feed_forward(layer, h, rms_norm(h, layer.post_norm, self.config.rms_norm_eps))\n"
BLOCK = "        return h if layer.block is None else layer.block(h, cells.grid, cells.active)"
FREQUENCIES = "inverse_frequencies(config.rope, config.head_dim)"
HEADS_FIRST = "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)"


def model(old: str, new: str) -> Edit:
    """An edit of `model.py`."""
    return Edit("model", old, new)


FAULTS = (
    Fault(
        "the block comes before the FFN",
        "Weights trained elsewhere act on a stream that they have never seen.",
        "3.7",
        LOGITS,
        model(
            FFN + BLOCK, BLOCK.replace("return h", "h = h") + "\n" + FFN.replace("h =", "return", 1)
        ),
    ),
    Fault(
        "the block reads the stream before the FFN",
        "What the FFN has just added is shared one layer late.",
        "3.7",
        LOGITS,
        model(
            FFN + BLOCK,
            FFN.replace("h =", "after =", 1)
            + BLOCK.replace("return h if", "return after if").replace(
                "layer.block(h, cells.grid, cells.active)",
                "after + layer.block(h, cells.grid, cells.active) - h",
            ),
        ),
    ),
    Fault(
        "one timestep ahead is read",
        "Training sees the answer; decoding cannot.",
        "5.4",
        "no_future_timestep_influences_an_earlier_one",
        model(".tril()[None]", ".tril(1)[None]"),
    ),
    Fault(
        "padding on the left is read",
        "An answer depends on how long the other prompts of its batch are.",
        "5.4",
        "inactive_cells_have_no_influence",
        model("mask = mask & on[:, None, :]", "pass"),
    ),
    Fault(
        "positions of inactive cells are looked up",
        "What a batch is padded with decides whether it is computed at all.",
        "2.3",
        "inactive_cells_have_no_influence",
        model("positions = np.where(active, positions, 0)", "pass"),
    ),
    Fault(
        "positions that are given are ignored",
        "Rows with gaps are read as if they had none.",
        "2.4",
        LOGITS,
        model(
            "place = torch.tensor(positions, dtype=torch.int64, device=self.device)",
            "place = torch.arange(S).expand(len(positions), S)",
        ),
    ),
    Fault(
        "query heads read key heads by modulo",
        "Every checkpoint with fewer key heads than query heads is scrambled.",
        "5.4",
        LOGITS,
        model(
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
        model("q = rms_norm(q, layer.q_norm", "q = rms_norm(rotate(q, rope), layer.q_norm"),
        model("k = rms_norm(k, layer.k_norm", "k = rms_norm(rotate(k, rope), layer.k_norm"),
        model("return rotate(q, rope), rotate(k, rope), v", "return q, k, v"),
    ),
    Fault(
        "windows are one too wide",
        "Mistral and Qwen models read one token more than they were trained to.",
        "5.5",
        LOGITS,
        model("reach < window", "reach <= window"),
        model("place[:, None, :] < window", "place[:, None, :] <= window"),
    ),
    Fault(
        "windows count timesteps",
        "Rows with gaps lose what their window still holds.",
        "5.5",
        LOGITS,
        model(
            "place[:, :, None] - place[:, None, :] < window",
            "torch.arange(S)[:, None] - torch.arange(S) < window",
        ),
        model("full and (window is None or reach < window)", "full and window is None"),
    ),
    Fault(
        "every layer has the first one's window",
        "Models that alternate windows and full attention forget early, or never.",
        "5.5",
        LOGITS,
        model("window=config.sliding_windows[i]", "window=config.sliding_windows[0]"),
    ),
    Fault(
        "rope turns the other way",
        "Queries look behind what they look for.",
        "5.6",
        LOGITS,
        model("np.concatenate([-sin, sin], -1)", "np.concatenate([sin, -sin], -1)"),
    ),
    Fault(
        "rope turns neighbours",
        "GPT-J's layout of pairs: every checkpoint in Hugging Face's layout is scrambled.",
        "5.6",
        LOGITS,
        model(
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
        model(
            FREQUENCIES,
            "inverse_frequencies(replace(config.rope, rope_type='default')\n"
            "            if config.rope.rope_type == 'llama3' else config.rope, config.head_dim)",
        ),
    ),
    Fault(
        "yarn without its ramp",
        "Fast frequencies are stretched too: near tokens blur.",
        "5.6",
        LOGITS,
        model(
            f"self.frequencies, self.factor = {FREQUENCIES}",
            f"self.frequencies, self.factor = {FREQUENCIES}\n"
            "        if config.rope.rope_type == 'yarn':\n"
            "            linear = replace(config.rope, rope_type='linear')\n"
            "            self.frequencies, _ = inverse_frequencies(linear, config.head_dim)",
        ),
    ),
    Fault(
        "yarn without its attention factor",
        "Attention over stretched contexts is too flat.",
        "5.6",
        LOGITS,
        model(FREQUENCIES, f"{FREQUENCIES}[0], 1.0"),
    ),
    Fault(
        "angles in the compute dtype",
        "In bfloat16, positions from 257 on are rounded: long texts lose their order.",
        "5.6",
        LOGITS,
        model(
            "self.device, self.dtype = device", "self.n, self.device, self.dtype = dtype, device"
        ),
        model(
            "np.arange(length)[:, None] * self.frequencies",
            "(torch.arange(length).to(self.n)[:, None]\n"
            "                  * torch.from_numpy(self.frequencies).to(self.n)).double().numpy()",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "embeddings are scaled",
        "Gemma's habit: other families' streams start too large.",
        "5.2",
        LOGITS,
        model(
            "h = embed(self.embed, tokens)",
            "h = embed(self.embed, tokens) * self.config.hidden_size**0.5",
        ),
    ),
    Fault(
        "the final norm has no weight",
        "Every logit is a little wrong, and most tokens are right.",
        "5.2",
        LOGITS,
        model("rms_norm(h, self.norm,", "rms_norm(h, torch.ones_like(self.norm),"),
    ),
    Fault(
        "logits stay in the compute dtype",
        "Sampling's float32 rules are applied to bfloat16 numbers.",
        "5.2",
        LOGITS,
        model("return self.head(h).to(wide(self.dtype))", "return self.head(h)"),
        dtype="float16",
    ),
    Fault(
        "norms share one weight",
        "The FFN sees the stream through attention's norm.",
        "5.3",
        LOGITS,
        model("rms_norm(h, layer.post_norm, self.config.rms_norm_eps)", "x"),
    ),
    Fault(
        "biases are dropped",
        "Qwen2 checkpoints load, and speak nonsense.",
        "5.1",
        LOGITS,
        Edit("linear", 'x, self.weight, self.bias, "none"', 'x, self.weight, None, "none"'),
        Edit("linear", "F.linear(x, self.weight, self.bias)", "F.linear(x, self.weight)"),
    ),
    Fault(
        "the biases of o and of the FFN are dropped",
        "Llama checkpoints with attention_bias or mlp_bias are almost right.",
        "5.1",
        LOGITS,
        Edit(
            "linear",
            'residual, self.weight, self.bias, "add"',
            'residual, self.weight, None, "add"',
        ),
        Edit("linear", "return residual + self(x)", "return residual + F.linear(x, self.weight)"),
    ),
    Fault(
        "square weights are transposed",
        "A loader for [in, out] weights: nothing complains where widths agree.",
        "2.1",
        LOGITS,
        Edit(
            "linear",
            'weights = [get(f"{name}.weight") for name in names]',
            'weights = [get(f"{name}.weight") for name in names]\n'
            "        weights = [w.T.contiguous() if len(w) == w.shape[1] else w for w in weights]",
        ),
    ),
    Fault(
        "gate and up are swapped",
        "The FFN gates with the wrong half.",
        "5.8",
        LOGITS,
        model("F.silu(gate) * up", "F.silu(up) * gate"),
    ),
    Fault(
        "tensors are rounded on the way",
        "A checkpoint that went through the backend is no longer the same one.",
        "9.6",
        TENSORS,
        Edit(
            "backend",
            "yield name, to_numpy(ready.pop(name)).copy()",
            "tensor = ready.pop(name)\n"
            "            yield name, to_numpy(tensor.bfloat16().to(tensor.dtype)).copy()",
        ),
    ),
    Fault(
        "tensors come out of order",
        "Two writers of one model give files, and hashes, that differ.",
        "9.3",
        TENSORS,
        Edit(
            "backend",
            "for name in tensor_shapes(self.config):",
            "for name in [name for name, _ in self.transformer.parts()]:",
        ),
    ),
)
