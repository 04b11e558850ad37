"""The public classes of one host and fast-shm, on a segment that is written over all the time.

Wrong answers are allowed, and so is every FastShmError. A crash, a hang, and any other exception
are not. The form for the C calls is scribble.c, which `make scribble` runs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support.children import run
from support.damage import ENTRY, HEADER, scribble

from fast_litellm_shm import (
    ConcurrencyLimiter,
    FastShmError,
    Limit,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    SlidingWindow,
    Window,
    exceptions,
)
from fast_litellm_shm._shared.inspection import Inspection

from .uses import USES

SECONDS = float(os.environ.get("SCRIBBLE_SECONDS", "8"))
SEED = int(os.environ.get("SCRIBBLE_SEED") or random.SystemRandom().randrange(2**32))
CAPACITY = 30
DEADLINE = 60.0  # of one use; they take milliseconds
COMMANDS = (
    ["inspect"],
    ["inspect", "--json"],
    ["ls"],
    ["reset", "a"],
    ["reset", "--all"],
    ["release", "--dead"],
)


def _use(segment: Segment, name: str, chance: random.Random) -> None:
    """Some uses of one class."""
    key = chance.choice("abcdefgh")
    what = chance.randrange(9 + len(USES))
    if what >= 9:
        USES[what - 9](segment, chance)
    elif what == 0:
        limiter = RateLimiter(Limit(5, 2), name="bucket", segment=segment, on_full="raise")
        limiter.wait(key, timeout=0.01)
        limiter.refund(key, 1)
    elif what == 1:
        limiter = RateLimiter(
            Limit(50), Window(9, 60), SlidingWindow(9, 60), name="three", segment=segment
        )
        limiter.check(key)
        limiter.acquire_many(["a", "b", "c"], cost=2)
        repr((limiter.limits, limiter.peek(key), limiter.charge(key, (1, 2, 3))))
    elif what == 2:
        RateLimiter(Limit(chance.randrange(1, 9)), name="bucket", segment=segment).reset(key)
    elif what == 3:
        gpu = ConcurrencyLimiter(3, name="gpu", segment=segment)
        with gpu.slot(key, timeout=0.01):
            repr((gpu.in_flight(key), gpu))
    elif what == 4:
        quota = Quota(rpm=50, tpm=5000, max_parallel=3, name="quota", segment=segment)
        with quota.admit(key, tokens=10) as admission:
            repr((admission, admission.decision, quota.remaining(key)))
            admission.settle(7)
    elif what == 5:
        pool = SimpleConnectionPool("pool", max_per_endpoint=3, segment=segment)
        with pool.connection("https://one.example", timeout=0.01):
            pool.get_stats()
        pool.cleanup()
    elif what == 6:
        found = Inspection(segment)
        repr((found.limiters(), list(found.keys(sort="key")), found.in_flight(), found.damaged))
    elif what == 7:
        repr((segment.stats(), segment.processes(), segment.damaged))
    else:
        Segment(name, create=False).stats()


def _attach(name: str) -> Segment:
    """The header is put back again and again."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return Segment(name, create=False)
        except FastShmError:
            if time.monotonic() > end:
                raise
        time.sleep(0.001)


def _work(name: str, seed: int, seconds: float) -> tuple[int, int]:
    """How many uses, and how many of them raised a FastShmError."""
    os.environ["FAST_LITELLM_SHM_NAME"] = name  # what belongs to no class is there too
    os.environ["FAST_LITELLM_SHM_CAPACITY"] = str(CAPACITY)
    chance, segment = random.Random(seed), _attach(name)
    uses = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        try:
            _use(segment, name, chance)
        except FastShmError:
            refused += 1
        except ValueError as error:  # three costs, for limits that were others by then
            assert "but the limiter has" in str(error), error
            refused += 1
        took = time.monotonic() - began
        assert took < DEADLINE, f"use {uses} with seed {seed} took {took} s"
        uses += 1
    return uses, refused


def _commands(name: str, seconds: float) -> tuple[int, int]:
    runs = failed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        verb = COMMANDS[runs % len(COMMANDS)]
        command = [sys.executable, "-X", "faulthandler", "-m", "fast_litellm_shm.cli", *verb]
        command += [] if verb == ["ls"] else ["--name", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            try:
                said = child.communicate(timeout=DEADLINE)[1].decode("utf-8", "replace")
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGABRT)  # says where it hangs
                said = child.communicate()[1].decode("utf-8", "replace")
        assert child.returncode in (0, 1), f"{command}: {child.returncode}: {said}"
        assert "Traceback" not in said, f"{command}: {said}"
        runs, failed = runs + 1, failed + child.returncode
    return runs, failed


def _part(
    what: str, name: str, seed: int, seconds: float, regions: list[tuple[int, int]]
) -> tuple[int, int]:
    if what == "commands":
        return _commands(name, seconds)
    if what == "work":
        return _work(name, seed, seconds)
    return scribble(name, regions, seed, seconds), 0


def _regions(segment: Segment) -> list[tuple[int, int]]:
    """What is small and decides comes more often than its size says."""
    geometry = segment.geometry()
    return [
        (0, HEADER),
        (geometry.limiters_offset, geometry.limiters_offset + 6 * ENTRY),
        (geometry.processes_offset, geometry.process_stats_offset),
        (geometry.slots_offset, geometry.key_stats_offset),
        (0, geometry.size),
    ]


def test_scribbled(segment_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"to repeat: SCRIBBLE_SEED={SEED} SCRIBBLE_SECONDS={SECONDS:g}")
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment_name)
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", str(CAPACITY))
    segment = Segment(segment_name, capacity=CAPACITY)
    for seed in range(60):  # all limiters exist, before anything is written over
        try:
            _use(segment, segment_name, random.Random(seed))
        except exceptions.PermitTimeoutError:
            continue
    assert segment.stats()["damaged"] is None
    parts = [("work", SEED + i) for i in range(3)] + [("commands", 0), ("scribble", SEED)]
    found = run(
        _part,
        [(what, segment_name, seed, SECONDS, _regions(segment)) for what, seed in parts],
        method="spawn",
        patience=SECONDS + 120,
    )
    print(dict(zip(range(len(parts)), found, strict=True)))
    assert min(uses for uses, _ in found) > 0
    assert found[-1][0] > 100
