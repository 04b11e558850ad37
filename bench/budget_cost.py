"""What does it cost to reserve money and to settle it, and what does a durable limit write?

A reservation and its settlement: of a budget that this host keeps alone, and of one that Redis
leases to it; beside them LiteLLM's own budget path for a key (its reservation, with the estimate,
and its settlement, in the worker's memory), and one hit of limits on a Redis that keeps an
append-only file, synced each second, and at each write. (limits cannot reserve: it is one call, not
two.) All over 10 keys with limits that nobody meets, in one process, interleaved. Then a check of a
limit that a file on disk keeps; and, by strace, how often the disk was synced for each lease.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from bench import peers
from bench.result import OURS, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from bench.timing import Loop, interleaved, loop_of
from fast_litellm_shm import Budget, FixedWindow, RateLimiter
from fast_litellm_shm.durable import StateFile

KEYS = [f"sk-{i}" for i in range(10)]
HERE, LEASED = "reserve + settle inside a lease", "the same, leased by Redis"
LITELLM = "LiteLLM's own reservation and settlement"
EVERY_SECOND, ALWAYS = "limits, Redis, AOF each second", "limits, Redis, AOF at each write"
DURABLE, NOT_DURABLE = "durable limit: check", "the same limit, not durable: check"
WHO = {LITELLM: "litellm", EVERY_SECOND: "limits", ALWAYS: "limits"}
TARGET_NS = 300.0
PROMISE = "a budget's reserve + settle inside a lease"
N = 60_000_000
# Syncs between the two calls of chdir are the loop's.
_SYNCS = """
import os, sys
from fast_litellm_shm import FixedWindow, RateLimiter, Segment
from fast_litellm_shm._shared.performance import segment_stats
from fast_litellm_shm.durable import StateFile
folder, name = sys.argv[1:]
segment = Segment(name)
limit, file = FixedWindow(10**6, per=86_400), StateFile(folder)
limiter = RateLimiter(limit, name="synced", segment=segment, durable=file, cluster=False)
for _ in range(1000):
    limiter.acquire("hot")
def leases():
    operations = segment_stats(segment, "durable")["durable"]["operations"]
    asked = [operations[each] for each in ("take", "single", "ahead") if each in operations]
    return sum(each["total_calls"] for each in asked)
before = leases()
os.chdir(".")
for _ in range(200_000):
    if not limiter.acquire("hot"):
        raise SystemExit("it was denied")
os.chdir(".")
print(leases() - before)
"""


def _spending(budget: Budget) -> Callable[[str], object]:
    reserve = budget.reserve

    def spend(key: str) -> None:
        reserve(key, 0.02).settle(0.0134)

    return spend


def _limits(socket: str) -> Callable[[str], object]:
    limits = peers.need("limits")
    storage = limits.storage.storage_from_string(f"redis+unix://{socket}")
    hit = limits.strategies.FixedWindowRateLimiter(storage).hit
    return partial(hit, limits.RateLimitItemPerDay(N))


def _litellm(place: peers.Place) -> Loop:
    """Each request in a task of its own."""
    server = peers.need("litellm.proxy.proxy_server")
    path = peers.need("litellm.proxy.spend_tracking.budget_reservation")
    user = peers.need("litellm.proxy._types").UserAPIKeyAuth
    users = [user(token=key, api_key=key, max_budget=1e9, spend=0.0) for key in KEYS]
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
    event_loop = asyncio.new_event_loop()
    place.at_close(event_loop.close)

    async def one(index: int) -> None:
        reserved = await path.reserve_budget_for_request(
            request_body=body,
            route="/v1/chat/completions",
            llm_router=None,
            valid_token=users[index % len(users)],
            team_object=None,
            user_object=None,
            prisma_client=None,
            user_api_key_cache=server.user_api_key_cache,
            proxy_logging_obj=server.proxy_logging_obj,
        )
        if not reserved:
            raise AssertionError("nothing was reserved, and something else was measured")
        await path.reconcile_budget_reservation(reserved, 0.00001)

    async def all_of(calls: int) -> None:
        for index in range(calls):
            await asyncio.create_task(one(index))

    return lambda calls: event_loop.run_until_complete(all_of(calls))


def _syncs(place: peers.Place, settings: Settings, result: Result) -> None:
    """For each lease, of a loop over one hot key."""
    if shutil.which("strace") is None:
        result.missing["syncs of the disk"] = "there is no strace here: apt-get install strace"
        return
    found = []
    for number in range(settings.pick(settings.share(3), 1)):
        trace, folder = place.path(), os.path.join(place.disk(), f"state-{number}")
        done = subprocess.run(
            [
                *("strace", "-f", "-qq", "-e", "trace=chdir,fsync,fdatasync,sync_file_range"),
                *("-o", trace, sys.executable, "-c", _SYNCS, folder, place.segment_name),
            ],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode:
            result.missing["syncs of the disk"] = done.stderr.strip().splitlines()[-1][:200]
            return
        with open(trace, encoding="utf-8") as file:
            calls = re.findall(r"^\d+ +(chdir|fsync|fdatasync)\(", file.read(), re.MULTILINE)
        inside = calls[calls.index("chdir") : len(calls) - calls[::-1].index("chdir")]
        found.append((len(inside) - 2) / int(done.stdout))
    values = Values(found)
    result.rows.append(Row("syncs of the disk for each lease", "", values, OURS, "durable writes"))
    result.ratios.append(Ratio("syncs of the disk for each lease", values, 1.0, False, ""))


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    os.environ["FAST_LITELLM_ENABLED"] = "false"  # litellm is measured as it is
    with peers.Place(capacity=400_000) as place:
        segment = place.segment()
        budget = Budget(10**9, name="here", segment=segment, cluster=False)
        loops: dict[str, Loop] = {HERE: loop_of(_spending(budget), KEYS)}
        try:
            peers.need("redis")
            url = f"unix://{place.redis()}"
            leased = Budget(10**9, name="leased", segment=segment, cluster=url)
            loops[LEASED] = loop_of(_spending(leased), KEYS)
            for name, policy in ((EVERY_SECOND, "everysec"), (ALWAYS, "always")):
                loops[name] = loop_of(_limits(place.redis(policy)), KEYS)
        except peers.MissingError as error:
            result.missing["Redis"] = str(error)
        try:
            loops[LITELLM] = _litellm(place)
        except peers.MissingError as error:
            result.missing["LiteLLM's own budgets"] = str(error)
        group = "budget"
        for name, found in interleaved(loops, settings).items():
            result.rows.append(Row(name, "ns", found, WHO.get(name, OURS), group))
        spent = next(row.found for row in result.rows if row.name == HERE)
        result.ratios.append(Ratio(f"budget: {HERE}", spent, TARGET_NS, False, "ns", PROMISE))
        for name in (EVERY_SECOND, ALWAYS, LITELLM):
            if name in loops:
                result.ratios.append(ratio(result.rows, name, HERE, 100.0))

        limit = FixedWindow(N, per=86_400)
        file = StateFile(place.disk())
        # The process ends after its folder is gone, and would say so.
        place.at_close(lambda: logging.disable(logging.WARNING))
        durable = RateLimiter(limit, name="durable", segment=segment, durable=file, cluster=False)
        plain = RateLimiter(limit, name="plain", segment=segment, cluster=False)
        checks = {
            DURABLE: loop_of(durable.acquire, KEYS),
            NOT_DURABLE: loop_of(plain.acquire, KEYS),
        }
        until = time.monotonic() + 1  # batches grow to what is used
        while time.monotonic() < until:
            checks[DURABLE](10_000)
        for name, found in interleaved(checks, settings).items():
            result.rows.append(Row(name, "ns", found, OURS, "durable"))
        result.ratios.append(ratio(result.rows, DURABLE, NOT_DURABLE, None))
        _syncs(place, settings, result)
    result.plots.append(
        Plot("budget_cost", "bars", "Money, reserved and settled", ("budget",), "nanoseconds")
    )
    return result
