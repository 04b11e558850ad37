"""Uses of the public classes that test_scribbled.py lacks: what is routed, counted, measured and
shown, and the storage for the package limits."""

from __future__ import annotations

import random
from collections.abc import Callable

from limits import parse, strategies

import fast_litellm_shm as api
from fast_litellm_shm import AdvancedRouter, Segment
from fast_litellm_shm._shared import features
from fast_litellm_shm._shared.native import Memo, ffi, lib
from fast_litellm_shm.cli import export
from fast_litellm_shm.cli.sampler import Sampler
from fast_litellm_shm.integrations.limits import ShmStorage
from fast_litellm_shm.metrics import prometheus_text as exposition
from fast_litellm_shm.metrics.snapshot import snapshot

DEPLOYMENTS = [
    {
        "model_name": "m",
        "litellm_params": {"model": f"x/{i}", "weight": i},
        "model_info": {"id": f"d{i}"},
    }
    for i in range(20)
]
ROUTES = ("simple_shuffle", "least_busy", "latency_based", "cost_based")
LIMITERS = (
    strategies.FixedWindowRateLimiter,
    strategies.MovingWindowRateLimiter,
    strategies.SlidingWindowCounterRateLimiter,
)


def route(segment: Segment, chance: random.Random) -> None:
    router = AdvancedRouter(chance.choice(ROUTES), segment=segment)
    for _ in range(5):
        picked = router.get_available_deployment(DEPLOYMENTS, "m")
        if picked is None:  # all of them cool down
            continue
        with router.track(picked) as request:
            request.cost = 0.1
        router.record(picked, 5.0, chance.random() < 0.5, 0.2)
    router.get_stats()


def count_tokens(segment: Segment, chance: random.Random) -> None:
    handle = int(ffi.cast("uintptr_t", segment._handle))
    memo = Memo(segment, handle, lib.fshm_memo_encoding(segment._handle, b"x", 1), len)
    for _ in range(50):
        memo.count(f"text {chance.randrange(1000)}")


def measure(segment: Segment, chance: random.Random) -> None:
    success = chance.random() < 0.5
    api.record_performance("c", chance.choice("abcd"), 1.5, success=success, input_size=3)
    api.get_performance_stats()
    api.compare_implementations("c", "d")
    api.export_performance_data(chance.choice(["json", "csv"]))


def show(segment: Segment, chance: random.Random) -> None:
    found = snapshot(segment, keys=5)
    exposition.prometheus_text([(segment.name, found)])
    export._json(found)
    export._csv(found)
    Sampler(segment.name).sample()


def advise(segment: Segment, chance: random.Random) -> None:
    api.health_check()
    api.get_recommendations()


def fail_a_feature(segment: Segment, chance: random.Random) -> None:
    features.record_error("rust_routing", ValueError("x"))
    api.is_enabled("rust_routing")
    features.reset_errors()


def hit(segment: Segment, chance: random.Random) -> None:
    storage = ShmStorage(f"shm://{segment.name}")
    limiter, item = chance.choice(LIMITERS)(storage), parse("5/minute")
    limiter.hit(item, chance.choice("ab"))
    limiter.test(item, "a")
    limiter.get_window_stats(item, "a")
    limiter.clear(item, "b")
    storage.check()


USES: tuple[Callable[[Segment, random.Random], None], ...] = (
    route,
    count_tokens,
    measure,
    show,
    advise,
    fail_a_feature,
    hit,
)
