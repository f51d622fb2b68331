"""Faults of reading and writing checkpoints (chapter 9): in Bridge's own files, not a backend's.

A backend whose package brings its own reader can make the same mistakes.
"""

from mutations.fault import Edit, Fault

SAME = "a_checkpoint_gives_the_same_model"
FORMS = "every_form_gives_the_same_model"


def forms(old: str, new: str) -> Edit:
    """An edit of `forms.py`."""
    return Edit("checkpoints.forms", old, new)


FAULTS = (
    Fault(
        "a shard is dropped when it is read",
        "The end of a large model is not there.",
        "9.4",
        SAME,
        Edit(
            "checkpoints.shards",
            "shards = sorted(set(weight_map.values()))",
            "shards = sorted(set(weight_map.values()))[:-1]",
        ),
        package="bridge",
    ),
    Fault(
        "a shard is dropped when it is written",
        "Half a day of training is saved, less its last layers.",
        "9.4",
        SAME,
        Edit(
            "checkpoints.writing",
            "    count = len(shards)\n",
            "    shards = shards[:-1] or shards\n    count = len(shards)\n",
        ),
        package="bridge",
    ),
    Fault(
        "tensors of a shard are read from its header on",
        "Every number is one of some other place of its file.",
        "9.4",
        SAME,
        Edit(
            "checkpoints.safetensors_io",
            "self._bytes, self._start + self._offsets[name]\n",
            "self._bytes, self._offsets[name]\n",
        ),
        package="bridge",
    ),
    Fault(
        "every layer of a stack is its first",
        "A checkpoint for JAX loads, and all its layers are one.",
        "9.8",
        FORMS,
        forms(
            "array if self.row is None else array[self.row]",
            "array if self.row is None else array[0]",
        ),
        package="bridge",
    ),
    Fault(
        "stacked layers are read on from the first",
        "Converted from JAX's form, a model has its first layer in place of each.",
        "9.12",
        FORMS,
        forms("start + (self.row or 0) * self.spec.nbytes", "start"),
        package="bridge",
    ),
    Fault(
        "layers are stacked last first",
        "A converted model runs its layers in the wrong order.",
        "9.8",
        FORMS,
        forms("entries.append(Entry(tuple(members),", "entries.append(Entry(tuple(members[::-1]),"),
        package="bridge",
    ),
    Fault(
        "stacked blocks are numbered from the first layer on",
        "Blocks after some layers come back after others.",
        "9.8",
        FORMS,
        forms(
            "return config.bridge.layers if config.bridge else ()",
            "return range(len(config.bridge.layers)) if config.bridge else ()",
        ),
        package="bridge",
    ),
)
