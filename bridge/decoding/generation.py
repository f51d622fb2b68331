"""Generation, start to end: all requests of an engine answered, as a stream of events.

Whatever else asks an engine has its own loop of this kind: step until it is idle.
"""

from collections.abc import Iterator

from bridge.decoding.engine import Engine
from bridge.decoding.events import Answered, Done, Event, ResponseSet


def follow(engine: Engine) -> Iterator[Event]:
    """Every event until the engine is idle, and then Done with the answers to all prompts, in the
    order in which they were submitted."""
    sets: dict[int, ResponseSet] = {}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Answered):
                sets[event.prompt] = event.answers
            else:
                yield event
    yield Done([sets[prompt] for prompt in sorted(sets)], engine.stats)
