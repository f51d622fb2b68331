"""An engine in a process of its own: it prepares, loads and decodes, one question at a time.

Questions and answers are JSON; an answer has `error`, in one line, where the engine raised one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any

from bridge.errors import describe
from bridge.evaluation.peers.engine import Call, Session, Setup
from bridge.evaluation.peers.threads import limit_threads


def serve(payload: bytes) -> Callable[[bytes], bytes]:
    """What answers the questions of `measure` for the setup in `payload`."""
    setup = Setup.from_json(json.loads(payload))
    limit_threads(setup.threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is not JAX's alone
    sessions: list[Session] = []

    def answer(question: bytes) -> bytes:
        asked = json.loads(question)
        try:
            return json.dumps(_carry_out(setup, sessions, asked)).encode()
        except Exception as error:  # whatever an engine raises is one line of the report
            return json.dumps({"error": describe(error)}).encode()

    return answer


def _carry_out(setup: Setup, sessions: list[Session], asked: dict[str, Any]) -> dict[str, Any]:
    engine: Any = import_module(setup.entry.module)  # an `Engine`
    if asked["do"] == "prepare":
        engine.prepare(setup)
        return {}
    if asked["do"] == "load":
        sessions.append(engine.load(setup))
        return {}
    call = Call(**asked["call"])
    found = sessions[0].decode(call)
    found.check(call)
    return asdict(found)
