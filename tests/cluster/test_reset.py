"""Forgetting what keys consumed, by the limiter and by ``fast-shm reset``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import servers
from support.children import PATIENCE
from support.waiting import wait_until

from fast_litellm_shm import Limit, RateLimiter, Segment, Window
from fast_litellm_shm.cli import reset
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.exceptions import ClusterError

COMMAND = [sys.executable, "-m", "fast_litellm_shm.cli", "reset", "--name"]


@pytest.fixture
def limiter(server: servers.Server, segment: Segment) -> RateLimiter:
    cluster = Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST)
    return RateLimiter(Window(5, 3600), name="api", segment=segment, cluster=cluster)


def use_up(limiter: RateLimiter, *keys: str) -> None:
    for key in keys:
        assert [bool(limiter.acquire(key)) for _ in range(6)] == [True] * 5 + [False]


def fast_shm(segment: Segment, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, segment.name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(
    ("arguments", "told", "reset"),
    [
        (["a"], "Reset key 'a' of limiter 'api'.\n", "a"),
        (["--limiter", "api"], "Reset limiter 'api': all keys (2 known).\n", "ab"),
        (["--all"], "Reset limiter 'api': all keys (2 known).\n", "ab"),
        (["c"], "Nothing to reset: key 'c' has consumed nothing in any limiter.\n", ""),
    ],
)
def test_the_server_is_told(
    limiter: RateLimiter,
    server: servers.Server,
    segment: Segment,
    other: Segment,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
    reset: str,
) -> None:
    use_up(limiter, "a", "b")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    done = fast_shm(segment, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
    elsewhere = RateLimiter(Window(5, 3600), name="api", segment=other, cluster=server.url)
    assert [key for key in "ab" if elsewhere.acquire(key)] == list(reset)
    assert [key for key in "ab" if limiter.acquire(key)] == list(reset)


def test_live_views_reset_likewise(
    limiter: RateLimiter, server: servers.Server, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_up(limiter, "a")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    assert reset.reset_key(segment.name, False, "api", b"a")
    assert limiter.acquire("a")


def test_a_server_that_is_not_named(limiter: RateLimiter, segment: Segment) -> None:
    """What this host keeps is reset, and what it cannot reset it does not say it has."""
    use_up(limiter, "a")
    here = RateLimiter(Window(5, 3600), name="here", segment=segment)
    use_up(here, "a")
    done = fast_shm(segment, "a")
    assert (done.returncode, done.stdout) == (1, "Reset key 'a' of limiter 'here'.\n")
    assert "limiter 'api'" in done.stderr and "set FAST_LITELLM_SHM_CLUSTER" in done.stderr
    assert here.acquire("a") and not limiter.acquire("a")


@pytest.mark.parametrize("arguments", [["a"], ["--all"]])
def test_a_server_that_is_away(
    limiter: RateLimiter,
    server: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    use_up(limiter, "a")
    server.kill()
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    done = fast_shm(segment, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"limiter 'api': nothing was reset, since {server.url} does not answer" in done.stderr


def test_a_limiter_tells_what_it_could_not_do(server: servers.Server, segment: Segment) -> None:
    """Also in a process that asks for nothing else; it can, when the server is back."""
    cluster = Cluster(server.url, timeout=servers.SLOWEST)
    bucket = RateLimiter(Limit(5, 3600), name="bucket", segment=segment, cluster=cluster)
    server.kill()
    for key in ("a", None):
        with pytest.raises(ClusterError, match="limiter 'bucket': nothing was reset, since"):
            bucket.reset(key)
    with pytest.raises(ClusterError, match="limiter 'bucket': nothing was blocked, since"):
        bucket.block("a", 60)
    server.start()

    def reset() -> bool:
        try:
            bucket.reset("a")
        except ClusterError:
            return False
        return True

    wait_until("it can be reset", reset)
    bucket.block("a", 60)
    assert not bucket.acquire("a")
