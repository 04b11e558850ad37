"""litellm, imported offline, and the plugin's calls."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest

if TYPE_CHECKING:
    from fast_litellm_shm.integrations.litellm.calls import Call

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many calls the plugin has admitted that it has not ended."""
    limiter: Any = importlib.import_module("fast_litellm_shm.integrations.litellm.limiter")
    made: WeakSet[Call] = WeakSet()

    class Kept(limiter.Call):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.add(self)

    monkeypatch.setattr(limiter, "Call", Kept)
    return lambda: sum(not call.finished for call in made)
