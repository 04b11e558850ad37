"""What does a check cost where the limits are kept for many hosts, and how often is Redis asked?

acquire() of a limit that is not met, over 10 keys, on this host alone and granted by Redis on a
unix socket; beside it, on the same Redis, a hit through limits, and the pre-call hook of LiteLLM's
own limiter (parallel_request_limiter_v3) for a key with a limit of requests: both ask at each
check. All in one process, interleaved, after a second in which batches grow to what is used. Then
how many checks of a hot key there were for each call of Redis. Then the first check of a key, which
has to ask Redis, over TCP: one by one, beside hits through limits for new keys, and beside the same
call of a script that does nothing; and 200 keys in one call of acquire_many().
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from bench.timing import Loop, interleaved, loop_of
from fast_litellm_shm import Limit, RateLimiter
from fast_litellm_shm.cluster import Cluster, wire

KEYS = [f"10.0.0.{i}" for i in range(10)]
HERE, GRANTED, REDIS = "this host alone", "granted by Redis", "limits, a call of Redis each"
LITELLM = "LiteLLM's limiter, a call of Redis each"
NO_SCRIPT = "a new key, a script that does nothing"
FIRST, FIRST_REDIS = "a new key, granted by Redis on TCP", "a new key, limits on Redis on TCP"
MANY = "acquire_many of 200 new keys, a key"
MANY_KEYS, MANY_NS = 200, 15_000.0
WHO = {HERE: OURS, GRANTED: OURS, REDIS: "limits", LITELLM: "litellm"}
N, PER = 60_000_000, 60  # of each key: far above what one process asks for


def _calls(client: Any) -> int:
    return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def _checks_per_call(loop: Loop, calls: int, client: Any, seconds: float) -> float:
    """For each call of Redis, of a loop that asks of one hot key."""
    before, checks, until = _calls(client), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        loop(calls)
        checks += calls
    return checks / max(_calls(client) - before, 1)


def _limits(url: str) -> Callable[[str], object]:
    limits = peers.need("limits")
    storage = limits.storage.storage_from_string(url)
    hit = limits.strategies.FixedWindowRateLimiter(storage).hit
    return partial(hit, limits.RateLimitItemPerMinute(N))


def _litellm(place: peers.Place) -> Callable[[list[str]], Loop]:
    """A loop over keys, each check in a task of its own, as a request is: the hook keeps what it
    found in the task's context."""
    caching = peers.need("litellm.caching.caching")
    user = peers.need("litellm.proxy._types").UserAPIKeyAuth
    usage = peers.need("litellm.proxy.utils").InternalUsageCache
    v3 = peers.need("litellm.proxy.hooks.parallel_request_limiter_v3")
    cache = caching.DualCache(redis_cache=caching.RedisCache(url=f"unix://{place.redis()}"))
    limiter = v3._PROXY_MaxParallelRequestsHandler_v3(usage(cache))
    event_loop = asyncio.new_event_loop()
    place.at_close(event_loop.close)

    def over(keys: list[str]) -> Loop:
        users = [user(api_key=key, rpm_limit=N) for key in keys]

        async def ask(calls: int) -> None:
            for i in range(calls):
                # no model: for one the hook would import the whole proxy, for its router
                data = {"litellm_call_id": str(i)}
                check = limiter.async_pre_call_hook(
                    users[i % len(users)], cache, data, "acompletion"
                )
                await asyncio.create_task(check)

        return lambda calls: event_loop.run_until_complete(ask(calls))

    return over


def _new_keys(result: Result, place: peers.Place, settings: Settings) -> None:
    url, numbers = f"redis://127.0.0.1:{place.redis_port()}", itertools.count()
    new = RateLimiter(Limit(1000, PER), name="new", segment=place.segment(), cluster=url)

    def each(check: Callable[[str], object]) -> Loop:
        def loop(calls: int) -> None:
            for _ in range(calls):
                check(f"10.1.0.{next(numbers)}")

        return loop

    def many(calls: int) -> None:
        for _ in range(calls):
            new.acquire_many([f"10.1.0.{next(numbers)}" for _ in range(MANY_KEYS)])

    wired = Cluster(url).client()
    nothing = wire.call("return 1", [b"key"], [b"x" * 100])
    empty = wire.Wire(wired, keeps=True)
    loops: dict[str, Loop] = {FIRST: each(new.acquire), MANY: many}
    loops[NO_SCRIPT] = each(lambda _: empty.one(nothing))
    with contextlib.suppress(peers.MissingError):  # which is told above
        loops[FIRST_REDIS] = each(_limits(url))
    for name, found in interleaved(loops, settings).items():
        who = {FIRST_REDIS: "limits", NO_SCRIPT: REFERENCE}.get(name, OURS)
        keys = MANY_KEYS if name == MANY else 1
        each_key = Values(value / keys for value in found.values)
        result.rows.append(Row(name, "ns", each_key, who, "new key"))


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place(capacity=400_000) as place:
        segment = place.segment()
        try:
            redis = peers.need("redis")
            socket = place.redis()
        except peers.MissingError as error:
            result.missing["Redis"] = str(error)
            return result
        limit = Limit(N, PER)
        here = RateLimiter(limit, name="here", segment=segment)
        granted = RateLimiter(limit, name="granted", segment=segment, cluster=f"unix://{socket}")
        over: dict[str, Callable[[list[str]], Loop]] = {
            HERE: partial(loop_of, here.acquire),
            GRANTED: partial(loop_of, granted.acquire),
        }
        try:
            over[REDIS] = partial(loop_of, _limits(f"redis+unix://{socket}"))
        except peers.MissingError as error:
            result.missing["limits"] = str(error)
        try:
            over[LITELLM] = _litellm(place)
        except peers.MissingError as error:
            result.missing["LiteLLM's limiter"] = str(error)
        loops = {name: make(KEYS) for name, make in over.items()}
        until = time.monotonic() + 1
        while time.monotonic() < until:
            loops[GRANTED](10_000)
        for name, found in interleaved(loops, settings).items():
            result.rows.append(Row(name, "ns", found, WHO[name], "check"))
        times, seconds = settings.pick((settings.share(5), 1.0), (3, 0.3))
        with redis.Redis(unix_socket_path=socket) as client:
            for name in (each for each in over if each != HERE):
                hot, calls = over[name](["hot"]), 1000 if name == GRANTED else 10
                rates = [_checks_per_call(hot, calls, client, seconds) for _ in range(times)]
                told = f"{name.split(',')[0]}: checks for each call of Redis"
                result.rows.append(Row(told, "", Values(rates), WHO[name], "calls"))
        _new_keys(result, place, settings)
        result.ratios.append(ratio(result.rows, HERE, GRANTED, 0.5))
        if REDIS in loops:
            result.ratios.append(ratio(result.rows, REDIS, GRANTED, 100.0))
        if LITELLM in loops:
            result.ratios.append(ratio(result.rows, LITELLM, GRANTED, 100.0))
        medians = {row.name: row.found.median for row in result.rows}
        if REDIS in loops:
            share = medians[NO_SCRIPT] / medians[FIRST_REDIS]
            why = (
                f"a script that does nothing takes {share:.2f} of limits' time. Ours keeps a lease "
                "and which host holds it. On 2026-12-02 the server worked 46 µs at it "
                "(commandstats; 18 at limits' counter, 10 at nothing): 4 to read its clock, 3 to "
                "begin, 21 to make the state and the answer, 8 to keep it"
            )
            result.ratios.append(
                ratio(result.rows, FIRST, FIRST_REDIS, 0.8, at_least=False, why=why)
            )
        many = next(row.found for row in result.rows if row.name == MANY)
        why = (
            "by a profile of 2026-12-02 a third of it is the server's script and waiting for it, "
            "a quarter two native calls "
            "for each key, whose memory is cold; the rest is Python, none of it above 6 %"
        )
        result.ratios.append(Ratio(MANY, many, MANY_NS, at_least=False, unit="ns", why=why))
    result.plots.append(
        Plot("cluster_cost", "bars", "A check over many hosts", ("check",), "nanoseconds a check")
    )
    return result
