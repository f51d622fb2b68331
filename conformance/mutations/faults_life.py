"""Faults of a torch model's whole life: what is kept from before an update, what two decoders
share, what is handed out and goes on changing, and trainers that are taken back."""

from mutations.fault import Edit, Fault

LIFE = "a_models_life_is_the_references"
# Keeps the results of a prefill with the model, by the prompts that it was of.
KEEPS = (
    "        asked = tuple(prompt.tobytes() for prompt in prompts)\n"
    '        kept = self.weights.rope.__dict__.setdefault("kept", {})\n'
)
# Writes an array of a state into that of the last one.
KEPT_STATE = (
    '        kept = self.__dict__.setdefault("kept", {}).setdefault(key, np.array(array))\n'
    "        np.copyto(kept, array)\n"
    "        return kept\n"
)


FAULTS = (
    Fault(
        "prompts that were read are kept",
        "After an update, prompts are answered from what the model was before.",
        "7.9",
        LIFE,
        Edit(
            "decode",
            "        last = prefill(self.weights, prompts, places)\n",
            KEEPS + "        if asked not in kept:\n"
            "            last = prefill(self.weights, prompts, places)\n"
            "            kept[asked] = last, [place.clone() for place in places]\n"
            "        last, read = kept[asked]\n"
            "        for place, keys_values in zip(places, read):\n"
            "            place.copy_(keys_values)\n",
        ),
    ),
    Fault(
        "decoders share their cache",
        "Of two requests at once each reads what the other one says.",
        "4.1",
        LIFE,
        Edit(
            "decode",
            "        self.cache = cache\n",
            "        self.cache = cache\n"
            '        kept = self.weights.rope.__dict__.setdefault("own", cache.own)\n'
            "        if kept.shape == cache.own.shape:\n"
            "            cache.own = kept\n",
        ),
    ),
    Fault(
        "packed weights are kept over an update",
        "Decoding goes on with the weights of before.",
        "7.9",
        LIFE,
        Edit(
            "weights",
            "        return packed\n",
            '        return self.__dict__.setdefault("kept", packed)\n',
        ),
    ),
    Fault(
        "a state is the trainer's own memory",
        "A checkpoint that is written while training goes on mixes two updates.",
        "7.9",
        LIFE,
        Edit("train", 'given.to("cpu", copy=True)', 'given.to("cpu")'),
    ),
    Fault(
        "moments are kept where they were given",
        "The state that a run went back to has changed when it goes back once more.",
        "7.9",
        LIFE,
        Edit(
            "train",
            'torch.from_numpy(np.array(state[f"{kind}.{name}"])).to(master)',
            'torch.from_numpy(state[f"{kind}.{name}"]).to(master)',
        ),
    ),
    Fault(
        "the step count never falls",
        "A run that is taken back corrects its bias as if it had not been.",
        "7.9",
        LIFE,
        Edit(
            "train",
            'torch.tensor(float(state["step"]))',
            'torch.tensor(float(max(state["step"], self._steps())))',
        ),
    ),
    Fault(
        "moments are restored where there are none",
        "A run that is taken back goes on with the moments of what it was taken back from.",
        "7.9",
        LIFE,
        Edit(
            "train",
            'self.adamw.state[master] = {"step": step.to(master.device, copy=True), **given}',
            'self.adamw.state.setdefault(master, {"step": step.clone(), **given})',
        ),
    ),
    Fault(
        "the learning rate of an update stays",
        "Once a rate was given, the optimizer's own is gone.",
        "7.8",
        LIFE,
        Edit(
            "train",
            'self.adamw.param_groups[0]["lr"] = self.options.lr if lr is None else lr',
            'self.adamw.param_groups[0]["lr"] = lr or self.adamw.param_groups[0]["lr"]',
        ),
    ),
    Fault(
        "tensors are handed out as they are computed with",
        "A copy of the weights, kept to compare with, follows every update.",
        "9.6",
        LIFE,
        Edit("backend", "to_numpy(part).copy()", "to_numpy(part)"),
    ),
    Fault(
        "logits are handed out as they are drawn from",
        "Who masks tokens in the logits that they were given changes what is drawn.",
        "10.1",
        LIFE,
        Edit("decode", "self.next_logits.cpu().numpy().copy()", "self.next_logits.cpu().numpy()"),
    ),
    Fault(
        "draws are handed out as they are fed",
        "Who marks ended rows in the tokens that they were given changes what is read on.",
        "10.1",
        "what_was_sampled_is_what_is_fed",
        Edit("decode", "self.drawn[:, 0].copy()", "self.drawn[:, 0]"),
    ),
)
