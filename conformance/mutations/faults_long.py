"""Faults of the torch backend that only long texts show, or windows over prompts and rows that
leave (chapters 4 to 6): tables that end, caches that are full, masks counted from the wrong end."""

from mutations.fault import Edit, Fault
from mutations.faults_decode import LOST, MOVED, POSITIONS

READ = "long_texts_are_decoded_as_they_are_read"
DRAWN = "long_texts_are_drawn_by_the_rule"

PLAIN = (
    Fault(
        "draws stand still once a table is used up",
        "After 64 tokens every row draws by the same luck at each step, and loops.",
        "6.2",
        DRAWN,
        Edit("decoding.uniforms", "0 <= line[0] <= STEPS - ahead:", "0 <= line[0]:"),
        Edit("decoding.uniforms", "table, int(line[0])", "table, min(int(line[0]), STEPS - 1)"),
        package="bridge",
    ),
    Fault(
        "draws repeat after 256 steps",
        "Long answers have the luck of their beginning once more.",
        "6.2",
        DRAWN,
        Edit("decoding.uniforms", "seeds, steps + later,", "seeds, (steps + later) % 256,"),
        package="bridge",
    ),
    Fault(
        "rope's table is that of the first request",
        "What is longer than the first text stands still at its end.",
        "5.6",
        READ,
        Edit("cells", "if end > self.tables.shape[1]:", "if self.tables.shape[1] == 0:"),
        Edit(
            "cells",
            "index_select(1, positions.reshape(-1))",
            "index_select(1, positions.reshape(-1).clamp(max=self.tables.shape[1] - 1))",
        ),
    ),
    Fault(
        "positions that a table gains are counted from 0",
        "After 256 positions a text is read as if it began again.",
        "5.6",
        READ,
        Edit("rope", "np.arange(length)[:, None] *", "np.arange(length)[:, None] % 256 *"),
        package="bridge",
    ),
    Fault(
        "positions are counted in a byte",
        "After 256 positions decoding reads its text as if it began again.",
        "2.4",
        READ,
        Edit("step", POSITIONS, POSITIONS.replace("positions", "positions % 256")),
    ),
    Fault(
        "caches hold 256 timesteps",
        "A longer answer keeps overwriting its last token but one.",
        "4.1",
        READ,
        Edit("cache", "int(both.limits.max(initial=1))", "min(int(both.limits.max()), 256)"),
        Edit(
            "cache",
            "own[0, :rows, :, at], own[1, :rows, :, at] = k, v",
            "own[0, :rows, :, min(at, 255)], own[1, :rows, :, min(at, 255)] = k, v",
        ),
        Edit("cache", "Reach(p0, t0, T, None if", "Reach(p0, t0, min(T, 256), None if"),
    ),
    Fault(
        "masks of batches with padding reach 256 timesteps",
        "The start of a long text is forgotten as soon as there is padding in front of one.",
        "5.4",
        READ,
        Edit(
            "cells",
            "device=device).tril()[None]",
            "device=device).tril().triu(-255)[None]",
        ),
    ),
    Fault(
        "windows are counted from the longest prompt left",
        "Once the longest prompt has left, the others read past their windows.",
        "5.5",
        READ,
        Edit("cache", LOST, LOST.replace("P,", "int(rows.lengths.max()),")),
    ),
    Fault(
        "padding is cut at the wrong end beside a window",
        "A short prompt beside a long one reads padding where its layers have windows.",
        "5.5",
        READ,
        Edit("cache", "self.padding[:, p0:]", "self.padding[:, : P - p0]"),
    ),
    Fault(
        "windows never leave the prompt",
        "The last token of a prompt is read for ever.",
        "5.5",
        READ,
        Edit("cache", LOST, LOST + "\n            p0 = min(p0, P - 1)"),
    ),
    Fault(
        "caches move last row first",
        "Where several rows move up, all of them remember what the last one said.",
        "4.3",
        READ,
        Edit(
            "cache",
            "for new, old in enumerate(kept):",
            "for new, old in reversed([*enumerate(kept)]):",
        ),
    ),
    Fault(
        "only keys move",
        "Where a row leaves, those after it look for their own past and find another's.",
        "4.3",
        READ,
        Edit("cache", MOVED, MOVED.replace(":, new", "0, new").replace(":, old", "0, old")),
    ),
)

FUSED = (
    Fault(
        "fused step: timesteps are counted in a byte",
        "After 256 tokens the first ones are overwritten.",
        "4.1",
        READ,
        Edit("fused.c", "memcpy(keys + step * d,", "memcpy(keys + (uint8_t)step * d,"),
        Edit("fused.c", "memcpy(values + step * d,", "memcpy(values + (uint8_t)step * d,"),
    ),
    Fault(
        "fused step: 256 timesteps of an answer are read",
        "Long answers no longer know what they have just said.",
        "4.1",
        READ,
        Edit(
            "fused.c",
            "P - p0, step + 1 - t0);",
            "P - p0, step + 1 - t0 > 256 ? 256 : step + 1 - t0);",
        ),
    ),
    Fault(
        "fused step: windows stand still after the prompt",
        "The longer an answer, the more is read of what training never showed.",
        "5.5",
        READ,
        Edit(
            "fused.c",
            "P + step + 1 > window ? P + step + 1 - window",
            "P > window ? P - window",
        ),
    ),
    Fault(
        "fused step: answers are read beyond the window",
        "Mistral's layers read what training never showed them.",
        "5.5",
        READ,
        Edit("fused.c", "t0 = lost - p0;", "t0 = 0;"),
    ),
    Fault(
        "fused step: values lie behind the timesteps that were fed",
        "As an answer grows, its keys are written where its values were.",
        "4.3",
        READ,
        Edit("fused.c", "*values = keys + K * T * d;", "*values = keys + K * (step + 1) * d;"),
    ),
)

FAULTS = (*PLAIN, *FUSED)
