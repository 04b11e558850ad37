"""Cooldowns and allowed failures of LiteLLM's deployments, over several processes."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from support.waiting import wait_until

pytest.importorskip("litellm")

from litellm.caching.redis_batch import Batch
from litellm.types.router import RouterRateLimitError
from support.litellm_workers import GROUP, Caller, Worker, Workers, router

from fast_litellm_shm import Segment, exceptions
from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router import cooldowns
from fast_litellm_shm.integrations.litellm.router.cooldowns import SharedCooldowns
from fast_litellm_shm.integrations.litellm.router.deployments import Deployments
from fast_litellm_shm.integrations.litellm.router.sharing import RouterState

pytestmark = pytest.mark.filterwarnings("ignore")  # LiteLLM's own

LONG = 3600.0  # seconds: no test lasts so long

state = RouterState()


def shared(**settings: Any) -> Any:
    made = router("a", "b", **settings)
    state.attach(made)
    return made


def at_once() -> Any:
    """One failure is enough."""
    return shared(allowed_fails=0, cooldown_time=LONG)


def active(caller: Caller) -> list[str]:
    """The ids that the router leaves out."""
    found = caller.router.health().cooldowns.get_active_cooldowns(["a", "b"], None)
    return sorted(deployment_id for deployment_id, _ in found)


def reach(caller: Caller, deployment_id: str) -> Any:
    return caller.call(deployment_id)


def until(worker: Worker, name: str, expected: Any) -> None:
    wait_until(
        lambda: f"{name}: {worker.do(name)}, not {expected}", lambda: worker.do(name) == expected
    )


# with real routers -------------------------------------------------------------------------------


def test_what_one_worker_cools_down_all_leave_out() -> None:
    with Workers(3, at_once, [active, reach]) as (one, two, three):
        one.do("fail", "a")
        one.do("reach", "a")
        for worker in (one, two, three):
            assert worker.do("active") == ["a"]
            assert set(worker.do("calls", 8)) == {"b"}
        assert {two.do("call_sync") for _ in range(8)} == {"b"}


def test_without_opting_in_the_others_do_not_know() -> None:
    def alone() -> Any:
        return router("a", "b", allowed_fails=0, cooldown_time=LONG)

    with Workers(2, alone, [active, reach]) as (one, two):
        one.do("fail", "a")
        one.do("reach", "a")
        assert (one.do("active"), two.do("active")) == (["a"], [])


def test_a_cooldown_ends_in_all_workers() -> None:
    def briefly() -> Any:
        return shared(allowed_fails=0, cooldown_time=0.5)

    with Workers(2, briefly, [active, reach]) as (one, two):
        one.do("fail", "a")

        def cools_down() -> bool:  # again, where that took longer than the cooldown lasts
            one.do("reach", "a")
            return bool(two.do("active") == ["a"])

        wait_until("the other leaves it out", cools_down)
        for worker in (one, two):
            until(worker, "active", [])
        assert two.do("reach", "a") == "a"


def test_failures_are_counted_over_workers() -> None:
    def at_the_fourth() -> Any:
        return shared(allowed_fails=3, cooldown_time=LONG)

    with Workers(4, at_the_fourth, [active, reach]) as workers:
        for i, worker in enumerate(workers):
            assert workers[0].do("active") == [], f"after {i}"
            worker.do("fail", "a")
            worker.do("reach", "a")
        assert [worker.do("active") for worker in workers] == [["a"]] * 4


def test_where_all_cool_down_the_answer_says_how_long() -> None:
    def refused(caller: Caller) -> Any:
        try:
            caller.router.completion(GROUP, [{"role": "user", "content": "x"}])
        except RouterRateLimitError as error:
            return error.cooldown_time, sorted(error.cooldown_list)

    with Workers(2, at_once, [active, reach, refused]) as (one, two):
        one.do("fail", "a", "b")
        one.do("reach", "a")
        one.do("reach", "b")
        left, ids = two.do("refused")
        assert ids == ["a", "b"]
        assert 0 < left <= LONG


# the store alone ---------------------------------------------------------------------------------


class Own:
    """A router's own store, as far as it is asked."""

    has_redis = False

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.fails = 0
        self.other = "something else"

    def put(self, model_id: str, value: Any, ttl: float) -> None:
        self.values[model_id] = value

    async def async_put(self, model_id: str, value: Any, ttl: float) -> None:
        self.values[model_id] = value

    def increment_allowed_fails(self, model_id: str, suffix: str | None, ttl: float) -> int:
        self.fails += 1
        return self.fails

    async def async_increment_allowed_fails(
        self, model_id: str, suffix: str | None, ttl: float
    ) -> int:
        return self.increment_allowed_fails(model_id, suffix, ttl)

    async def active(self, model_ids: Any, *, batch: Any) -> Any:
        return self.active_sync(model_ids)

    def active_sync(self, model_ids: Any) -> Any:
        return tuple((i, self.values[i]) for i in model_ids if i in self.values)

    def minimum(self, model_ids: Any, default: float) -> float:
        return min((self.values[i]["cooldown_time"] for i in self.values), default=default)

    def evict_local(self, model_id: str) -> None:
        self.values.pop(model_id, None)

    def snapshot(self) -> Any:
        return self.values


def value(seconds: float) -> dict[str, Any]:
    return {
        "exception_received": "",
        "status_code": "500",
        "timestamp": 0,
        "cooldown_time": seconds,
    }


@pytest.fixture
def stores() -> Iterator[list[SharedCooldowns]]:
    """Those of two workers."""
    failures.forget()
    yield [SharedCooldowns(Own(), Deployments()) for _ in range(2)]
    failures.forget()


def test_what_is_read_of_another_workers_cooldown(stores: list[SharedCooldowns]) -> None:
    one, two = stores
    one.put("a", value(LONG), LONG)
    ((deployment_id, found),) = two.active_sync(["a", "b"])
    assert deployment_id == "a"
    assert 0 < found.pop("cooldown_time") <= LONG
    assert abs(found.pop("timestamp") - time.time()) < LONG
    assert found == {"exception_received": cooldowns._REASON, "status_code": ""}
    assert one.active_sync(["a", "b"]) == (("a", value(LONG)),)  # its own
    assert two.active_sync(["b"]) == ()
    assert list(two.snapshot()) == ["a"]
    assert 0 < two.minimum(["a", "b"], 5.0) <= LONG
    assert two.minimum(["b"], 5.0) == 5.0
    two.put("b", value(1.0), 1.0)
    assert two.minimum(["a", "b"], 5.0) == 1.0
    assert two.other == "something else"


def test_the_asynchronous_ones_do_the_same(stores: list[SharedCooldowns]) -> None:
    one, two = stores

    async def run() -> Any:
        await one.async_put("a", value(LONG), LONG)
        assert await one.async_increment_allowed_fails("a", None, 60.0) == 1
        assert await two.async_increment_allowed_fails("a", None, 60.0) == 2
        return await two.active(["a"], batch=Batch.NONE)

    assert [deployment_id for deployment_id, _ in asyncio.run(run())] == ["a"]


def test_a_longer_cooldown_prolongs_and_a_shorter_does_not_cut(
    stores: list[SharedCooldowns],
) -> None:
    one, two = stores
    for seconds, least in ((100.0, 99), (LONG, 3500), (10.0, 3500)):
        one.put("a", value(seconds), seconds)
        assert two.minimum(["a"], 0.0) > least


def test_what_a_worker_evicts_is_out_for_it_until_the_others_have_done(
    stores: list[SharedCooldowns],
) -> None:
    """As with Redis, from which it is not evicted either."""
    one, _ = stores
    one.put("a", value(LONG), LONG)
    one.evict_local("a")
    assert [deployment_id for deployment_id, _ in one.active_sync(["a"])] == ["a"]


def test_a_cooldown_of_no_time_is_none(stores: list[SharedCooldowns]) -> None:
    one, two = stores
    one.put("a", value(0.0), 0.0)
    assert two.active_sync(["a"]) == ()


def test_failures_are_counted_apart(stores: list[SharedCooldowns]) -> None:
    """By deployment, kind of error, and length of time."""
    one, two = stores
    counts = [
        store.increment_allowed_fails(deployment_id, suffix, ttl)
        for store in (one, two)
        for deployment_id, suffix, ttl in (
            ("a", None, 60.0),
            ("a", "Timeout", 60.0),
            ("b", None, 60.0),
            ("a", None, 5.0),
        )
    ]
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [one.increment_allowed_fails("a", None, 0.0) for _ in range(2)] == [1, 2]  # its own
    assert two.increment_allowed_fails("a", None, 0.0) == 1
    for ttl in range(1, 100):  # no more lengths than a few: each takes a limiter
        one.increment_allowed_fails("a", None, float(ttl))
    assert Segment.default().stats()["limiters"] <= cooldowns._MOST_PERIODS + 1


def test_with_redis_nothing_is_shared_besides(stores: list[SharedCooldowns]) -> None:
    one, two = stores
    one.own.has_redis = two.own.has_redis = True
    one.put("a", value(LONG), LONG)
    assert two.active_sync(["a"]) == ()
    assert [s.increment_allowed_fails("a", None, 60.0) for s in stores] == [1, 1]
    two.own.has_redis = False
    assert two.active_sync(["a"]) == ()


def test_a_read_that_is_not_awaited_warns_of_nothing(stores: list[SharedCooldowns]) -> None:
    async def ready() -> Any:
        return ()

    one, _ = stores
    pending = ready()
    one.own.active = lambda ids, batch: pending
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.active(["a"], batch=Batch.NONE)
        gc.collect()
    pending.close()


def test_faults_leave_a_worker_with_its_own(
    stores: list[SharedCooldowns], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: Any) -> Any:
        raise exceptions.SegmentError("broken")

    one, _ = stores
    for name in ("cool", "cooling"):
        monkeypatch.setattr(Deployments, name, broken)
    monkeypatch.setattr(SharedCooldowns, "_counter", broken)
    one.put("a", value(LONG), LONG)
    assert one.active_sync(["a"]) == (("a", value(LONG)),)
    assert one.minimum(["a"], 1.0) == LONG
    assert one.increment_allowed_fails("a", None, 60.0) == 1
    assert "broken" in caplog.text
