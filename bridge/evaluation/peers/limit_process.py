"""The machine's rates, measured in a process of its own, like the engines that they are held
against. A question is the name of a device; the answer is `limit.measure`, as JSON."""

import json
from collections.abc import Callable

from bridge.evaluation.peers.threads import limit_threads


def serve(payload: bytes) -> Callable[[bytes], bytes]:
    """`payload`: the number of threads."""
    limit_threads(int(payload))

    def answer(question: bytes) -> bytes:
        from bridge.evaluation.peers.limit import measure

        return json.dumps(measure(question.decode())).encode()

    return answer
