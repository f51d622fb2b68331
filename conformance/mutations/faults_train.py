"""Faults of losses, gradients and training steps (chapter 7)."""

from mutations.fault import Edit, Fault

GRADIENTS = "loss_and_gradients_are_within_the_numerics_rule"
LOGPROBS = "log_probabilities_are_those_of_the_loss"
STEPS = "training_steps_are_within_the_numerics_rule"
ACCUMULATED = "accumulated_batches_are_one_update"
RECOMPUTED = "computing_layers_again_changes_no_update"
LEARNT = "a_model_computes_with_what_it_learnt"
RESTORED = "a_restored_trainer_goes_on_as_if_never_stopped"
SHARED = "shared_timesteps_change_no_gradient"
GAIN = "gain = torch.where(rho * A <= clipped * A, rho * A, clipped.detach() * A)"
CLIP = "            torch.nn.utils.clip_grads_with_norm_(self.master.values(), limit, norm)\n"


def train(old: str, new: str) -> Edit:
    """An edit of `train.py`."""
    return Edit("train", old, new)


def loss(old: str, new: str) -> Edit:
    """An edit of `loss.py`."""
    return Edit("loss", old, new)


FAULTS = (
    Fault(
        "losses are averaged by row",
        "Long responses count less a token than short ones.",
        "7.4",
        GRADIENTS,
        train(
            "count = len(targets.targets) if count is None else count",
            "count = len(set(targets.rows)) if count is None else count",
        ),
    ),
    Fault(
        "losses are divided by all cells",
        "The learning rate depends on how much padding a batch has.",
        "7.4",
        GRADIENTS,
        train("len(targets.targets) if count is None else count", "batch.target_mask.size"),
    ),
    Fault(
        "targets are shifted once more",
        "The model learns to say the token after next.",
        "7.1",
        GRADIENTS,
        loss("from_numpy(cells.targets)", "from_numpy(np.roll(cells.targets, -1))"),
    ),
    Fault(
        "log-probabilities are at temperature 1",
        "Ratios are of another policy than the one that sampled.",
        "7.1",
        GRADIENTS,
        loss("(logits if temperature == 1 else logits / temperature)", "logits"),
    ),
    Fault(
        "the sampling policy's log-probabilities are at temperature 1",
        "The first update already sees ratios that are not 1.",
        "7.12",
        LOGPROBS,
        train("ids, temperature, LOSS_CHUNK", "ids, 1.0, LOSS_CHUNK"),
    ),
    Fault(
        "the learning rate never changes",
        "Schedules and warm-up have no effect.",
        "7.8",
        STEPS,
        train("self.options.lr if lr is None else lr", "self.options.lr"),
    ),
    Fault(
        "k1 in place of k3",
        "The KL penalty is noisy, and negative as often as not.",
        "7.5",
        GRADIENTS,
        loss("kl = difference.expm1() - difference", "kl = -difference"),
    ),
    Fault(
        "the KL term has the wrong sign",
        "Training is paid for leaving the reference policy.",
        "7.5",
        GRADIENTS,
        loss("gain - objective.beta * kl", "gain + objective.beta * kl"),
    ),
    Fault(
        "only large ratios are clipped",
        "Nothing stops a policy from giving up tokens for good.",
        "7.5",
        GRADIENTS,
        loss("rho.clamp(1 - objective.eps_low, ", "rho.clamp(max="),
    ),
    Fault(
        "both sides clip at eps_low",
        "DAPO's higher ceiling has no effect: entropy collapses as before.",
        "7.5",
        GRADIENTS,
        loss("1 + objective.eps_high", "1 + objective.eps_low"),
    ),
    Fault(
        "the objective does not clip",
        "Policy gradients as of old: one lucky batch moves the policy anywhere.",
        "7.5",
        GRADIENTS,
        loss(GAIN, "gain = rho * A"),
    ),
    Fault(
        "the objective clips without a minimum",
        "A ratio outside the range has no gradient, even where it should come back.",
        "7.5",
        GRADIENTS,
        loss(GAIN, "gain = clipped * A"),
    ),
    Fault(
        "clipped targets keep their gradient",
        "The loss is right, and training does not clip.",
        "7.5",
        GRADIENTS,
        loss(
            GAIN,
            "stopped = clipped.detach() + rho - rho.detach()\n"
            "    gain = torch.where(rho * A <= clipped * A, rho * A, stopped * A)",
        ),
    ),
    Fault(
        "the sampling policy is ignored",
        "Every ratio is 1: nothing is off-policy, nothing is clipped.",
        "7.5",
        GRADIENTS,
        loss("if old is None else old", "if True else old"),
    ),
    Fault(
        "without old log-probabilities nothing is learnt",
        "On-policy updates have a gradient of zero.",
        "7.5",
        GRADIENTS,
        loss("old = lp.detach() if", "old = lp if"),
    ),
    Fault(
        "default positions count timesteps",
        "Batches padded on the left, or with gaps, train at other positions than they decode at.",
        "2.4",
        GRADIENTS,
        train(
            "positions_of(batch))",
            "np.arange(batch.active.shape[1]) + 0 * batch.active\n"
            "             if batch.positions is None else batch.positions)",
        ),
    ),
    Fault(
        "gradients are cut across rows",
        "Rows learn to read and never to be read.",
        "7.3",
        GRADIENTS,
        Edit(
            "block",
            "map(in_grid, parts)",
            "map(in_grid, (parts[0], *(part.detach() for part in parts[1:])))",
        ),
    ),
    Fault(
        "a tied head has no gradient",
        "The embedding learns from its input side alone.",
        "5.2",
        GRADIENTS,
        train(
            "_place(total, name, head) if name in trainable else None",
            "_place(total, name, head) if name == HEAD and name in trainable else None",
        ),
    ),
    Fault(
        "a tied head is a copy",
        "After training the model says what it learnt, by the head that it had before.",
        "7.9",
        LEARNT,
        Edit(
            "packing",
            'head = packing.held(("model.embed_tokens",), [embed], None)',
            'kept = model.rope.__dict__.setdefault("kept", embed.clone())\n'
            '            head = packing.held(("model.embed_tokens",), [kept], None)',
        ),
    ),
    Fault(
        "k of the block stays as it was",
        "A part of a stacked weight misses every update of its master.",
        "7.9",
        STEPS,
        train(
            "            own[name].copy_(master)\n",
            "            if 'bridge.k_proj' not in name:\n"
            "                own[name].copy_(master)\n",
        ),
    ),
    Fault(
        "decay is coupled",
        "Adam with L2: weights with large gradients hardly decay.",
        "7.8",
        STEPS,
        train("torch.optim.AdamW(", "torch.optim.Adam("),
    ),
    Fault(
        "no bias correction",
        "The first updates are several times too large.",
        "7.8",
        STEPS,
        train(
            "        self.adamw.step()\n",
            "        o = self.options\n"
            "        for p in self.master.values():\n"
            "            new = {'step': torch.zeros(()), 'exp_avg': 0 * p, 'exp_avg_sq': 0 * p}\n"
            "            s = self.adamw.state[p] = self.adamw.state.get(p) or new\n"
            "            s['step'] += 1\n"
            "            s['exp_avg'].lerp_(p.grad, 1 - o.betas[0])\n"
            "            s['exp_avg_sq'].lerp_(p.grad**2, 1 - o.betas[1])\n"
            "            p.mul_(1 - o.lr * o.weight_decay)\n"
            "            p.addcdiv_(s['exp_avg'], s['exp_avg_sq'].sqrt() + o.eps, value=-o.lr)\n",
        ),
    ),
    Fault(
        "eps stands inside the root",
        "Tensors with small gradients hardly move.",
        "7.8",
        STEPS,
        train("eps=optimizer.eps,", "eps=optimizer.eps**0.5,"),
    ),
    Fault(
        "second moments in bfloat16",
        "With beta2 at 0.999 a moment in bfloat16 never moves again.",
        "7.9",
        STEPS,
        train(
            "        self.adamw.step()\n",
            "        self.adamw.step()\n"
            "        for s in self.adamw.state.values():\n"
            "            s['exp_avg_sq'] = s['exp_avg_sq'].bfloat16().float()\n",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "masters in bfloat16",
        "Updates smaller than half a percent of a weight are lost.",
        "7.9",
        STEPS,
        train(
            "        self.adamw.step()\n",
            "        self.adamw.step()\n"
            "        for master in self.master.values():\n"
            "            master.copy_(master.bfloat16())\n",
        ),
        dtype="bfloat16",
    ),
    Fault(
        "gradients are clipped tensor by tensor",
        "The direction of an update is no longer that of its gradient.",
        "7.7",
        STEPS,
        train(
            CLIP,
            "            for m in self.master.values():\n"
            "                torch.nn.utils.clip_grad_norm_([m], limit)\n",
        ),
    ),
    Fault(
        "gradients are clipped after the moments",
        "One outlier stays in the moments for a thousand steps.",
        "7.7",
        STEPS,
        train(CLIP, "            pass\n"),
        train(
            "        self.adamw.step()\n",
            "        self.adamw.step()\n        if limit is not None:\n" + CLIP,
        ),
    ),
    Fault(
        "the norm is reported after clipping",
        "Plots of the gradient norm are flat at the limit: no spike is ever seen.",
        "7.7",
        STEPS,
        train('"grad_norm": float(norm)', '"grad_norm": min(float(norm), limit or float("inf"))'),
    ),
    Fault(
        "accumulated gradients are averaged",
        "Updates shrink with the number of micro-batches.",
        "7.10",
        ACCUMULATED,
        train(
            "        limit = self.options",
            "        for master in self.master.values():\n"
            "            master.grad /= len(batches)\n"
            "        limit = self.options",
        ),
    ),
    Fault(
        "a micro-batch is divided by its own targets",
        "Targets of short micro-batches count more than those of long ones.",
        "7.10",
        ACCUMULATED,
        train("part, self.objective, count, *how", "part, self.objective, None, *how"),
    ),
    Fault(
        "only the last micro-batch counts",
        "The others are computed, paid for, and forgotten.",
        "7.10",
        ACCUMULATED,
        train("count, *how, total", "count, *how, None"),
    ),
    Fault(
        "a split group is taken",
        "Half of a group learns as if the other half were not there.",
        "7.10",
        ACCUMULATED,
        train(
            "batches, count = micro_batches(batch, self.objective, self.weights.config.vocab_size)",
            "batches = [batch] if isinstance(batch, Batch) else list(batch)\n"
            "        count = sum(int(part.target_mask.sum()) for part in batches)",
        ),
    ),
    Fault(
        "layers computed again lose their input's gradient",
        "With checkpointed activations only the last layer learns.",
        "7.11",
        RECOMPUTED,
        Edit(
            "model",
            "again(layer, h, cells)",
            "again(layer, h.detach(), cells)",
        ),
    ),
    Fault(
        "the step count is not restored",
        "A resumed run corrects its bias once more: its first updates are far off.",
        "7.9",
        RESTORED,
        train('torch.tensor(float(state["step"]))', "torch.tensor(0.0)"),
    ),
    Fault(
        "second moments are not restored",
        "A resumed run takes a leap at its first update.",
        "7.9",
        RESTORED,
        train(
            'master.copy_(given.pop("master"))',
            'master.copy_(given.pop("master"))\n'
            "            given['exp_avg_sq'] = torch.zeros_like(master)",
        ),
    ),
    Fault(
        "masters are restored from the model's weights",
        "A resumed run loses what its masters hold beyond the compute dtype.",
        "7.9",
        RESTORED,
        train(
            'master.copy_(given.pop("master"))',
            'master.copy_(given.pop("master").to(self.weights.dtype))',
        ),
        dtype="bfloat16",
    ),
    Fault(
        "a restored trainer does not tell its model",
        "Sampling after a resume, before the first update, is by the weights of the checkpoint.",
        "7.9",
        RESTORED,
        train("**given}\n        self._publish()", "**given}"),
    ),
    Fault(
        "what rows share learns from its own cells alone",
        "A prompt's keys and values never learn what its answers read in them.",
        "7.14",
        SHARED,
        Edit("flash", "for read in (*reads.within, *reads.across):", "for read in reads.within:"),
    ),
    Fault(
        "what rows share is read by one softmax, and what they have alone by another",
        "A row's own words count as much as its prompt, however short they are.",
        "7.14",
        SHARED,
        Edit("flash", "for part in (lse, other_lse))", "for part in (both - 0.7, both - 0.7))"),
    ),
    Fault(
        "rows that have nothing alone move the others up",
        "Rows of a group that end early have the others learn from another row's tokens.",
        "7.14",
        SHARED,
        Edit("pieces", "numbers[order] = _numbers(", "numbers[order[::-1]] = _numbers("),
    ),
    Fault(
        "rows read each other where cells lie, and not where timesteps are",
        "After a gap a row reads what the others say one timestep later.",
        "7.14",
        SHARED,
        Edit(
            "pieces",
            "_timesteps(line[row] * plan.alone + timestep,",
            "_timesteps(line[row] * plan.alone + (np.cumsum(in_alone, 1) - 1)[row, timestep],",
        ),
    ),
    Fault(
        "windows are not looked at where nothing is padded",
        "Mistral learns by tokens that it cannot read when it decodes.",
        "5.5",
        GRADIENTS,
        Edit("pieces", "if not inside_window(active, positions, w)", "if False"),
    ),
)
