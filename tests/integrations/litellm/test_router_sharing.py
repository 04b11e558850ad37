"""Having a router share, and having it no longer share."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from litellm.caching.in_memory_cache import InMemoryCache
from litellm.integrations.custom_logger import CustomLogger
from litellm.redis.stores.router_cooldowns import RouterCooldownStore
from support.litellm_workers import CALLBACKS, GROUP, Caller, Workers, router

from fast_litellm_shm import exceptions
from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router import sharing
from fast_litellm_shm.integrations.litellm.router.cache import SharedRoutingCache
from fast_litellm_shm.integrations.litellm.router.cooldowns import SharedCooldowns
from fast_litellm_shm.integrations.litellm.router.deployments import Deployments
from fast_litellm_shm.integrations.litellm.router.sharing import RouterState, share, unshare

pytestmark = pytest.mark.filterwarnings("ignore")  # LiteLLM's own


class Limiter(CustomLogger):  # type: ignore[misc]
    """Stands for the one that enforces limits."""


@pytest.fixture(autouse=True)
def _callbacks() -> Iterator[None]:
    failures.forget()
    before = {name: list(getattr(litellm, name)) for name in CALLBACKS}
    yield
    for name, found in before.items():
        setattr(litellm, name, found)
    sharing._added = None
    failures.forget()


def stores(made: Any) -> tuple[Any, Any]:
    health = made.health()
    return health.store.in_memory_cache, health.cooldowns.cooldown_store


def test_both_stores_are_stood_before_and_given_back() -> None:
    made = router("a", routing_strategy="least-busy")
    before = stores(made)
    assert [type(store) for store in before] == [InMemoryCache, RouterCooldownStore]
    limiter = Limiter()
    share(made, limiter)
    share(made, limiter)  # twice is harmless
    during = stores(made)
    assert [type(store) for store in during] == [SharedRoutingCache, SharedCooldowns]
    assert [store.own for store in during] == list(before)
    assert litellm.callbacks.count(limiter) == 1
    during[0].set_cache("x", 1)
    unshare(made)
    unshare(made)
    assert all(now is then for now, then in zip(stores(made), before, strict=True))
    assert before[0].get_cache("x") == 1  # nothing is lost
    assert not any(limiter in getattr(litellm, name) for name in CALLBACKS)
    share(made, limiter)
    assert type(stores(made)[0]) is SharedRoutingCache
    unshare(made)


def test_the_parts_can_be_had_alone() -> None:
    made, limiter = router("a"), Limiter()
    share(made, limiter, state=False)
    assert type(stores(made)[0]) is InMemoryCache
    assert limiter in litellm.callbacks
    unshare(made)
    share(made, limiter, limits=False)
    assert type(stores(made)[0]) is SharedRoutingCache
    assert limiter not in litellm.callbacks
    unshare(made)


def test_the_limiter_leaves_with_the_last_router() -> None:
    one, two, limiter = router("a"), router("b"), Limiter()
    share(one, limiter)
    share(two, limiter)
    unshare(one)
    assert limiter in litellm.callbacks
    unshare(two)
    assert limiter not in litellm.callbacks


def test_a_limiter_that_the_user_put_there_stays() -> None:
    made, limiter = router("a"), Limiter()
    litellm.callbacks = [limiter]
    share(made, limiter)
    unshare(made)
    assert litellm.callbacks == [limiter]


def test_an_object_that_was_put_there_since_stays() -> None:
    made = router("a")
    share(made, Limiter(), limits=False)
    other = made.health().store.in_memory_cache = InMemoryCache()
    unshare(made)
    assert made.health().store.in_memory_cache is other


def test_a_router_that_shares_can_go() -> None:
    made = router("a")
    share(made, Limiter(), limits=False)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("when", ["before the fork", "after the fork"])
def test_before_and_after_a_fork(when: str) -> None:
    early = router("a", "b", routing_strategy="least-busy")
    if when == "before the fork":
        share(early, Limiter(), limits=False)

    def late() -> Any:
        kept = (
            early if when == "before the fork" else router("a", "b", routing_strategy="least-busy")
        )
        litellm.logging_callback_manager.add_litellm_callback(kept.leastbusy_logger)
        litellm.input_callback.append(kept.leastbusy_logger)
        share(kept, Limiter(), limits=False)
        return kept

    with Workers(2, late) as (one, two):
        assert {one.do("hold"), two.do("hold")} == {"a", "b"}


def test_what_was_in_flight_is_no_longer_shown_after_unshare() -> None:
    def sharing() -> Any:
        made = router("a", routing_strategy="least-busy")
        share(made, Limiter(), limits=False)
        return made

    def stop(caller: Caller) -> None:
        unshare(caller.router)

    def count(caller: Caller) -> Any:
        return caller.router.health().store.get_cache(f"{GROUP}_request_count:a")

    with Workers(2, sharing, [stop, count]) as (one, two):
        one.do("hold")
        assert two.do("count") == 1
        one.do("stop")
        assert (one.do("count"), two.do("count")) == (1, 0)


# where it cannot be done -------------------------------------------------------------------------


def test_a_router_with_redis_is_left_alone() -> None:
    made = router("a")
    made.health().store.redis_cache = object()
    share(made, Limiter(), limits=False)
    assert [type(store) for store in stores(made)] == [InMemoryCache, RouterCooldownStore]


def test_a_router_that_gets_redis_is_left_alone_from_then_on() -> None:
    made = router("a")
    share(made, Limiter(), limits=False)
    shared = stores(made)[1]

    class WithRedis:
        has_redis = False

        def attach_redis(self, redis: Any) -> None:
            self.has_redis = redis is not None

    shared.own = WithRedis()
    shared.attach_redis(None)
    assert type(stores(made)[0]) is SharedRoutingCache
    shared.attach_redis("redis")
    assert type(stores(made)[0]) is InMemoryCache


class Earlier:
    """A router of a litellm that has no such stores."""


class EarlierCooldowns:
    """A router whose stores are others."""

    def __init__(self) -> None:
        self.store = type("Store", (), {"in_memory_cache": {}, "redis_cache": None})()
        self.cooldowns = type("Cooldowns", (), {"cooldown_store": {}})()

    def health(self) -> Any:
        return self


@pytest.mark.parametrize(
    ("made", "sentences"),
    [
        (Earlier, ["cooldowns, requests in flight, latencies and usage"]),
        (EarlierCooldowns, ["requests in flight, latencies and usage", "cooldowns"]),
    ],
)
def test_one_sentence_where_litellm_offers_no_way(
    made: Any, sentences: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = RouterState()
    one, two = made(), made()
    for each in (one, two, one):
        state.attach(each)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(logged) == len(sentences)
    for text, what in zip(logged, sentences, strict=True):
        assert f"offers no way to share {what} of its router" in text
    state.detach(one)


def test_no_segment_never_breaks_a_router(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def broken(self: Any) -> None:
        tries.append(self)
        raise exceptions.SegmentError("no segment to be had")

    state, made = RouterState(), router("a")
    with monkeypatch.context() as patch:
        patch.setattr(Deployments, "__init__", broken)
        for _ in range(3):
            state.attach(made)
        assert len(tries) == 1  # not with every request
        assert "no segment to be had" in caplog.text
        assert type(stores(made)[0]) is InMemoryCache
    state._retry_at = 0.0
    state.attach(made)
    assert type(stores(made)[0]) is SharedRoutingCache


def test_a_fault_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    state, made = RouterState(), router("a")
    monkeypatch.setattr(SharedCooldowns, "__init__", broken)
    state.attach(made)
    assert [type(store) for store in stores(made)] == [InMemoryCache, RouterCooldownStore]
