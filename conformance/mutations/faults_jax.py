"""Faults of the JAX backend that long texts show, windows, rows that leave (chapters 4 to 6), and
the whole life of a model (chapter 7).

The sizes of its steps are buckets, which rows and timesteps outgrow.
"""

from mutations.fault import Edit, Fault
from mutations.faults_life import KEEPS, KEPT_STATE, LIFE
from mutations.faults_long import DRAWN, READ

FAULTS = (
    Fault(
        "jax: the line after a table's last is read",
        "Each 65th token is drawn by the luck of the one before it.",
        "6.2",
        DRAWN,
        Edit(
            "decode",
            "self.uniforms.at(self.step,",
            "self.uniforms.at(self.step - (self.step % 65 == 64),",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: rope's table ends with the prompts",
        "JAX reads the last line for all that lies beyond: answers stand still.",
        "5.6",
        READ,
        Edit(
            "decode",
            "self.table = model.rope(self.slots + timesteps)",
            "self.table = model.rope(self.slots)",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: rope's table is that of the first request",
        "What is longer than the first text stands still at its end.",
        "5.6",
        READ,
        Edit("model", "if length not in self.tables:", "if not self.tables:"),
        Edit("model", "return self.tables[length]", "return next(iter(self.tables.values()))"),
        package="bridge_jax",
    ),
    Fault(
        "jax: a step reads one timestep too few where a bucket is full",
        "The 65th token is drawn as if the 64th had not been said.",
        "4.1",
        READ,
        Edit("decode", "bucket(self.step + 1, REACH)", "bucket(self.step, REACH)"),
        package="bridge_jax",
    ),
    Fault(
        "jax: caches hold 256 timesteps",
        "JAX writes all that lies beyond into the last one.",
        "4.1",
        READ,
        Edit(
            "decode",
            "timesteps = bucket(max(self.limit, 1), STEPS)",
            "timesteps = min(bucket(max(self.limit, 1), STEPS), 256)",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: parts of a long prompt are read as if each were the first",
        "From the 257th token on a prompt reads its beginning alone.",
        "5.4",
        READ,
        Edit("model", "(first + jnp.arange(some)[:, None] >=", "(jnp.arange(some)[:, None] >="),
        package="bridge_jax",
    ),
    Fault(
        "jax: windows are counted from each prompt's first token",
        "Short prompts beside long ones stay in their windows for too long.",
        "5.5",
        READ,
        Edit(
            "decode",
            "(P + step - slot < window)",
            "(P - places.padding[:, None] + step - slot < window)",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: prompts are renumbered before they move",
        "One prompt leaves, then another: rows that are left go on from somebody else's.",
        "4.3",
        READ,
        Edit(
            "decode",
            "            self.places = self.places._replace(alive=",
            "            self.rows = rows\n            self.places = self.places._replace(alive=",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: rows move and their numbers do not",
        "A row that moves up draws by the luck of the one whose place it takes.",
        "6.2",
        DRAWN,
        Edit(
            "decode",
            "        ids = layout.put(rows.row_ids), layout.put(rows.prompt_ids)\n",
            '        first = self.__dict__.setdefault("first", rows)\n'
            "        first = first.keep(np.arange(len(rows)))\n"
            "        ids = layout.put(first.row_ids), layout.put(first.prompt_ids)\n",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: prefixes stay where they were",
        "After a prompt's rows have all ended, others go on from its prompt.",
        "4.3",
        READ,
        Edit("decode", "(prefix, prompts)", "(prefix, jnp.arange(len(prompts)))"),
        package="bridge_jax",
    ),
    Fault(
        "jax: prompts that were read are kept",
        "After an update, prompts are answered from what the model was before.",
        "7.9",
        LIFE,
        Edit(
            "decode",
            "            quick=model.quick,\n        )\n\n    def _settle",
            "            quick=model.quick,\n        )\n"
            + KEEPS
            + "        now = self.prefix, self.next_logits\n"
            "        self.prefix, self.next_logits = kept.setdefault(asked, now)\n"
            "\n    def _settle",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: states are written where the last one lies",
        "A state that is kept follows the training.",
        "7.9",
        LIFE,
        Edit(
            "train",
            '        return {"step": np.array(self.steps, np.int64), **arrays}',
            f"        {KEPT_STATE}"
            '        return {"step": np.array(self.steps, np.int64), **kept}',
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: the step count never falls",
        "A run that is taken back corrects its bias as if it had not been.",
        "7.9",
        LIFE,
        Edit(
            "train",
            'self.steps = int(state["step"])',
            'self.steps = max(self.steps, int(state["step"]))',
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: moments are restored where there are none",
        "A run that is taken back goes on with the moments of what it was taken back from.",
        "7.9",
        LIFE,
        Edit(
            "train",
            "{key: given(kind, key, layers) for key, layers in self.chosen}",
            "{\n"
            "                    key: getattr(self.tensors, kind)[key]\n"
            '                    if self.steps and kind != "master"\n'
            "                    else given(kind, key, layers)\n"
            "                    for key, layers in self.chosen\n"
            "                }",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: the learning rate of an update stays",
        "Once a rate was given, the optimizer's own is gone.",
        "7.8",
        LIFE,
        Edit(
            "train",
            "self.options.lr if lr is None else lr,",
            'self.__dict__.setdefault("rate", self.options.lr)\n'
            "            if lr is None\n"
            "            else self.__dict__.update(rate=lr) or lr,",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: tensors are those of the first time",
        "Checkpoints of a run are all the first one.",
        "9.6",
        LIFE,
        Edit(
            "backend",
            "params, ready, last = self.transformer.params, {}, None",
            "params, ready, last = dict(self.transformer.params), {}, None\n"
            "        copies = {key: jax.numpy.array(a, copy=True) for key, a in params.items()}\n"
            '        params = self.__dict__.setdefault("kept", copies)',
        ),
        Edit(
            "backend",
            "for key, p in params.items() if key.startswith(LAYERS)",
            "for key, p in params.items() if LAYERS in key",
        ),
        package="bridge_jax",
    ),
)
