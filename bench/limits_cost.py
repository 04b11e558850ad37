"""What does a hit through PyPI's limits cost on shm://, beside memory:// and a Redis socket?

Each strategy's hit(), admitted, over 100 keys with a limit that none of them meets; and a moving
window of 100, full, whose hits are denied. Redis keeps nothing on disk; memory:// counts for one
process alone. A storage that answers at once, and counts nothing, shows what limits itself takes of
a hit: no storage can be faster. All in one process, interleaved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, asked, ratio
from bench.timing import interleaved, loop_of

KEYS = [f"10.0.0.{i}" for i in range(100)]
LIMIT = 2000  # a minute, of each key: above what a run hits one within a minute
FULL = 100  # an hour
TARGETS = {"memory://": 1.0, "Redis": 20.0}
#: ns, of a hit on shm://
MOST = {"fixed-window": 800.0, "full moving-window": 2000.0}


NOTHING = "a storage that counts nothing"
WHO = {"shm://": OURS, NOTHING: REFERENCE}


def _nothing(limits: Any, answer: int) -> Any:
    class Nothing(limits.storage.MemoryStorage):  # type: ignore[misc]
        def incr(self, *_: Any, **__: Any) -> int:
            return answer

        def acquire_entry(self, *_: Any, **__: Any) -> bool:
            return bool(answer)

        acquire_sliding_window_entry = acquire_entry

    return Nothing("memory://")


def _storages(limits: Any, place: peers.Place, result: Result) -> dict[str, Any]:
    from fast_litellm_shm.integrations.limits import ShmStorage

    make = limits.storage.storage_from_string
    place.segment()
    found = {"shm://": ShmStorage(f"shm://{place.segment_name}"), "memory://": make("memory://")}
    found[NOTHING] = _nothing(limits, answer=1)
    try:
        peers.need("redis")
        found["Redis"] = make(f"redis+unix://{place.redis()}")
    except peers.MissingError as error:
        result.missing["Redis"] = str(error)
    return found


def _full(limits: Any, storages: dict[str, Any], settings: Settings, result: Result) -> None:
    """Denied hits of a moving window: not on Redis, where to fill it takes longer than all else."""
    item, loops, limiters = limits.RateLimitItemPerHour(FULL), {}, {}
    for name in ("shm://", "memory://", NOTHING):
        storage = _nothing(limits, answer=0) if name == NOTHING else storages[name]
        limiter = limits.strategies.MovingWindowRateLimiter(storage)
        for key in KEYS:
            for _ in range(FULL):
                limiter.hit(item, key)
        shown = f"full moving-window on {name}"
        limiters[shown], loops[shown] = limiter, loop_of(partial(limiter.hit, item), KEYS)
    for name, found in interleaved(loops, settings).items():
        where = name.rpartition(" on ")[2]
        row = Row(name, "ns", found, WHO.get(where, "limits"), "full moving-window")
        result.rows.append(row)
        if where != NOTHING and limiters[name].test(item, KEYS[0]):
            raise AssertionError(f"{name}: there was room, and no denials were measured")


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    try:
        limits = peers.need("limits")
        peers.need("limits.aio.storage")  # what ours derives from
    except peers.MissingError as error:
        result.missing["limits"] = str(error)
        return result
    item = limits.RateLimitItemPerMinute(LIMIT)
    with peers.Place(capacity=400_000) as place:
        storages = _storages(limits, place, result)
        for strategy, kind in limits.strategies.STRATEGIES.items():
            for storage in storages.values():
                storage.reset()
            limiters = {f"{strategy} on {name}": kind(each) for name, each in storages.items()}
            loops = {
                name: loop_of(partial(limiter.hit, item), KEYS)
                for name, limiter in limiters.items()
            }
            for name, found in interleaved(loops, settings).items():
                where = name.rpartition(" on ")[2]
                result.rows.append(Row(name, "ns", found, WHO.get(where, "limits"), strategy))
                if not limiters[name].test(item, KEYS[0]):
                    raise AssertionError(f"{name}: the limit was met, and denials were measured")
            for where, target in TARGETS.items():
                above, below = f"{strategy} on {where}", f"{strategy} on shm://"
                result.ratios.append(ratio(result.rows, above, below, target))
        _full(limits, storages, settings, result)
    found_of = {row.name: row.found for row in result.rows}
    for name, most in MOST.items():
        row, least = f"{name} on shm://", found_of[f"{name} on {NOTHING}"].median
        why = f"with a storage that counts nothing, a hit through limits takes {least:,.0f} ns"
        if name.startswith("full"):
            why += f"; a denial has to look at all {FULL} slots of the window"
        result.ratios.append(Ratio(f"{row}, a hit", found_of[row], most, False, "ns", why=why))
    result.plots.append(
        Plot(
            "limits_cost",
            "bars",
            "A hit through limits",
            (*limits.strategies.STRATEGIES, "full moving-window"),
            "nanoseconds a hit",
        )
    )
    return result
