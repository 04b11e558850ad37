"""``make demo-litellm``: its configuration starts, with the plugin, and admits what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.names import left_over, remove, unique_name
from support.proxy import STARTS_WITHIN

for package in (
    "fastapi",
    "gunicorn",
):  # the proxy itself takes seconds to import, for nothing here
    pytest.importorskip(package, reason="the proxy's packages are not installed")

DEMO = Path(__file__).parents[2] / "examples" / "litellm_proxy" / "run.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo, with fewer workers and requests, that still are more than is configured."""
    spec = importlib.util.spec_from_file_location("demo_litellm", DEMO)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setattr(found, "WORKERS", 2)
    fewer = tuple(case._replace(requests=case.requests // 3) for case in found.CASES)
    monkeypatch.setattr(found, "CASES", fewer)
    monkeypatch.setattr(found, "STARTS_WITHIN", STARTS_WITHIN)
    return found


def test_the_plugin_admits_what_is_configured(demo: Any) -> None:
    name = unique_name("demo")
    try:
        assert all(c.requests * c.per_answer > 1.2 * c.configured for c in demo.CASES)
        admitted = demo.run(name, plugin=True)
        assert demo.show(admitted, admitted), dict(zip(demo.CASES, admitted, strict=True))
    finally:
        remove(name)
        assert not left_over(name)
