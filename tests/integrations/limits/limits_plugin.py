"""Puts ``shm://`` in the place of every storage that limits' tests name. See upstream.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from fast_litellm_shm import Segment
from fast_litellm_shm.integrations.limits import AsyncShmStorage, ShmStorage
from tests import utils  # type: ignore[attr-defined,unused-ignore]  # limits' own

NAME = f"t-limits-{os.getpid()}"
# One of the tests takes a million hits at once, and a moving window needs a place for each.
QUERY = "?capacity=2000000"
SYNC, ASYNC = f"shm://{NAME}{QUERY}", f"async+shm://{NAME}{QUERY}"

_with = pytest.mark.parametrize
for name in ("all_storage", "moving_window_storage", "sliding_window_counter_storage"):
    for prefix, uri in (("", SYNC), ("async_", ASYNC)):
        param = pytest.param(uri, {}, None, id="shm")
        setattr(utils, prefix + name, _with("uri, args, fixture", [param]))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    """test_storage.py has its own list of storages."""
    if "expected_instance" not in metafunc.fixturenames:
        return
    is_async = "aio" in metafunc.module.__name__
    ours = (ASYNC, AsyncShmStorage) if is_async else (SYNC, ShmStorage)
    param = pytest.param(ours[0], {}, ours[1], None, id="shm")
    owner = metafunc.definition.getparent(pytest.Class)
    kept = [mark for mark in owner.own_markers if mark.name != "parametrize"]
    owner.own_markers[:] = [*kept, _with("uri, args, expected_instance, fixture", [param]).mark]


@pytest.fixture(autouse=True)
def _nothing_counted() -> Iterator[None]:
    ShmStorage(SYNC).reset()
    yield


def pytest_unconfigure() -> None:
    Segment(NAME).remove()
