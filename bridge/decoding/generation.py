"""Generation, start to end: all requests of an engine answered, with events or without.

Whoever has more to do between two steps has a loop of this kind: step until the engine is idle.
"""

from collections.abc import Iterator, Sequence

from bridge.decoding.engine import Engine
from bridge.decoding.events import Answered, Done, Event, ResponseSet
from bridge.decoding.requests import Request


def follow(engine: Engine, requests: Sequence[Request]) -> Iterator[Event]:
    """Every event until all these are answered, and then Done with the answers, in their order.
    They are submitted at once, before the first event is asked for."""
    tickets = [engine.submit(request) for request in requests]
    return _events(engine, tickets)


def answer(engine: Engine, requests: Sequence[Request]) -> list[ResponseSet]:
    """The answers to these requests, in their order."""
    for event in follow(engine, requests):
        if isinstance(event, Done):
            return event.sets
    raise AssertionError("a stream ends with Done")


def _events(engine: Engine, tickets: Sequence[int]) -> Iterator[Event]:
    sets: dict[int, ResponseSet] = {}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Answered):
                sets[event.prompt] = event.answers
            else:
                yield event
    yield Done([sets[ticket] for ticket in tickets], engine.stats)
