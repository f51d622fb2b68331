"""What training.py measures: an engine in a process of its own, which makes one update when asked.

Questions come and answers go as lines of JSON. A question has `rows` (see `Rows`) and the name of
an objective; the answer has the seconds of the update, and what shows that two engines did the
same: its loss, the entropy, and the norm of the gradient before clipping. `peak` asks for the bytes
that an update took beyond those that were in use before it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LR = 1e-6
STATUS = Path("/proc/self/status")


class Rows(NamedTuple):
    """One group, all rows of it random."""

    width: int
    prompt: int  # tokens
    response: int  # tokens of the longest
    tailed: bool = False  # each row 0.7 times as long as the one before; else all equally long

    def lengths(self) -> list[int]:
        """Tokens of each response."""
        shrink = 2**-0.5 if self.tailed else 1.0
        return [max(1, round(self.response * shrink**row)) for row in range(self.width)]

    def tokens(self, vocabulary: int) -> tuple[list[int], list[list[int]]]:
        """The prompt and the responses, the same for every engine."""
        random = np.random.default_rng(0)
        prompt = random.integers(0, vocabulary, self.prompt).tolist()
        return prompt, [random.integers(0, vocabulary, n).tolist() for n in self.lengths()]

    def advantages(self) -> np.ndarray:
        """Of each row: mean 0, std 1 (clause 7.6)."""
        rewards = np.arange(self.width) % 2
        return (rewards - rewards.mean()) / max(rewards.std(), 1e-6)


class Line:
    """The two ends of what is asked and said; whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ask(self) -> dict[str, Any]:
        """The next question, waited for; the process ends where none will come."""
        if not (line := sys.stdin.readline()):
            os._exit(0)  # wherever in another's trainer we are
        asked = json.loads(line)
        return {**asked, "rows": Rows(*asked["rows"])}

    def say(self, **answer: Any) -> None:
        """Answer it."""
        print(json.dumps(answer), file=self.out, flush=True)


def bridge(setup: dict[str, Any], line: Line) -> None:
    """Bridge, of whichever tree comes first on the path: `backend`, with `blocks` or without."""
    from accelerator_speed import RandomTensors

    from bridge.checkpoints.reading import open_checkpoint
    from bridge.config import parse_config
    from bridge.contract import GRPO, SFT, AdamW
    from bridge.model import trainable_names
    from bridge.registry import find_backend
    from bridge.training.batches import Group, make_batch

    opened = None if "config" in setup else open_checkpoint(Path(setup["checkpoint"]))
    config = parse_config(setup["config"]) if opened is None else opened.config
    config = config if setup["blocks"] else config.without_bridge()
    if "lora" in setup:
        from bridge.config import LoraConfig  # which an older tree has not

        config = replace(config, lora=LoraConfig(*setup["lora"]))
    tensors: Any = RandomTensors(config) if opened is None else opened.tensors
    backend = find_backend(setup["backend"])
    model = backend.load(config, tensors, device="cpu", dtype="float32")
    names = trainable_names(config, setup["trainable"])
    names += [name for name in low_rank(config) if name not in names]
    how = {"checkpoint_activations": setup.get("again", False)}
    trainers: dict[str, Any] = {}
    line.say(where=str(Path(sys.modules["bridge"].__file__ or "").parent.parent))
    while True:
        asked = line.ask()
        prompt, responses = asked["rows"].tokens(config.vocab_size)
        batch = make_batch([Group(prompt, responses, asked["rows"].advantages())])
        if asked["objective"] not in trainers:
            trainers.clear()  # masters and moments of one at a time
            objective = SFT() if asked["objective"] == "sft" else GRPO()
            trainers[asked["objective"]] = model.trainer(objective, AdamW(lr=LR), names, **how)
        trainer = trainers[asked["objective"]]
        before = _bytes("VmRSS", forget=True) if asked.get("peak") else 0
        start = time.perf_counter()
        metrics = trainer.step(batch)
        seconds = time.perf_counter() - start
        peak = _bytes("VmHWM") - before if asked.get("peak") else None
        kept = {name: metrics.get(name) for name in ("loss", "entropy", "grad_norm", "tokens")}
        line.say(seconds=seconds, peak=peak, **kept)


def low_rank(config: Any) -> list[str]:
    """The tensors of low-rank updates; a tree from before there were any has none."""
    try:
        from bridge.config import lora_names
    except ImportError:
        return []
    return lora_names(config)


def trl(setup: dict[str, Any], line: Line) -> None:
    """TRL's GRPOTrainer of the host alone, whose rollout alone is replaced: it trains on the rows
    asked for, by its own loop, loss, backward pass, clipping and optimizer.

    A step is timed from before it reads its rows until the gradients are forgotten. Its default,
    to compute activations again in the backward pass, is off, as it is in Bridge. On CPUs it sends
    every cell through the head, where on GPUs only those that have a target: `head_at_targets`
    asks for the latter, by the one name that decides it.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.trainer import utils  # pyright: ignore[reportMissingImports]

    decides = utils._use_triton
    width = setup["width"]

    class OnRowsGiven(GRPOTrainer):
        given: Rows

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
            prompt, responses = self.given.tokens(self.model.config.vocab_size)
            lengths = torch.tensor(self.given.lengths())
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.long)
            ids[mask] = torch.tensor([token for said in responses for token in said])
            prompts = torch.tensor(prompt).expand(width, -1)
            return {
                "prompt_ids": prompts,
                "prompt_mask": torch.ones_like(prompts),
                "completion_ids": ids,
                "completion_mask": mask.long(),
                "advantages": torch.from_numpy(self.given.advantages()).float(),
                "num_items_in_batch": lengths.sum(),
            }

    class Asked(TrainerCallback):
        """Asks before each step, and answers when its figures are known."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            asked = line.ask()
            trainer.given = asked["rows"]
            utils._use_triton = (lambda _: True) if asked.get("head_at_targets") else decides
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            kept = {name: float(logs[name]) for name in ("loss", "entropy", "grad_norm")}
            line.say(seconds=self.seconds, **kept)

    model: Any = AutoModelForCausalLM.from_pretrained(setup["host"], dtype=torch.float32)
    options = GRPOConfig(
        output_dir=setup["scratch"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=width,
        num_generations=width,
        gradient_accumulation_steps=1,
        max_steps=10**6,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        beta=0.0,
        temperature=1.0,
        loss_type="dapo",  # over the tokens of the batch, as clause 7.5 has it
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = OnRowsGiven(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=options,
        train_dataset=Dataset.from_dict({"prompt": ["no text is read"] * 1024}),
        processing_class=AutoTokenizer.from_pretrained(setup["host"]),
        callbacks=[Asked()],
    )
    line.say(where=str(Path(sys.modules["trl"].__file__ or "").parent.parent))
    trainer.train()


def _bytes(name: str, forget: bool = False) -> int:
    """Resident bytes, `VmRSS` now or `VmHWM` at most, since `forget` was last asked for where the
    system can forget."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if forget:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return int(STATUS.read_text(encoding="utf-8").partition(f"{name}:")[2].split()[0]) * 1024


ENGINES: dict[str, Callable[[dict[str, Any], Line], None]] = {"bridge": bridge, "trl": trl}


if __name__ == "__main__":
    setup = json.loads(sys.argv[1])
    ENGINES[setup["engine"]](setup, Line())
