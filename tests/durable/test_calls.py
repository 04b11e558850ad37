"""Calls of durable limits: from threads, event loops, processes and forks."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.reboots import Host, leases_of, link_of, spend
from support.waiting import TooSlow

from fast_litellm_shm import FixedWindow, Quota, RateLimiter, Segment, TokenBucket
from fast_litellm_shm._shared import performance
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.grantor import Server
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable import StateFile
from fast_litellm_shm.durable.grantor import File
from fast_litellm_shm.durable.link import COMPONENT
from fast_litellm_shm.limiters.choice import chosen

DAY = 86_400


def _transactions(host: Host) -> int:
    stats = performance.segment_stats(host.segment, COMPONENT).get(COMPONENT)
    return 0 if stats is None else int(stats["total_calls"])


def _end(leases: TokenLeases) -> int:
    """Of the window of key k. What passes between the two looks is missing: the latest of many."""
    states = leases.states
    return max(states.now() + states.known(b"k")[1][0] for _ in range(100))


def test_threads_admit_exactly_the_limit(host: Host) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: spend(limiter, "k"), range(8))) == 1000


def test_threads_share_transactions(host: Host) -> None:
    limiter = host.limiter(FixedWindow(10, per=DAY))
    limiter.acquire("first")
    link, began = link_of(limiter), threading.Event()
    commits: list[int] = []
    answers = link._answers

    def slow(calls: object) -> object:
        commits.append(len(calls))  # type: ignore[arg-type]
        if len(commits) == 1:
            began.wait(10)
        return answers(calls)  # type: ignore[arg-type]

    link._answers = slow  # type: ignore[assignment,method-assign]
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(limiter.acquire, f"k{i}") for i in range(8)]
        while len(link._asked) < 7:
            pass
        began.set()
        assert all(each.result() for each in found)
    assert commits == [1, 7]


def test_a_call_within_a_lease_writes_nothing(host: Host) -> None:
    limiter = host.limiter(FixedWindow(100_000, per=DAY))
    while leases_of(limiter).look(b"k")[0][0] < 50:
        limiter.acquire("k")
        host.pass_time(1e-4)
    # The thread that asks ahead takes the lease back for a moment: not now.
    with link_of(limiter).ensure(Background).reporting:
        link_of(limiter).settlements.clear()
        leases = leases_of(limiter)
        before, rows = _transactions(host), host.rows()
        assert spend(limiter, "k", 5) == 5
        end = _end(leases)
        (had,), (lasts,) = leases.look(b"k")
        over = time.monotonic_ns() + lasts
        leases.settle(Settlement(leases, b"k", (0,), (3,), (end,)), later=False)
        (more,) = leases.look(b"k")[0]
        leases.settle(Settlement(leases, b"k", (7,), (0,), (end,)), later=True)
        (less,) = leases.look(b"k")[0]
        if time.monotonic_ns() >= over:
            raise TooSlow("the lease ended meanwhile")
        assert (more, less) == (had + 3, had - 4)
        assert (_transactions(host), host.rows()) == (before, rows)


def test_a_settlement_beyond_a_lease_goes_to_the_file(host: Host) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert limiter.acquire("k", 400)
    leases = leases_of(limiter)
    end = _end(leases)
    leases.settle(Settlement(leases, b"k", (0,), (300,), (end,)), later=False)
    assert limiter.peek("k").remaining == 900
    leases.settle(Settlement(leases, b"k", (950,), (0,), (end,)), later=False)
    assert not limiter.acquire("k")
    leases.settle(Settlement(leases, b"k", (0,), (60,), (end,)), later=False)  # 50 of it are debt
    host.lose_power()
    assert spend(host.limiter(FixedWindow(1000, per=DAY)), "k") == 10


def test_an_event_loop_does_not_wait_for_the_disk(host: Host) -> None:
    limiter = host.limiter(FixedWindow(50, per=DAY), durable=StateFile(host.folder, timeout=30))
    assert limiter.acquire("first")
    other = sqlite3.connect(host.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def main() -> None:
        asked = asyncio.create_task(limiter.acquire_async("k"))
        for _ in range(20):  # the loop runs, while a thread waits
            await asyncio.sleep(0.001)
        assert not asked.done()
        other.execute("ROLLBACK")
        assert (await asked).allowed

    asyncio.run(main())
    other.close()


def test_waiting(host: Host) -> None:
    limiter = host.limiter(TokenBucket(100, per=1, burst=1))
    assert limiter.wait("k", timeout=10).allowed

    async def main() -> None:
        host.pass_time(1)
        assert (await limiter.wait_async("k", timeout=10)).allowed

    asyncio.run(main())
    spend(limiter, "k")
    assert not limiter.wait("k", timeout=0)


def test_many_keys_in_one_transaction(host: Host) -> None:
    limiter = host.limiter(FixedWindow(10, per=DAY))
    before = _transactions(host)
    found = limiter.acquire_many([f"k{i}" for i in range(150)])
    assert found.allowed.all()
    assert _transactions(host) - before <= 2


_SPENDS = """
from fast_litellm_shm import FixedWindow, RateLimiter
from fast_litellm_shm.durable import StateFile
limiter = RateLimiter(FixedWindow(2000, per=86400), name="free", durable=StateFile(timeout=60))
print(sum(1 for _ in iter(lambda: limiter.acquire("k").allowed, False)))
"""


def test_processes_admit_exactly_the_limit(folder: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", _SPENDS], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sum(int(each.communicate()[0]) for each in both) == 2000


def test_a_fork(host: Host) -> None:
    limiter = host.limiter(FixedWindow(100, per=DAY))
    assert spend(limiter, "k", 20) == 20
    pid = os.fork()
    if not pid:
        os._exit(spend(limiter, "k", 30) != 30)
    assert os.waitpid(pid, 0)[1] == 0
    assert spend(limiter, "k") == 50


def test_a_server_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(chosen(None, True), File)
    assert not isinstance(chosen(None, False), File)
    assert isinstance(chosen(False, True), File)
    assert isinstance(chosen("redis://localhost:1/0", True), Server)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "redis://localhost:1/0")
    assert isinstance(chosen(None, True), Server)
    assert isinstance(chosen(False, True), File)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"folder": 7}, TypeError, "folder must be a path"),
        ({"on_outage": "maybe"}, ValueError, "local, deny, allow"),
        ({"timeout": "1"}, TypeError, "a number of seconds"),
        ({"timeout": 0}, ValueError, "0.001 to 60"),
        ({"timeout": True}, TypeError, "a number of seconds"),
    ],
)
def test_bad_settings(given: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        StateFile(**given)  # type: ignore[arg-type]


def test_bad_durable() -> None:
    with pytest.raises(TypeError, match="durable must be True, False or a StateFile"):
        RateLimiter(FixedWindow(1), name="x", durable="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FAST_LITELLM_SHM_STATE", "state", "FAST_LITELLM_SHM_STATE must be an absolute path"),
        (
            "FAST_LITELLM_SHM_STATE_OUTAGE",
            "denied",
            "_STATE_OUTAGE: on_outage must be one of",
        ),
        ("FAST_LITELLM_SHM_STATE_TIMEOUT", "soon", "FAST_LITELLM_SHM_STATE_TIMEOUT"),
    ],
)
def test_a_bad_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=says):
        RateLimiter(FixedWindow(1), name="x", durable=True)


def test_a_limiter_that_another_process_has_made_durable(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    """It would count alone: it says so, once."""

    def plain(name: str) -> None:
        assert RateLimiter(FixedWindow(5), name=name, segment=segment).acquire("k")
        Quota(rpm=5, name=f"{name} quota", segment=segment)

    plain("free")
    assert not caplog.records
    made = RateLimiter(FixedWindow(5), name="paid", segment=segment, durable=True)
    Quota(rpm=5, max_parallel=2, name="paid quota", segment=segment, durable=True)
    assert made.acquire("k")
    plain("paid")
    plain("paid")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for text, name in zip(said, ("paid", "paid quota"), strict=True):
        assert text.startswith(f"limiter '{name}' in segment ") and "twice the limit" in text


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_STATE_OUTAGE", "deny")
    monkeypatch.setenv("FAST_LITELLM_SHM_STATE_TIMEOUT", "2.5")
    found = chosen(None, True)
    assert isinstance(found, File)
    assert (found.file.on_outage, found.file.timeout) == ("deny", 2.5)
    monkeypatch.delenv("FAST_LITELLM_SHM_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert StateFile().folder == str(tmp_path / "fast_litellm_shm")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert StateFile().folder == os.path.expanduser("~/.local/state/fast_litellm_shm")
