"""AdaptiveConcurrency: a limit of calls in flight that all processes learn together. How well it
learns is shown over virtual time, in tests/c/test_adaptive.c."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import urllib.error
from email.message import Message
from typing import Any

import pytest
from support.children import run
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import (
    AdaptiveCall,
    AdaptiveConcurrency,
    PermitTimeoutError,
    QueueFullError,
    RateLimitExceeded,
    Segment,
    cli,
)
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.limiters.adaptive import refusal


def make(segment: Segment, **options: Any) -> AdaptiveConcurrency:
    return AdaptiveConcurrency(**{"name": "up", "initial": 4, "segment": segment, **options})


class Refused(Exception):
    status_code = 429


def test_no_more_than_the_limit(segment: Segment) -> None:
    limit = make(segment)
    calls = [limit.acquire("k") for _ in range(4)]
    assert all(calls)
    assert [call.in_flight for call in calls] == [1, 2, 3, 4]
    denied = limit.acquire("k")
    assert not denied
    assert (denied.in_flight, denied.retry_after, limit.in_flight("k")) == (4, 0.0, 4)
    assert repr(denied) == "AdaptiveCall(denied, in_flight=4)"
    with limit.acquire("other") as other:  # each key for itself
        assert other
    calls[0].ok()
    assert calls[0].release() and not calls[0].release()
    assert repr(calls[0]) == "AdaptiveCall(released)"
    calls.append(limit.wait("k", timeout=0))
    assert calls[-1]
    for call in calls[1:]:
        assert call.release()


def test_a_refusal_lowers_it_for_all_handles_and_new_calls_wait(segment: Segment) -> None:
    mine, other = make(segment), make(segment)
    calls = [mine.acquire("k") for _ in range(4)]
    calls[3].throttled()
    assert other.limit("k") == 2  # three were in flight beside it, less one
    learned = other.learned("k")
    assert (learned.phase, learned.best, learned.exact) == ("refused", 3, False)
    assert learned.since is not None
    for held in (calls[0], calls[1]):
        assert held.release()
        assert not other.acquire("k")  # as many as the limit, or more, are in flight
    assert calls[2].release()
    last = other.acquire("k")
    assert last
    for held in (calls[3], last):
        assert held.release()


def test_it_grows_while_it_is_used(segment: Segment) -> None:
    limit = make(segment, initial=4, max=12)
    for _ in range(100):
        with limit.slot("k"):  # one at a time is not three quarters of 4
            pass
    assert limit.limit("k") == 4
    for _ in range(100):
        calls = [limit.acquire("k") for _ in range(limit.limit("k"))]
        for call in calls:
            call.ok(0.1)
            call.release()
    assert limit.limit("k") == 12


def test_the_end_of_a_block_says_how_it_ended(segment: Segment) -> None:
    limit = make(segment, initial=10)

    def refused() -> int:
        return limit.learned("k").best

    with pytest.raises(ValueError), limit.slot("k"):
        raise ValueError
    assert limit.limit("k") == 10
    with pytest.raises(RateLimitExceeded), limit.slot("k"):
        raise RateLimitExceeded("of this host", 1.0)
    assert limit.limit("k") == 10
    with pytest.raises(KeyboardInterrupt), limit.slot("k"):
        raise KeyboardInterrupt
    assert limit.limit("k") == 10
    with limit.slot("k") as call:
        call.failed()
        call.throttled()  # the first counts
    assert limit.limit("k") == 10
    with pytest.raises(Refused), limit.slot("k") as call:
        raise Refused
    assert refused() == 5  # by half at most, whatever was in flight
    assert limit.in_flight("k") == 0


def test_what_is_a_refusal() -> None:
    class Response:
        def __init__(self, status: int, **headers: str) -> None:
            self.status_code, self.headers = status, headers

    def of(**attributes: Any) -> tuple[bool, float | None]:
        error = Exception()
        for name, value in attributes.items():
            setattr(error, name, value)
        return refusal(error)

    assert of() == (False, None)
    assert of(status_code=429) == (True, None)
    assert of(status=503, headers={"Retry-After": "7"}) == (True, 7.0)
    assert of(status_code=500, headers={"Retry-After": "7"}) == (False, None)
    assert of(response=Response(429, **{"Retry-After": "2"})) == (True, 2.0)
    assert of(status_code=429, response=Response(429, **{"Retry-After": "no"})) == (True, None)
    assert of(status_code="429") == (False, None)
    headers = Message()
    headers["Retry-After"] = "3"
    found = urllib.error.HTTPError("http://x", 429, "", headers, None)
    assert refusal(found) == (True, 3.0)
    found.close()


def test_a_pause_holds_for_all(segment: Segment) -> None:
    limit, other = make(segment), make(segment)
    with limit.slot("k") as call:
        call.throttled(retry_after=60)
    assert 0 < other.blocked("k") <= 60.001  # in units of 0.26 ms
    denied = other.acquire("k")
    assert not denied and 0 < denied.retry_after <= 60.001
    why = "asked for a pause, of which"
    with pytest.raises(PermitTimeoutError, match=why) as raised, other.slot("k", timeout=5):
        pass  # it is raised at once: the call would wait in vain
    assert 0 < raised.value.retry_after <= 60.001
    other.block("k", 1)  # the longer one stays
    assert limit.blocked("k") > 50
    other.unblock("k")
    assert limit.blocked("k") == 0.0
    with limit.acquire("k") as call:
        assert call


def test_a_pause_is_no_longer_than_it_may_be(segment: Segment) -> None:
    limit = make(segment, max_retry_after=2)
    with limit.slot("k") as call:
        call.throttled(retry_after=1e300)
    assert 0 < limit.blocked("k") <= 2.001


def test_who_waits_goes_on_after_the_pause(segment: Segment) -> None:
    limit = make(segment)
    limit.block("k", 0.2)
    with limit.slot("k", timeout=60):
        assert limit.blocked("k") == 0.0
    limit.block("k", 60)
    waits = threading.Thread(target=lambda: limit.wait("k").release())
    waits.start()
    wait_until("it waits", lambda: limit.queue_size("k") == 1)
    limit.unblock("k")
    waits.join(60)
    assert not waits.is_alive()


def test_a_raised_limit_wakes_who_waits(segment: Segment) -> None:
    limit = make(segment, initial=1)
    first = limit.acquire("k")
    got: list[AdaptiveCall] = []
    waits = threading.Thread(target=lambda: got.append(limit.wait("k", timeout=60)))
    waits.start()
    wait_until("it waits", lambda: limit.queue_size("k") == 1)
    first.ok()  # a round of one: the limit is 2, and the first call is still held
    waits.join(60)
    assert got and got[0]
    assert limit.in_flight("k") == 2
    first.release()
    got[0].release()


def test_time_outs_and_full_queues_say_what_is_so(segment: Segment) -> None:
    limit = make(segment, initial=1)
    held = limit.acquire("k")
    with pytest.raises(PermitTimeoutError) as raised, limit.slot("k", timeout=0.01):
        pass
    assert str(raised.value) == (
        "limiter 'up': no call of key 'k' may begin within 0.01 s: 1 in flight, and the limit "
        "that was learned is 1; wait longer, or see docs/adaptive.md if that is too low"
    )
    with pytest.raises(QueueFullError), limit.slot("k", timeout=1, max_waiting=0):
        pass
    held.release()


def test_async(segment: Segment) -> None:
    limit = make(segment)

    async def main() -> None:
        async with limit.slot_async("k", timeout=1) as call:
            assert call.in_flight == 1
        with pytest.raises(Refused):
            async with limit.slot_async("k"):
                raise Refused
        assert limit.learned("k").phase == "refused"
        limit.reset("k")
        held = [await limit.wait_async("k") for _ in range(4)]
        tasks = [asyncio.create_task(limit.wait_async("k", timeout=60)) for _ in range(4)]
        while limit.queue_size("k") < 4:
            await asyncio.sleep(0.001)
        for call in held:
            call.release()
        for call in await asyncio.gather(*tasks):
            assert call
            call.release()
        slot = limit.slot_async("k")
        async with slot:
            with pytest.raises(RuntimeError, match="call slot_async"):
                async with slot:
                    pass

    asyncio.run(main())
    assert limit.in_flight("k") == 0


def test_as_a_decorator(segment: Segment) -> None:
    limit = make(segment)

    @limit.slot("k", timeout=1)
    def seen() -> int:
        return limit.in_flight("k")

    @limit.slot_async("k", timeout=1)
    async def seen_async() -> int:
        return limit.in_flight("k")

    assert seen() == seen() == asyncio.run(seen_async()) == 1
    assert limit.in_flight("k") == 0


def test_reset_forgets(segment: Segment) -> None:
    limit = make(segment, algorithm="gradient")
    for _ in range(30):
        calls = [limit.acquire("k") for _ in range(4)]
        for call in calls:
            if call:
                call.ok(0.5)
                call.release()
    assert limit.learned("k").base_latency == pytest.approx(0.5, rel=0.01)
    limit.block("k", 60)
    limit.reset("k")
    learned = limit.learned("k")
    assert (learned.limit, learned.phase, learned.blocked) == (4, "start", 0.0)
    assert learned.base_latency is None


def test_a_slower_upstream_lowers_a_gradient(segment: Segment) -> None:
    limit = make(segment, initial=40, algorithm="gradient")

    def round_of(seconds: float) -> None:
        calls = [limit.acquire("k") for _ in range(limit.limit("k"))]
        for call in calls:
            if call:
                call.ok(seconds)
                call.release()

    round_of(0.1)
    for _ in range(8):
        round_of(0.4)  # calls queue there
    assert limit.limit("k") < 25


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"initial": 0}, "initial must be 1 to 10,000, not 0"),
        ({"max": 10_001}, "max must be 1 to 10,000, not 10001"),
        ({"min": 5}, "initial must be from min to max, and is not: min=5, initial=4, max=200"),
        ({"max": 3}, "initial must be from min to max, and is not: min=1, initial=4, max=3"),
        ({"algorithm": "vegas"}, "algorithm must be 'aimd' or 'gradient', not 'vegas'"),
        ({"tolerance": 0.5}, "tolerance must be 1 to 4, not 0.5"),
        ({"tolerance": float("nan")}, "tolerance must be 1 to 4, not nan"),
        ({"max_retry_after": -1}, "max_retry_after must be 0 to 2,592,000, not -1"),
        ({"name": "n" * 87}, "name must be 1 to 86 bytes of UTF-8"),
    ],
)
def test_arguments(segment: Segment, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error.replace("(", r"\(")):
        make(segment, **options)


def test_types(segment: Segment) -> None:
    for options in ({"initial": 4.0}, {"max": True}, {"tolerance": "1"}, {"name": b"x"}):
        with pytest.raises(TypeError):
            make(segment, **options)
    limit = make(segment)
    with pytest.raises(TypeError):
        limit.limit(1)  # type: ignore[arg-type]
    call = limit.acquire("k")
    with pytest.raises(ValueError, match="retry_after must be 0 or more, not -1"):
        call.throttled(retry_after=-1)
    with pytest.raises(TypeError):
        call.ok("1")  # type: ignore[arg-type]
    call.release()


def test_pickle_keeps_what_was_set(segment: Segment) -> None:
    limit = make(segment, max=7)
    make(segment, max=9)  # for all
    copy = pickle.loads(pickle.dumps(limit))
    assert repr(copy) == repr(limit)
    assert copy._permits.max_in_flight == 9
    with copy.slot("k"):
        assert limit.in_flight("k") == 1


def test_a_call_that_is_dropped_gives_its_permit_back(segment: Segment) -> None:
    limit = make(segment)
    call = limit.acquire("k")
    with pytest.warns(ResourceWarning, match="without release"):
        del call
        gc.collect()
    assert limit.in_flight("k") == 0


def test_inspection(segment: Segment, capsys: pytest.CaptureFixture[str]) -> None:
    limit = make(segment)
    with limit.slot("k") as call:
        call.throttled(retry_after=60)
        found = Inspection(segment)
        (permits,) = found.in_flight()
    assert [each["name"] for each in found.limiters()] == ["up"]
    (learned,) = found.learned
    assert (learned["limiter"], learned["key"], learned["limit"]) == ("up", "k", 1)
    assert (learned["phase"], learned["best"]) == ("refused", 2)
    assert learned["blocked_seconds"] > 50
    assert permits["max_in_flight"] == 1
    cli.main(["inspect", "--name", segment.name, "--json"])
    assert json.loads(capsys.readouterr().out)["learned"][0]["limit"] == 1
    cli.main(["inspect", "--name", segment.name])
    shown = capsys.readouterr().out
    assert "Learned limits (1)" in shown and "refused" in shown
    assert list(found.keys()) == []


# processes


def _calls(name: str, parties: int, count: int) -> tuple[int, int]:
    """Calls of an upstream that takes 5 at a time: how many were refused, and the limit after."""
    segment = Segment(name)
    limit = AdaptiveConcurrency(name="up", initial=20, max=40, segment=segment)
    upstream = AdaptiveConcurrency(name="hidden", initial=5, min=5, max=5, segment=segment)
    meet(name, parties)
    refused = 0
    for _ in range(count):
        with limit.slot("k", timeout=60) as call:
            served = upstream.acquire("k")
            if not served:
                refused += 1
                call.throttled()
                continue
            served.failed()
            os.sched_yield()
            served.release()
    return refused, limit.limit("k")


def test_four_processes_learn_together(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=1000)
    found = run(_calls, [(segment_name, 4, 2000)] * 4, "fork")
    limit = AdaptiveConcurrency(name="up", initial=20, max=40, segment=segment)
    assert limit.in_flight("k") == 0
    # A new worker begins with what they have learned.
    assert limit.learned("k").limit == limit.limit("k") != 0
    assert len(found) == 4


def test_what_a_killed_worker_held_comes_back(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=1000)
    limit = AdaptiveConcurrency(name="up", initial=2, max=4, segment=segment)
    code = (
        "import time; from fast_litellm_shm import AdaptiveConcurrency, Segment\n"
        f"segment = Segment({segment_name!r})\n"
        "limit = AdaptiveConcurrency(name='up', initial=2, max=4, segment=segment)\n"
        "held = [limit.acquire('k'), limit.acquire('k')]\n"
        "print(all(held), flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "True\n"
        assert not limit.acquire("k")
        child.send_signal(signal.SIGKILL)
        child.wait()
    with limit.slot("k", timeout=60), limit.slot("k", timeout=60):
        assert limit.in_flight("k") == 2


def test_threads_never_hold_more(segment: Segment) -> None:
    limit = make(segment, initial=3, min=3, max=3)
    inside, most, lock = 0, 0, threading.Lock()

    def body() -> None:
        nonlocal inside, most
        for _ in range(200):
            with limit.slot("k", timeout=60):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 3
    assert limit.in_flight("k") == 0
