r"""Tasks from JSONL files: one problem a line, scored by its answer or by a function of the user.

    {"prompt": "What is 17 * 23?", "answer": "391"}
    {"messages": [{"role": "user", "content": "..."}], "answer": 391, "split": "test"}

Other fields go along as metadata. In a right answer that is a whole solution, with `####` or
`\boxed{}` in it, what counts stands there. Either every line names its split, or none does: then it
is a hash of the prompt, a tenth test, a tenth validation, the rest train, in whatever order.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from bridge.answers.conclusion import normalise
from bridge.errors import BridgeError, show
from bridge.files.jsonl import read_lines
from bridge.tasks.extraction import check_place, read_answer
from bridge.tasks.matching import check_match, read_number
from bridge.tasks.problem import SPLITS, Problem, check_number, check_split, check_threshold
from bridge.tasks.user_code import load_function
from bridge.text.chat import are_messages

FIELDS = ("prompt", "messages", "answer", "split")
TENTHS = ("test", "validation", *["train"] * 8)


class JsonlTask:
    """The problems of a file. A response scores 1 if its answer matches, and else 0; or what the
    `reward` gives, `function(problem, response) -> float`."""

    def __init__(
        self,
        path: str | Path,
        /,
        *,
        match: str | None = None,
        tolerance: float = 0.0,
        extract: str = "auto",
        instruction: str = "",
        reward: str | None = None,
        threshold: float = 1.0,
    ) -> None:
        """`match`: how answers are compared (`bridge.tasks.matching`); None is numeric where the
        right answer of the line is a number, and else exact. `extract`: where they stand in a
        response (`bridge.tasks.extraction`). `instruction`: what each prompt says at its end.
        `reward`: "module:function", instead of `match`; lines then need no answer.

        Raises BridgeError, with the number of the line, for whatever is wrong with the file; for
        an unknown option, and where math-verify is needed and not installed.
        """
        if not isinstance(instruction, str):
            raise BridgeError(f"instruction must be text, not {show(instruction)}")
        if reward is not None and (match is not None or tolerance):
            raise BridgeError("reward scores by itself; leave match and tolerance out")
        self.path, self.name = Path(path), str(path)
        self.instruction, self.reward = instruction, reward
        self.extract, self.threshold = check_place(extract), check_threshold(threshold)
        # A reward that is not there is better found now than by the process that calls it.
        self.function = None if reward is None else load_function(reward, "reward")
        self.splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        lines = self._read()
        if match is None and reward is None:
            numbers = [read_number(p.answer or "") is not None for _, _, p in lines]
            match = "numeric" if all(numbers) else None if any(numbers) else "exact"
        self.match, self.tolerance = match, tolerance  # None: each by what its right answer is
        self.matches = check_match(match, tolerance)
        self._check_answers(lines)
        self._split(lines)

    def size(self, split: str) -> int:
        """How many problems a split has."""
        check_split(split)
        return len(self.splits[split])

    def problem(self, split: str, number: int) -> Problem:
        """The problem of the `number`-th line of the split."""
        check_number(self.name, self.size(split), split, number)
        return self.splits[split][number]

    def score(self, problem: Problem, response: str) -> float:
        """Whether the answer matches; or the reward."""
        if self.reward is not None:
            self.prepare()
            assert self.function is not None
            return self.function(problem, response)
        answer = read_answer(response, self.extract)
        return float(answer is not None and self.matches(problem.answer or "", answer))

    def read_answer(self, response: str) -> str | None:
        """The answer, normalised as votes are."""
        answer = read_answer(response, self.extract)
        return None if answer is None else normalise(answer) or None

    def prepare(self) -> None:
        """Import what scoring needs."""
        if self.reward is not None and self.function is None:
            self.function = load_function(self.reward, "reward")
        if self.match == "math":
            import math_verify  # noqa: F401

    def __getstate__(self) -> dict[str, Any]:
        """For scoring alone: without the problems, and with the reward by its name."""
        return {**vars(self), "splits": {split: [] for split in SPLITS}, "function": None}

    def _read(self) -> list[tuple[int, str | None, Problem]]:
        """Each line that is not blank: its number, its split if it names one, its problem."""
        lines = []
        for line in read_lines(self.path):
            lines.append((line.number, *self._line(line.where, line.to_object())))
        if not lines:
            raise BridgeError(f"{self.path}: holds no problem; a line is a JSON object")
        named = {split is not None for _, split, _ in lines}
        if len(named) == 2:
            line = next(number for number, split, _ in lines if split is None)
            raise BridgeError(
                f"{self.path}, line {line}: split is missing, which others name; give all or none"
            )
        return lines

    def _line(self, where: str, record: dict[str, Any]) -> tuple[str | None, Problem]:
        prompt = self._prompt(where, record)
        split = record.get("split")
        if split is not None and split not in SPLITS:
            raise BridgeError(
                f"{where}: split must be one of {', '.join(SPLITS)}, not {show(split)}"
            )
        answer = record.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if answer is None and self.reward is None:
            raise BridgeError(f"{where}: answer is missing; give one, or name a reward")
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise BridgeError(f"{where}: answer must be text or a number, not {show(answer)}")
        if answer is not None and self.reward is None:
            answer = read_answer(answer, "boxed") or read_answer(answer, "hashes") or answer.strip()
        rest = {key: value for key, value in record.items() if key not in FIELDS}
        return split, Problem(0, prompt, answer, rest)

    def _prompt(self, where: str, record: dict[str, Any]) -> Any:
        prompt, messages = record.get("prompt"), record.get("messages")
        if (prompt is None) == (messages is None):
            raise BridgeError(f"{where}: must have prompt or messages, one of the two")
        if prompt is not None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise BridgeError(f"{where}: prompt must be text, not {show(prompt)}")
            return f"{prompt}\n\n{self.instruction}" if self.instruction else prompt
        if not are_messages(messages):
            raise BridgeError(f"{where}: messages must be a list of objects with role and content")
        if self.instruction:
            last = messages[-1]
            last = {**last, "content": f"{last['content']}\n\n{self.instruction}"}
            return [*messages[:-1], last]
        return messages

    def _check_answers(self, lines: Sequence[tuple[int, str | None, Problem]]) -> None:
        if self.reward is not None:
            return
        for number, _, problem in lines:
            if self.match is None and (problem.answer or "").lower() == "nan":
                raise BridgeError(
                    f"{self.path}, line {number}: answer is {problem.answer}, as where a value is "
                    "missing; mend it, or choose match=exact"
                )
            if self.match == "numeric" and read_number(problem.answer or "") is None:
                raise BridgeError(
                    f"{self.path}, line {number}: answer must be a number for match=numeric, not "
                    f"{show(problem.answer)}; mend it, or choose match=exact or math"
                )

    def _split(self, lines: Sequence[tuple[int, str | None, Problem]]) -> None:
        """Give the problems to their splits, in the order of the lines."""
        seen: dict[str, tuple[int, str]] = {}
        for line, named, problem in lines:
            key = _key(problem.prompt)
            split = named or TENTHS[int.from_bytes(sha256(key.encode()).digest()[:8], "big") % 10]
            first, there = seen.setdefault(key, (line, split))
            if there != split:
                raise BridgeError(
                    f"{self.path}, line {line}: the prompt of {split} is that of line {first}, "
                    f"which is of {there}; keep it in one split"
                )
            problems = self.splits[split]
            problems.append(
                Problem(len(problems), problem.prompt, problem.answer, problem.metadata)
            )


def _key(prompt: Any) -> str:
    """What makes two prompts the same: their words."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(text.split())
