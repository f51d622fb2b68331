"""Faults of the JAX backend that long texts show, windows, rows that leave (chapters 4 to 6), and
the whole life of a model (chapter 7).

The sizes of its steps are buckets, which rows and timesteps outgrow.
"""

from mutations.fault import Edit, Fault
from mutations.faults_life import KEPT_STATE, LIFE
from mutations.faults_long import DRAWN, READ

COMING = "groups_that_come_are_answered_as_if_alone"
AHEAD = "steps_ahead_are_those_of_one_at_a_time"
WHOLE = "length = max(bucket(length), min(self.config.max_position_embeddings, CONTEXT))"

FAULTS = (
    Fault(
        "jax: the line after a table's last is read",
        "Each 65th token is drawn by the luck of the one before it.",
        "6.2",
        DRAWN,
        Edit(
            "decode",
            "self.uniforms.at(rows.steps,",
            "self.uniforms.at(rows.steps - (rows.steps % 65 == 64),",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: rope's table ends with the prompts",
        "JAX reads the last line for all that lies beyond: answers stand still.",
        "5.6",
        READ,
        Edit("model", WHOLE, "length = bucket(length)"),
        Edit("decode", "model.rope(int(ends.max()))", "model.rope(slots_of(self.prefix))"),
        package="bridge_jax",
    ),
    Fault(
        "jax: rope's table is that of the first request",
        "What is longer than the first text stands still at its end.",
        "5.6",
        READ,
        Edit("model", WHOLE, "length = bucket(length, 64)"),
        Edit("model", "if length not in self.tables:", "if not self.tables:"),
        Edit("model", "return self.tables[length]", "return next(iter(self.tables.values()))"),
        package="bridge_jax",
    ),
    Fault(
        "jax: a cache grows one timestep too late",
        "The 66th token is drawn as if the 65th had not been said.",
        "4.1",
        READ,
        Edit("decode", "self._grow(1)", "self._grow(0)"),
        package="bridge_jax",
    ),
    Fault(
        "jax: caches hold 256 timesteps",
        "What is said after them is not written, and nobody remembers it.",
        "4.1",
        READ,
        Edit("decode", ".bit_length(), most)", ".bit_length(), most, 256)"),
        package="bridge_jax",
    ),
    Fault(
        "jax: parts of a long prompt are read as if each were the first",
        "From the 257th token on a prompt reads its beginning alone.",
        "5.4",
        READ,
        Edit("attention", "(first + jnp.arange(some)[:, None] >=", "(jnp.arange(some)[:, None] >="),
        package="bridge_jax",
    ),
    Fault(
        "jax: windows are counted from each prompt's first token",
        "Short prompts beside long ones stay in their windows for too long.",
        "5.5",
        READ,
        Edit("steps", "(P + step - slot < window)", "(length[:, None] + step - slot < window)"),
        package="bridge_jax",
    ),
    Fault(
        "jax: rows that move are looked for by their cells",
        "Once rows have left, those that move up go on from somebody else's memory.",
        "4.3",
        READ,
        Edit(
            "decode",
            "places[then.places[:here]], lines[then.lines[:here]] = now.places, now.lines",
            "places[then.places[:here]], lines[then.lines[:here]] = np.arange(here), now.lines",
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
            "            self.rows.row_ids, self.rows.prompt_ids, lambda",
            '            self.__dict__.setdefault("first", self.rows).row_ids[: len(self.rows)],\n'
            "            self.first.prompt_ids[: len(self.rows)],\n"
            "            lambda",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: prefixes stay where they were",
        "After a prompt's rows have all ended, others go on from its prompt.",
        "4.3",
        READ,
        Edit("decode", "moved(self.prefix, lines,", "moved(self.prefix, np.arange(len(lines)),"),
        package="bridge_jax",
    ),
    Fault(
        "jax: prompts that come are put where the first ones are",
        "Rows under way go on from the prompt of whoever came last.",
        "4.5",
        COMING,
        Edit(
            "decode",
            "where = alone.put(lines.astype(np.int32),",
            "where = alone.put(np.arange(len(lines), dtype=np.int32),",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: places are taken over as they were left",
        "A row whose numbers were too large for its dtype spoils whoever comes after it.",
        "4.5",
        "what_others_held_does_not_reach_a_group",
        Edit("decode", "        if before:\n", "        if False:\n"),
        package="bridge_jax",
    ),
    Fault(
        "jax: a run goes on past end ids",
        "What a row says after its end is drawn, and the others of its group read it.",
        "4.6",
        AHEAD,
        Edit("steps", "return alive & ~ended &", "return alive &"),
        package="bridge_jax",
    ),
    Fault(
        "jax: a run goes on past a row's limit",
        "A row that may say no more says more.",
        "4.6",
        AHEAD,
        Edit("steps", " & (jnp.asarray(places.left) > fed)", ""),
        package="bridge_jax",
    ),
    Fault(
        "jax: a run draws twice by the same luck",
        "The second token of every run is drawn by the uniform of the first.",
        "4.6",
        AHEAD,
        Edit("steps", "draws.table[draws.line + 1 + fed]", "draws.table[draws.line + fed]"),
        package="bridge_jax",
    ),
    Fault(
        "jax: rows that end in a run stay in the block",
        "Until the run is over the others read what ended rows did not say.",
        "4.6",
        AHEAD,
        Edit(
            "steps",
            "table, tokens, alive, places, fed, config)\n        logits",
            "table, tokens, jnp.asarray(places.alive), places, fed, config)\n        logits",
        ),
        package="bridge_jax",
    ),
    Fault(
        "jax: going back leaves the count where it was",
        "What was taken back is read all the same.",
        "4.7",
        "going_back_leaves_nothing_behind",
        Edit("decode", "rows.fed(-back).keep(stay)", "rows.keep(stay)"),
        package="bridge_jax",
    ),
    Fault(
        "jax: all rows draw by the settings of the first",
        "One request's temperature is everybody's.",
        "6.9",
        "rows_draw_by_settings_of_their_own",
        Edit("sampling", "[numbers[one] for one in each]", "[numbers[each[0]] for _ in each]"),
        package="bridge_jax",
    ),
    Fault(
        "jax: prompts that were read are kept",
        "After an update, prompts are answered from what the model was before.",
        "7.9",
        LIFE,
        Edit(
            "decode",
            "        where = alone.put(",
            "        asked = tuple(prompt.tobytes() for prompt in prompts)\n"
            '        read = model.tables.setdefault("read", {})\n'
            "        kept, logits = read.setdefault(asked, (kept, logits))\n"
            "        where = alone.put(",
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
            "        return np.array(array)\n",
            KEPT_STATE,
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
            "for key, array in from_names(",
            'for key, array in () if kind != "master" and self.steps else from_names(',
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
            "        for name, array in self.transformer.weights.tensors(",
            "        first = self.transformer.weights.tensors(quick=self.transformer.quick)\n"
            '        first = self.__dict__.setdefault("first", [(n, a.copy()) for n, a in first])\n'
            "        for name, array in first or self.transformer.weights.tensors(",
        ),
        package="bridge_jax",
    ),
)
