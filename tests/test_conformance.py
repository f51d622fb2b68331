"""Every property of the contract, for every backend that is here, in every dtype (chapter 10).

The checks are `bridge_conformance`'s; the reference itself must pass them too.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.registry import backends, find_backend
from bridge_conformance.checks import CHECKS
from bridge_conformance.trial import Target

TARGETS = [
    (info.name, device, dtype)
    for info in backends()
    for device in info.devices
    for dtype in info.dtypes[device]
]
# The reference runs in Python, and its low dtypes are what others are measured by.
EXAMPLES = {"numpy": 6, "torch": 12}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("backend,device,dtype", TARGETS)
def test_conformance(backend, device, dtype, name):
    check = CHECKS[name]
    target = Target(find_backend(backend), device, dtype, check.clause)
    quick = settings.default is settings.get_profile("ci")
    examples = EXAMPLES.get(backend, 12) if quick else settings.default.max_examples

    @settings(max_examples=examples)
    @given(st.data())
    def run(data):
        check.run(target, data.draw(check.cases))

    run()
