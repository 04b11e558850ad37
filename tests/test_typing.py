"""The public API as a type checker sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fast_litellm_shm

GOOD = """
from typing import Any
import fast_litellm_shm as fls
from fast_litellm_shm import (
    Admission, Batch, ConcurrencyLimiter, Decision, Limit, Permit, Quota, RateLimiter, Segment,
    SegmentError, SimpleRateLimiter, SlidingWindow, Window,
)

def use(segment: Segment) -> None:
    limiter = RateLimiter(
        Limit(100, per=60, burst=10), Window(5000, per=3600), SlidingWindow(5), Limit(5),
        name="chat", segment=segment, on_full="deny",
    )
    decision: Decision = limiter.acquire("user", cost=(1, 2, 3, 4))
    allowed: bool = decision.allowed and bool(decision)
    retry: float | None = decision.retry_after
    left: int = decision.remaining
    reset: float = decision.reset_after
    limit: Limit | Window | SlidingWindow = decision.limit
    limiter.peek(b"k")
    limiter.charge("k", 5)
    limiter.refund("k", [1, 1, 1, 1])
    limiter.reset()
    limiter.block("k", 1.5)
    waited: Decision = limiter.wait("k", timeout=1.5)
    batch: Batch = limiter.acquire_many(["a", b"b"], cost=[1, 2])
    total: int = int(batch.allowed.sum())
    answer: dict[str, Any] = SimpleRateLimiter(60, name="n", burst=5).check()
    also: dict[str, Any] = fls.check_rate_limit("k")
    stats: dict[str, Any] = fls.get_rate_limit_stats()
    size: dict[str, Any] = Segment.default().stats()
    print(allowed, retry, left, reset, limit, waited, total, answer, also, stats, size)

def hold(limiter: ConcurrencyLimiter, quota: Quota) -> None:
    permit: Permit = limiter.acquire(key="k")
    over: bool = permit.released or bool(permit)
    held: int = permit.in_flight
    back: bool = permit.release()
    waited: Permit = limiter.wait(b"k", timeout=1)
    with limiter.slot("k", timeout=None) as slot:
        mine: Permit = slot
    with quota.admit("k", tokens=5) as admission:
        admission.settle(7)
    ended: bool = admission.released or admission.allowed
    left: dict[str, int] = quota.remaining("k")
    limit: Limit | Window | SlidingWindow = admission.decision.limit
    print(over, held, back, waited, mine, ended, left, limit, limiter.in_flight("k"))

async def hold_later(limiter: ConcurrencyLimiter, quota: Quota) -> None:
    permit: Permit = await limiter.acquire_async("k")
    waited: Permit = await limiter.wait_async("k", timeout=1)
    async with limiter.slot_async("k") as slot:
        mine: Permit = slot
    admission: Admission = await quota.admit_async("k", 5)
    decision: Decision = await RateLimiter(Limit(5)).acquire_async("k", cost=2)
    print(permit, waited, mine, admission, decision)

@fls.limited(RateLimiter(Limit(5)), key=lambda n: str(n), cost=2, wait=1.5)
def doubled(n: int) -> int:
    return 2 * n

four: int = doubled(2)

pool = fls.SimpleConnectionPool("p")

@pool.connection("https://host", timeout=1)
def halved(n: int) -> int:
    with pool.connection("https://host") as connection:
        print(connection)
    return n // 2

@pool.connection_async("https://host")
async def halved_later(n: int) -> int:
    async with pool.connection_async("https://host") as connection:
        print(connection)
    return n // 2

two: int = halved(four)

async def later(limiter: RateLimiter) -> bool:
    try:
        return (await limiter.wait_async("k", timeout=None)).allowed
    except SegmentError:
        return False
"""

NAMES = "from fast_litellm_shm import *; from fast_litellm_shm import SimpleConnectionPool"
BAD = {
    "RateLimiter(Limit(5)).acquire(5)": "arg-type",
    'RateLimiter(Limit("5"))': "arg-type",
    "RateLimiter(5)": "arg-type",
    'RateLimiter(Limit(5)).acquire("k").allowed()': "operator",
    'RateLimiter(Limit(5)).acquire("k").retry_after + 1': "operator",
    "limited(5)": "arg-type",
    'limited(RateLimiter(Limit(5)))(len)("a", "b")': "call-arg",
    'SimpleConnectionPool("p").connection("https://host")(len)("a", "b")': "call-arg",
    'ConcurrencyLimiter(5, name="n").acquire(5)': "arg-type",
    'ConcurrencyLimiter(5, name="n").acquire("k").released()': "operator",
    'Quota(rpm=5, name="n").admit("k", tokens="5")': "arg-type",
    "RateLimiter(Limit(5), cluster=5)": "arg-type",
    "Limit(5, 60, 10)": "call-arg",
    'RateLimiter(Limit(5)).acquire_many("k", cost="1")': "arg-type",
}


def check(tmp_path: Path, source: str) -> str:
    pytest.importorskip("mypy", reason="needs mypy")
    file = tmp_path / "use.py"
    file.write_text(source)
    # where it is not installed for good (an editable install, a checkout) mypy must be told
    package = str(Path(fast_litellm_shm.__file__).parents[1])
    path = {} if "site-packages" in package else {"MYPYPATH": package}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--no-error-summary",
            "--cache-dir",
            str(tmp_path / "cache"),
            str(file),
        ],
        check=False,
        cwd=tmp_path,
        env=os.environ | path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_uses_of_the_public_api(tmp_path: Path) -> None:
    assert check(tmp_path, GOOD) == ""


def test_misuses_are_found(tmp_path: Path) -> None:
    lines = [NAMES, *BAD]
    said = check(tmp_path, "\n".join(lines) + "\n").splitlines()
    for number, (line, code) in enumerate(BAD.items(), start=2):
        found = [s for s in said if f"use.py:{number}: error" in s]
        assert any(s.endswith(f"[{code}]") for s in found), (line, said)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(fast_litellm_shm.__file__).parent / "py.typed").exists()
