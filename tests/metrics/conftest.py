"""See support.scene."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import scene as scenes


@pytest.fixture
def scene() -> Iterator[scenes.Scene]:
    """Something of everything."""
    with scenes.scene() as made:
        yield made
