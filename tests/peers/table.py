"""pytest plugin: holds a peer's own tests against by_design.py."""

from __future__ import annotations

import os

import pytest
from peers import by_design

PEER = os.environ["PEER"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out, fails = by_design.LEFT_OUT[PEER], by_design.FAILS[PEER]
    out = [item for item in items if any(part in item.nodeid for part in left_out)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    stale = {part for part in left_out if not any(part in item.nodeid for item in out)}
    again = by_design.AT_A_MOMENT[PEER]
    stale |= (fails.keys() | again.keys()) - {item.nodeid for item in items}
    if stale:
        raise pytest.UsageError(f"by_design.py names what {PEER} does not test: {sorted(stale)}")
    for item in items:
        if item.nodeid in fails:
            item.add_marker(pytest.mark.xfail(reason=fails[item.nodeid], strict=True))
        if item.nodeid in again:
            item.add_marker(pytest.mark.flaky(reruns=2))
