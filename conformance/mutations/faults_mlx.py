"""Faults of the MLX backend that long texts show, windows, rows that leave (chapters 4 to 6), and
the whole life of a model (chapter 7).

Its caches grow by 256 timesteps and more.
"""

from mutations.fault import Edit, Fault
from mutations.faults_life import KEEPS, KEPT_STATE, LIFE
from mutations.faults_long import DRAWN, READ

GROWN = "[(0, fresh), (0, 0), (0, room - written), (0, 0)]"  # around what was written
MADE = "            self.own[i] = k, v\n"

FAULTS = (
    Fault(
        "mlx: tables of draws all begin at 0",
        "Every 64 tokens a row has the same luck again.",
        "6.2",
        DRAWN,
        Edit("decode", "self.uniforms.at(rows.steps,", "self.uniforms.at(rows.steps % 64,"),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: a cache loses its last timestep as it grows",
        "After 256 tokens the last one is forgotten.",
        "4.1",
        READ,
        Edit("cache", "[:, :, first : self.clock],", "[:, :, first : max(self.clock - 1, first)],"),
        Edit("cache", GROWN, GROWN.replace("room - written", "room - max(written - 1, 0)")),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: caches grow in front",
        "After 256 tokens a row remembers nothing, and then something else.",
        "4.1",
        READ,
        Edit("cache", GROWN, GROWN.replace("(0, room - written)", "(room - written, 0)")),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: grown values begin anew",
        "After 256 tokens a row finds its past, and nothing in it.",
        "4.1",
        READ,
        Edit("cache", MADE, MADE.replace("k, v", "k, mx.zeros_like(v)")),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: rope's table is that of the first request",
        "What is longer than the first text stands still at its end.",
        "5.6",
        READ,
        Edit("attention", "if length > self.tables.shape[1]:", "if self.tables.shape[1] == 0:"),
        Edit(
            "attention",
            "mx.take(self.tables, mx.array(positions.astype(np.int32)), axis=1)",
            "mx.take(self.tables, mx.array(\n"
            "            np.minimum(positions, self.tables.shape[1] - 1).astype(np.int32)\n"
            "        ), axis=1)",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: masks of batches with padding reach 256 timesteps",
        "The start of a long prompt is forgotten as soon as a short one is beside it.",
        "5.4",
        READ,
        Edit(
            "cells",
            "mask = mx.tri(S, K, K - S, dtype=mx.bool_) &",
            "mask = mx.tri(S, K, K - S, dtype=mx.bool_)\n"
            "    mask = mask & ~mx.tri(S, K, K - S - 256, dtype=mx.bool_) &",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: windows are counted from the end of each prompt's own text",
        "A short prompt beside a long one reads past its windows.",
        "5.5",
        READ,
        Edit("cache", "np.clip(P + rows.steps", "np.clip(rows.lengths[rows.group] + rows.steps"),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: padding is cut at the wrong end beside a window",
        "A short prompt beside a long one reads padding where its layers have windows.",
        "5.5",
        READ,
        Edit("cache", "_from(lines, p0, P)", "_from(lines, 0, P - p0)"),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: only keys move",
        "Where a row leaves, those after it look for their own past and find another's.",
        "4.3",
        READ,
        Edit(
            "cache",
            MADE,
            "            x = self.own[i][1][: len(self.places), :, first : self.clock]\n"
            f"            v = mx.pad(x, {GROWN})\n{MADE}",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: prompts that were read are kept",
        "After an update, prompts are answered from what the model was before.",
        "7.9",
        LIFE,
        Edit(
            "decode",
            "            last, prefix = self._prefill(prompts)\n",
            KEEPS.replace("        ", "            ") + "            if asked not in kept:\n"
            "                kept[asked] = self._prefill(prompts)\n"
            "            last, prefix = kept[asked]\n",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: states are written where the last one lies",
        "A state that is kept follows the training.",
        "7.9",
        LIFE,
        Edit(
            "train",
            '        return np.array(self.master[name] if kind == "master" else moment)\n',
            '        array = self.master[name] if kind == "master" else moment\n' + KEPT_STATE,
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: the step count never falls",
        "A run that is taken back corrects its bias as if it had not been.",
        "7.9",
        LIFE,
        Edit(
            "train",
            'mx.array(int(state["step"]), mx.uint64)',
            'mx.maximum(moments["step"], mx.array(int(state["step"]), mx.uint64))',
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: first moments are not restored",
        "A run that is taken back goes on in the direction that it was taken back from.",
        "7.9",
        LIFE,
        Edit("train", '{"m": m, "v": v}', '{"m": moments[name]["m"], "v": v}'),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: the learning rate of an update stays",
        "Once a rate was given, the optimizer's own is gone.",
        "7.8",
        LIFE,
        Edit(
            "train",
            "self.adamw.learning_rate = self.options.lr if lr is None else lr",
            "self.adamw.learning_rate = lr or self.adamw.learning_rate",
        ),
        package="bridge_mlx",
    ),
    Fault(
        "mlx: a tied head is a copy",
        "After training the model says what it learnt, by the head that it had before.",
        "7.9",
        LIFE,
        Edit(
            "model",
            "linear = replace(linear, weights=(tensors[EMBEDDING],))",
            "pass",
        ),
        package="bridge_mlx",
    ),
)
