"""pytest plugin: Flask-Limiter's own tests, with ``shm://`` in the place of memory and Redis.

They need no server then, and hiro's clock moves that of segments too (ahead.c).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flask_limiter._extension as extension
import hiro
import pymemcache
import pymongo
import pytest
import redis
from peers.timeline import Timeline

import fast_litellm_shm.integrations.limits  # noqa: F401 - registers shm://
from fast_litellm_shm import Segment

_number = itertools.count()
_shared: dict[str, str] = {}  # segments of this test, by what they stand for
_storage_from_string = extension.storage_from_string


def _shm(uri: str, **options: Any) -> Any:
    """Each memory:// is a storage of its own; a server is one for all who name it."""
    if not uri.startswith(("memory://", "redis://")):
        return _storage_from_string(uri, **options)
    number = f"t-{os.getpid()}-{next(_number)}"
    name = _shared.setdefault(uri if uri.startswith("redis://") else number, number)
    return _storage_from_string(f"shm://{name}?capacity=1000", **options)


extension.storage_from_string = _shm
hiro.Timeline = Timeline

# conftest.py starts servers in containers, and empties them.
_no_server: Any = SimpleNamespace(flushall=lambda: None, flush_all=lambda: None)
redis.from_url = lambda *_, **__: _no_server
pymemcache.Client = pymongo.MongoClient = lambda *_, **__: _no_server


@pytest.fixture(scope="session")
def docker_services() -> Any:
    return SimpleNamespace(start=lambda *_: None, wait_for_service=lambda *_: None)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    while _shared:
        Segment(_shared.popitem()[1]).remove()
