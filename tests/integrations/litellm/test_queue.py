"""The setting ``queue``: a request beyond a limit waits for its turn, and its headers say so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from support.children import run as run_apart
from support.litellm_auth import auth
from support.waiting import wait_until_async

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.integrations.litellm import admission, failures, queue, settings
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter
from fast_litellm_shm.integrations.litellm.settings import Queue
from fast_litellm_shm.integrations.litellm.subjects import Limits

POSITION, SECONDS = "x-ratelimit-queue-position", "x-ratelimit-queue-seconds"
PATIENT = 3600.0


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    admission.forget()
    failures.forget()
    chosen = {"queue": {"max_wait": PATIENT, "priority_of": {"vip": 50, "batch": -50}}}
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, chosen, raising=False)
    yield
    admission.forget()


def waiting() -> int:
    return sum(row["callers"] for row in Inspection(Segment.default()).waiting())


class Request:
    """A request to the proxy, in a task of its own. It goes on until end() is called."""

    def __init__(self, done: list[str], name: str, user: Any) -> None:
        self._done, self._name, self._user = done, name, user
        self._over = asyncio.Event()
        self.headers: dict[str, str] = {}
        self.admitted = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        limiter = SharedLimiter()
        message = {"role": "user", "content": "x" * 12}
        data = {
            **{"litellm_call_id": self._name, "model": "m", "max_tokens": 40},
            "messages": [message],
        }
        try:
            await limiter.async_pre_call_hook(self._user, None, data, "acompletion")
        except Exception as error:
            assert getattr(error, "status_code", None) == 429, error
            found: Any = getattr(error, "headers", None) or vars(error)["response"].headers
            self.headers = dict(found)
            return
        self.admitted = True
        self._done.append(self._name)
        found = await limiter.async_post_call_response_headers_hook(data, self._user, None)
        self.headers = found or {}
        await self._over.wait()
        await limiter.async_post_call_success_hook(data, self._user, None)

    async def queued(self, count: int) -> Request:
        await wait_until_async(f"{count} requests wait", lambda: waiting() == count)
        return self

    async def end(self) -> None:
        await wait_until_async(f"{self._name} is admitted", lambda: self.admitted)
        self._over.set()
        await self.task


def test_in_turn() -> None:
    """One after the other, by priority, and each once; nothing is left in the queue."""

    async def scenario() -> None:
        done: list[str] = []
        user = auth(max_parallel_requests=1)
        vip = auth(max_parallel_requests=1, metadata={"priority": "vip"})
        batch = auth(max_parallel_requests=1, team_metadata={"priority": "batch"})
        first = Request(done, "first", user)
        await wait_until_async("the first is admitted", lambda: first.admitted)
        assert POSITION not in first.headers
        low = await Request(done, "low", batch).queued(1)
        second = await Request(done, "second", user).queued(2)
        third = await Request(done, "third", user).queued(3)
        high = await Request(done, "high", vip).queued(4)
        for request in (first, high, second, third, low):
            await request.end()
        assert done == ["first", "high", "second", "third", "low"]
        assert low.headers[POSITION] == "1" and third.headers[POSITION] == "2"
        assert float(third.headers[SECONDS]) > 0
        assert waiting() == 0

    asyncio.run(scenario())


def test_the_wait_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose turn does not come in time gets its 429, with its place."""
    chosen = {"queue": {"max_wait": 0.3}}
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, chosen, raising=False)

    async def scenario() -> None:
        done: list[str] = []
        user = auth(max_parallel_requests=1)
        first = Request(done, "first", user)
        await wait_until_async("the first is admitted", lambda: first.admitted)
        second = Request(done, "second", user)
        await second.task
        assert not second.admitted
        assert second.headers[POSITION] == "1" and float(second.headers[SECONDS]) >= 0.3
        assert second.headers["rate_limit_type"] == "max_parallel_requests"
        await first.end()
        assert waiting() == 0

    asyncio.run(scenario())


def test_no_wait_that_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute that ends too late; a limit of 0."""
    chosen = {"queue": {"max_wait": 1}}
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, chosen, raising=False)

    async def scenario() -> None:
        done: list[str] = []
        user = auth(rpm_limit=1)
        await Request(done, "first", user).end()
        for refused in (user, auth(rpm_limit=0)):
            second = Request(done, "second", refused)
            await second.task
            assert not second.admitted and POSITION not in second.headers

    asyncio.run(scenario())


def test_another_subject() -> None:
    """It waits for the key, then for the team; it holds nothing of the key meanwhile."""

    async def scenario() -> None:
        done: list[str] = []
        both = auth(max_parallel_requests=1, team_id="t", team_rpm_limit=1)
        first = Request(done, "first", both)
        await wait_until_async("the first is admitted", lambda: first.admitted)
        second = await Request(done, "second", both).queued(1)
        await first.end()
        await wait_until_async("it waits for the team", lambda: _limiters() == ["team"])
        assert admission.quota_of(_key_limits()).in_flight("api_key:k") == 0
        second.task.cancel()
        await asyncio.gather(second.task, return_exceptions=True)
        assert waiting() == 0

    def _limiters() -> list[str]:
        rows = Inspection(Segment.default()).waiting()
        return [row["key"].split(":")[0] for row in rows if row["callers"]]

    def _key_limits() -> Limits:
        return Limits(None, None, 1)

    asyncio.run(scenario())


def test_cancelled() -> None:
    async def scenario() -> None:
        done: list[str] = []
        user = auth(max_parallel_requests=1)
        first = Request(done, "first", user)
        await wait_until_async("the first is admitted", lambda: first.admitted)
        gone = await Request(done, "gone", user).queued(1)
        last = await Request(done, "last", user).queued(2)
        gone.task.cancel()
        await asyncio.gather(gone.task, return_exceptions=True)
        await last.queued(1)
        await first.end()
        await last.end()
        assert done == ["first", "last"] and waiting() == 0

    asyncio.run(scenario())


def _one_at_a_time(count: int) -> None:
    """Requests of one process among several."""
    inside = 0

    async def one(name: str) -> None:
        nonlocal inside
        done: list[str] = []
        request = Request(done, name, auth(max_parallel_requests=1))
        await wait_until_async("it is admitted", lambda: request.admitted)
        inside += 1
        assert inside == 1
        await asyncio.sleep(0)
        inside -= 1
        await request.end()

    async def all_of_them() -> None:
        await asyncio.gather(*(one(str(i)) for i in range(count)))

    asyncio.run(all_of_them())


def test_over_processes() -> None:
    """Each request of each process has its turn; none is denied."""
    run_apart(_one_at_a_time, [(10,)] * 3, "fork")
    assert waiting() == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("yes", "must be a mapping"),
        ({"max_wait": 0}, "max_wait"),
        ({"max_wait": True}, "max_wait"),
        ({"max_waits": 5}, "'max_waits'"),
        ({"priority_of": {"a": 101}}, "'a'"),
        ({"priority_of": ["a"]}, "priority_of"),
    ],
)
def test_wrong_settings(given: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"queue": given}, raising=False)
    with pytest.warns(RuntimeWarning, match=says):
        assert settings.current().queue is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        ({"key_alias": "a"}, 1),
        ({"team_alias": "b", "team_id": "c"}, 2),
        ({"team_id": "c"}, 3),
        ({"metadata": {"priority": "d"}, "key_alias": "a"}, 4),
        ({"metadata": {"priority": ["not", "a", "name"]}, "key_alias": "a"}, 1),
    ],
)
def test_priorities(fields: dict[str, Any], expected: int) -> None:
    given = Queue(1.0, {"a": 1, "b": 2, "c": 3, "d": 4})
    assert queue.priority_of(given, auth(**fields)) == expected
