"""Faults of what is trained and of how gradients add up (chapter 7), in every backend."""

from mutations.fault import Edit, Fault

UPDATED = "any_subset_is_updated_alone"
CELLS = "a_common_token_learns_from_all_its_cells"
BATCHES = "many_batches_add_up_in_float32"


def train(old: str, new: str) -> Edit:
    """An edit of `train.py`."""
    return Edit("train", old, new)


def published(condition: str) -> Edit:
    """Where it does not hold, a master is trained and never told to torch's model."""
    copied = "            own[name].copy_(master)\n"
    return train(copied, f"            if {condition}:\n    {copied}")


TORCH = (
    Fault(
        "a part of a stack is not trained without the others",
        "Whoever trains q alone, or LoRA's usual q and v, trains nothing, and is not told.",
        "7.9",
        UPDATED,
        published("'q_proj' not in name or name.replace('q_proj', 'k_proj') in self.master"),
    ),
    Fault(
        "a bias is not trained without its weight",
        "Training biases alone, as BitFit does, changes nothing.",
        "7.9",
        UPDATED,
        published("'.bias' not in name or name.replace('.bias', '.weight') in self.master"),
    ),
    Fault(
        "norms are left out",
        "Nobody trains norms in other trainers; here they were asked for.",
        "7.9",
        UPDATED,
        published("'norm' not in name"),
    ),
    Fault(
        "a tied embedding is trained with its head alone",
        "What a token means stays as it was.",
        "7.9",
        UPDATED,
        train("requires_grad_(EMBEDDING in trainable)", "requires_grad_(False)"),
    ),
    Fault(
        "without a limit the limit is 1",
        "Whoever turns clipping off has it on.",
        "7.7",
        UPDATED,
        train(
            "limit = self.options.max_grad_norm\n", "limit = self.options.max_grad_norm or 1.0\n"
        ),
    ),
    Fault(
        "without a limit nothing is learnt",
        "A limit that is not there is taken for 0.",
        "7.7",
        UPDATED,
        train(
            "limit = self.options.max_grad_norm\n", "limit = self.options.max_grad_norm or 0.0\n"
        ),
    ),
    Fault(
        "the KL is learnt from at beta 0",
        "A figure that was to be watched is trained on.",
        "7.5",
        UPDATED,
        Edit("loss", "gain - objective.beta * kl", "gain - (objective.beta or 0.04) * kl"),
    ),
    Fault(
        "the KL is not reported at beta 0",
        "A run without a penalty cannot be watched.",
        "7.5",
        UPDATED,
        Edit("loss", "if told.ref_logprobs is not None:", "if objective.beta:"),
    ),
    Fault(
        "a common token's cells add up in bfloat16",
        "The embeddings of the commonest tokens learn from the first few hundred of their cells.",
        "7.9",
        CELLS,
        train(
            "place.index_put_((cells.tokens,), embedded.grad.to(place.dtype), accumulate=True)",
            "sums = torch.zeros_like(place, dtype=embedded.dtype)\n"
            "        place.add_(sums.index_put_((cells.tokens,), embedded.grad, accumulate=True))",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "micro-batches add up in bfloat16",
        "The more micro-batches an update has, the fewer of them count.",
        "7.10",
        BATCHES,
        train(
            "total[name].add_(gradient)",
            "total[name] = (total[name] + gradient).to(gradient.dtype).float()",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "micro-batches add up in float16",
        "Small gradients are lost beside large sums.",
        "7.10",
        BATCHES,
        train(
            "total[name].add_(gradient)",
            "total[name] = (total[name] + gradient).to(gradient.dtype).float()",
        ),
        dtype="float16",
    ),
)
ZEROED = "jnp.where(jnp.abs(of_logits) < 6e-5, 0, of_logits)"
JAX = (
    Fault(
        "jax: some layers of a stack are taken for its first ones",
        "Training the last layers alone overwrites the first ones.",
        "7.9",
        UPDATED,
        Edit(
            "leaves",
            "params[key].at[np.array(layers)].set(leaf)",
            "params[key].at[: len(layers)].set(leaf)",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: without a limit the limit is 1",
        "Whoever turns clipping off has it on.",
        "7.7",
        UPDATED,
        Edit("adamw", "if options.max_grad_norm is not None:", "if True:"),
        Edit("adamw", "options.max_grad_norm / (norm", "(options.max_grad_norm or 1.0) / (norm"),
        package="bridge_jax",
    ),
    Fault(
        "jax: gradients of logits below 6e-5 are 0",
        "In float16 a large batch has no gradient but that of its targets.",
        "7.9",
        CELLS,
        Edit("losses", "np.finfo(np.float32).tiny)", "1)"),
        Edit(
            "losses", "scale = scale / temp", f"of_logits = {ZEROED}\n        scale = scale / temp"
        ),
        dtype="float16",
        package="bridge_jax",
    ),
    Fault(
        "jax: micro-batches add up in bfloat16",
        "The more micro-batches an update has, the fewer of them count.",
        "7.10",
        BATCHES,
        Edit(
            "adamw",
            "jax.tree.map(jnp.add, total, new)",
            "jax.tree.map(lambda a, b: (a + b).astype(jnp.bfloat16).astype(a.dtype), total, new)",
        ),
        dtype="bfloat16",
        package="bridge_jax",
    ),
)
MLX = (
    Fault(
        "mlx: a part of a stack is not trained without the others",
        "Whoever trains q alone trains nothing, and is not told.",
        "7.9",
        UPDATED,
        Edit(
            "linear",
            "if not mine.keys() & tensors.keys():",
            "if not mine.keys() <= tensors.keys():",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: norms are left out",
        "Nobody trains norms in other trainers; here they were asked for.",
        "7.9",
        UPDATED,
        Edit(
            "layer",
            'return tensors.get(f"{self.prefix}.{name}.weight", own)',
            "return own",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: a tied head stays as it was",
        "The embedding learns from its input side alone.",
        "7.9",
        UPDATED,
        Edit("model", "weights=(tensors[EMBEDDING],)", "weights=self.linear.weights"),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: without a limit the limit is 1",
        "Whoever turns clipping off has it on.",
        "7.7",
        UPDATED,
        train('float("inf") if limit is None', "1.0 if limit is None"),
        train("grads = grads if limit is None else clipped", "grads = clipped"),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: a common token's cells add up in bfloat16",
        "The embeddings of the commonest tokens learn from the first few hundred of their cells.",
        "7.9",
        CELLS,
        Edit(
            "linear",
            "zeros.at[tokens].add(cotangent.astype(mx.float32))",
            "zeros.astype(weight.dtype).at[tokens].add(cotangent)",
        ),
        dtype="bfloat16",
        package="bridge_mlx",
    ),
    Fault(
        "mlx: micro-batches add up in bfloat16",
        "The more micro-batches an update has, the fewer of them count.",
        "7.10",
        BATCHES,
        train(
            "g + grads[name] if grads else g",
            "(g + grads[name]).astype(mx.bfloat16).astype(mx.float32) if grads else g",
        ),
        dtype="bfloat16",
        package="bridge_mlx",
    ),
)
FAULTS = TORCH + JAX + MLX
