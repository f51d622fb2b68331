"""Tasks of reasoning-gym: any of its generators by name, its config as options, its own scores.

Which split a question belongs to is a hash of its text: half are train's, a quarter validation's, a
quarter test's, under every config and seed. So no question of one split is in another, whatever is
trained on, even where a generator has few. Problem n of a split is found by drawing, from seeds
that are functions of (seed, split, n), until a question of the split comes up.

Generators run in a process of their own (`gym_process`), in which texts hash the same in every run
and the global random states are set before each draw, since some generators depend on either.
"""

import weakref
from importlib.util import find_spec
from pickle import dumps, loads
from typing import Any

from bridge.answers.conclusion import normalise
from bridge.errors import BridgeError, show
from bridge.processes.parent import Child, ChildLost
from bridge.tasks.extraction import INSTRUCTIONS, check_place, read_answer
from bridge.tasks.gym_datasets import PREFIX, make_dataset
from bridge.tasks.problem import Problem, check_number, check_threshold

LIMIT = 120.0  # seconds that a problem may take to be made


class GymTask:
    """A task of reasoning-gym. A response's score is what the generator's own scorer gives to the
    answer in it, partial credit included; without an answer it is 0.

    Splits are endless: where a generator has few questions, they come again within their split.
    """

    def __init__(
        self,
        generator: str,
        /,
        *,
        seed: int = 0,
        extract: str = "tag",
        instruction: str | None = None,
        threshold: float = 1.0,
        **config: Any,
    ) -> None:
        """`config`: of the generator, such as `min_terms`. `seed`: another one gives other
        problems, of the same splits. `extract`: where answers stand (`bridge.tasks.extraction`).
        `instruction`: what the prompt says after the question; None: to put the answer there.

        Raises BridgeError where reasoning-gym is not installed, and for an unknown generator or
        option.
        """
        if find_spec("reasoning_gym") is None:
            raise BridgeError(
                f"{PREFIX}{generator}: reasoning-gym is not installed; try: "
                "pip install 'bridge-llm[tasks]'"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise BridgeError(f"{PREFIX}{generator}: seed must be an integer, not {show(seed)}")
        if instruction is not None and not isinstance(instruction, str):
            raise BridgeError(f"{PREFIX}{generator}: instruction must be text")
        self.generator, self.config, self.seed = generator, config, seed
        self.extract = check_place(extract)
        self.instruction = INSTRUCTIONS[extract] if instruction is None else instruction
        self.threshold = check_threshold(threshold)
        self.name = PREFIX + generator
        self.child: Child | None = None
        self.dataset: Any = None
        self._process()  # says what is wrong with name or config

    def size(self, split: str) -> None:
        """None: generators are endless. Raises BridgeError for an unknown split."""
        check_number(self.name, None, split, 0)

    def problem(self, split: str, number: int) -> Problem:
        """A question, its instruction, the answer of the generator, and its metadata.

        Raises BridgeError where the generator fails, and where it has too few questions for the
        split to have any.
        """
        check_number(self.name, None, split, number)
        try:
            answer = loads(self._process().ask(dumps((split, number)), LIMIT))
        except ChildLost as error:
            raise BridgeError(f"{self._called(split, number)}: its generator {error}") from None
        if isinstance(answer, str):
            raise BridgeError(f"{self._called(split, number)}: {answer}; change its config")
        prompt = answer["question"]
        if self.instruction:
            prompt = f"{prompt}\n\n{self.instruction}"
        right = answer["answer"]
        return Problem(number, prompt, None if right is None else str(right), {"entry": answer})

    def score(self, problem: Problem, response: str) -> float:
        """What the generator's scorer gives."""
        answer = read_answer(response, self.extract)
        if answer is None:
            return 0.0
        self.prepare()
        return self.dataset.score_answer(answer, problem.metadata["entry"])

    def read_answer(self, response: str) -> str | None:
        """The answer, normalised as votes are."""
        answer = read_answer(response, self.extract)
        return None if answer is None else normalise(answer) or None

    def prepare(self) -> None:
        """Import what scoring needs."""
        if self.dataset is None:
            self.dataset = make_dataset(self.generator, self.config, seed=0, size=1)

    def _process(self) -> Child:
        if self.child is None or self.child.closed:
            setting = dumps((self.generator, self.config, self.seed))
            self.child = Child("bridge.tasks.gym_process:draw_with", setting)
            weakref.finalize(self, self.child.close)
        self.child.ready()
        return self.child

    def _called(self, split: str, number: int) -> str:
        return f"{self.name}: problem {number} of {split} cannot be made"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "child": None, "dataset": None}
