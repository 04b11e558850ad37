"""A state folder for each test, and reboots: the segment is gone, and the file is what there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.reboots import Host


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the state files of this test lie."""
    found = tmp_path / "state"
    monkeypatch.setenv("FAST_LITELLM_SHM_STATE", str(found))
    return found


@pytest.fixture
def host(segment_name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with Host(segment_name, str(folder), monkeypatch) as made:
        yield made
