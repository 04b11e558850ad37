"""Reads a :class:`fast_litellm_shm.metrics.Snapshot` from an open segment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fast_litellm_shm import limits
from fast_litellm_shm._shared import features, key_grammar, spending
from fast_litellm_shm._shared.inspection import (
    POOL,
    POOL_TOTAL,
    Inspection,
    pools_among,
    stored_name,
    waiting_callers,
)
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment, opened
from fast_litellm_shm._shared.side_limiters import is_side_limiter
from fast_litellm_shm.metrics import (
    OTHERS,
    BudgetMetrics,
    DeploymentMetrics,
    KeyMetrics,
    LimiterMetrics,
    OperationMetrics,
    PermitMetrics,
    PoolMetrics,
    SegmentMetrics,
    Snapshot,
    SpendingMetrics,
    WaitingMetrics,
)
from fast_litellm_shm.metrics.health import memo_state

UNKNOWN = 2**64 - 1  # a latency or cost that is not known yet
_MOST_ENDPOINTS = 100  # of all pools together; the rest is summed
_DEPLOYMENTS = 256  # entries of their table: layout.h


@dataclass(frozen=True)
class _Limiter:
    """One limiter, or several whose names are shown alike: limiter indices, and their counters."""

    indices: list[int] = field(default_factory=list)
    counters: list[int] = field(default_factory=list)
    limits: list[limits.LimitSpec | limits.InFlight | limits.Granted | limits.Money] = field(
        default_factory=list
    )

    @property
    def max_per_key(self) -> int | None:
        found = [limit.n for limit in self.limits if isinstance(limit, limits.InFlight)]
        return max(found) if found else None


def snapshot(
    of: Segment,
    *,
    keys: int = 0,
    deployments: Mapping[bytes, tuple[str, str]] | None = None,
    begun: float | None = None,
) -> Snapshot:
    """Everything in the segment. keys: how many of the busiest keys to include. deployments: for
    names that the segment has hashed, what to show as (router, deployment). begun: when reading
    began, by time.perf_counter(). Raises SegmentDamagedError if reading would not be safe."""
    begun = time.perf_counter() if begun is None else begun
    damaged = of._check()
    geometry = of.geometry()
    keys_of = ffi.new("uint64_t[]", geometry.limiters)
    used = lib.fshm_used(of._handle, 0, keys_of)
    counters = ffi.new("fshm_counters[]", lib.FSHM_COUNTERS)
    lib.fshm_counters_all(of._handle, counters)
    known = _limiters(of, geometry.limiters)
    permits, pools = _held(of, geometry, known)
    plain = geometry.names != lib.FSHM_NAMES_OFF
    budgets = spending.spending(of)
    return Snapshot(
        limiters=tuple(_limiter_rows(known, counters, keys_of if plain else None)),
        permits=permits,
        waiting=tuple(_waiting(of, known)),
        pools=pools,
        keys=_busiest(of, keys) if keys and plain else (),
        memo=memo_state(of),
        feature_errors={
            name: lib.fshm_feature_errors(of._handle, number)
            for number, name in enumerate(features.FEATURES)
        },
        deployments=tuple(_deployments(of, deployments or {})),
        operations=tuple(_operations(of)),
        budgets=_budgets(budgets),
        spending=_spending(of, budgets, keys) if keys and plain else (),
        segment=SegmentMetrics(
            name=of.name,
            size_bytes=geometry.memory,
            created=geometry.created_realtime_ns / 1e9,
            capacity=geometry.capacity,
            used=used,
            utilization=used / geometry.capacity,
            processes=len(of.processes()),
            admitted=sum(each.admitted for each in counters),
            denied=sum(each.denied for each in counters),
            refused=sum(each.refused for each in counters),
            shared=sum(each.shared for each in counters),
            damaged=damaged,
            unlinked=of.unlinked or any(each.unlinked for each in opened(of.name)),
            liveness_unknown=of.liveness_unknown,
            read_seconds=time.perf_counter() - begun,  # evaluated last
        ),
    )


def _limiters(of: Segment, count: int) -> dict[str, _Limiter]:
    found: dict[str, _Limiter] = {}
    info = ffi.new("fshm_limiter_info *")
    for index in range(count):
        if lib.fshm_limiter_at(of._handle, index, info) != lib.FSHM_OK:
            continue
        raw: bytes = ffi.buffer(info.name, info.name_length)[:]
        name = raw.decode("utf-8", "replace")
        limiter = found.setdefault(name, _Limiter())
        limiter.indices.append(index)
        limiter.counters.append(info.counters)
        if key_grammar.units_of(name):
            continue  # each key has its own limits
        limiter.limits.extend(limits.from_raw(info.limits[i], of) for i in range(info.limits_count))
    return found


def _limiter_rows(
    known: Mapping[str, _Limiter], counters: Any, keys: Any | None
) -> Iterator[LimiterMetrics]:
    last = lib.FSHM_COUNTERS - 1  # counts for all limiters beyond the first

    def row(name: str, limiter: _Limiter, counted: list[int] | None) -> LimiterMetrics:
        calls = {
            field: None if counted is None else sum(getattr(counters[i], field) for i in counted)
            for field in ("admitted", "denied", "refused", "shared")
        }
        return LimiterMetrics(
            limiter=name,
            limits=tuple(limits.described(limiter.limits)),
            keys=sum(keys[i] for i in limiter.indices)
            if keys is not None and limiter.indices
            else None,
            **calls,
        )

    beyond = any(last in limiter.counters for limiter in known.values())
    for name, limiter in known.items():
        if (beyond and name == OTHERS) or is_side_limiter(name, known):
            continue
        # No calls of its own: they are counted with those of others, or not at all (token leases).
        apart = all(index < last for index in limiter.counters)
        yield row(name, limiter, limiter.counters if apart else None)
    if beyond:
        # A limiter may be called "(other)", too. Two series of one name would fail a scrape.
        limiter = known.get(OTHERS, _Limiter())
        yield row(OTHERS, limiter, sorted({*limiter.counters, last}))


# permits and connections --------------------------------------------------------------------------


def _permits(of: Segment, most: int) -> Any:
    """All permits, as an array of fshm_permit_info."""
    import numpy

    fields = ("limiter", "pid", "alive", "idle", "number", "_")
    dtype = numpy.dtype(
        [(name, "=u4") for name in fields]
        + [(name, "=u8") for name in ("age_seconds", "key_hash", "table_slot")]
    )
    assert dtype.itemsize == ffi.sizeof("fshm_permit_info")
    room, count = 0, lib.fshm_permits(of._handle, ffi.NULL, 0)
    while count > room:
        room = min(count + count // 4 + 16, most)
        infos = ffi.new("fshm_permit_info[]", room)
        count = min(lib.fshm_permits(of._handle, infos, room), most)
    if not count:
        return numpy.zeros(0, dtype)
    return numpy.frombuffer(ffi.buffer(infos), dtype, count)


def _held(
    of: Segment, geometry: Any, known: Mapping[str, _Limiter]
) -> tuple[tuple[PermitMetrics, ...], tuple[PoolMetrics, ...]]:
    import numpy

    found = _permits(of, geometry.slots)
    pools = pools_among(known)
    permits, endpoints = [], list[tuple[PoolMetrics, list[int]]]()
    for name, limiter in known.items():
        if limiter.max_per_key is None or is_side_limiter(name, known):
            continue
        mine = found[numpy.isin(found["limiter"], limiter.indices)]
        if name in pools:
            endpoints += _endpoints(name.removeprefix(POOL), limiter.max_per_key, mine)
            continue
        if name.startswith(POOL_TOTAL) and name.replace(POOL_TOTAL, POOL, 1) in pools:
            continue  # the sum of its endpoints
        alive = mine[mine["alive"] == 1]
        permits.append(
            PermitMetrics(
                limiter=name,
                in_flight=int(alive.size),
                max_per_key=limiter.max_per_key,
                dead=int(mine.size - alive.size),
                oldest_seconds=int(alive["age_seconds"].max(initial=0)),
            )
        )
    return tuple(permits), _pool_rows(of, endpoints)


def _waiting(of: Segment, known: Mapping[str, _Limiter]) -> Iterator[WaitingMetrics]:
    names = {i: name for name, limiter in known.items() for i in limiter.indices}
    found = {
        (name, 0): WaitingMetrics(name, "0") for name in known if not is_side_limiter(name, known)
    }
    for info in waiting_callers(of):
        at = names.get(info.limiter, "?"), info.priority
        row = found.get(at) or WaitingMetrics(at[0], str(info.priority))
        if info.stale:
            found[at] = replace(row, stale=row.stale + info.callers)
        else:
            longest = max(row.longest_seconds, info.waited_ns / 1e9)
            callers = row.callers + info.callers
            found[at] = replace(row, callers=callers, longest_seconds=longest)
    yield from found.values()


def _endpoints(pool: str, most: int, mine: Any) -> Iterator[tuple[PoolMetrics, list[int]]]:
    """Each endpoint, by its hash, and the slots of its permits."""
    import numpy

    hashes, which = numpy.unique(mine["key_hash"], return_inverse=True)

    def count(chosen: Any) -> list[int]:
        found: list[int] = numpy.bincount(which[chosen], minlength=hashes.size).tolist()
        return found

    living, waiting = mine["alive"] == 1, mine["idle"] == 1
    active, idle, dead = count(living & ~waiting), count(living & waiting), count(~living)
    ends = numpy.bincount(which, minlength=hashes.size).cumsum().tolist()
    slots = mine["table_slot"][numpy.argsort(which, kind="stable")].tolist()
    for at, key_hash in enumerate(hashes.tolist()):
        row = PoolMetrics(pool, f"#{key_hash:016x}", active[at], idle[at], dead[at], most)
        yield row, slots[ends[at - 1] if at else 0 : ends[at]]


def _pool_rows(of: Segment, found: list[tuple[PoolMetrics, list[int]]]) -> tuple[PoolMetrics, ...]:
    """The endpoints with the most connections by name; the others of each pool as one row."""
    found.sort(key=lambda each: -(each[0].active + each[0].idle))
    rows: dict[tuple[str, str], PoolMetrics] = {}
    for number, (each, slots) in enumerate(found):
        row = replace(each, endpoint=OTHERS, max_connections=None)
        if number < _MOST_ENDPOINTS:
            names = (stored_name(of, slot) for slot in slots)
            row = replace(each, endpoint=next((name[0] for name in names if name), each.endpoint))
        if before := rows.get((row.pool, row.endpoint)):  # names of two may be shown alike
            row = replace(
                row,
                active=row.active + before.active,
                idle=row.idle + before.idle,
                dead=row.dead + before.dead,
            )
        rows[row.pool, row.endpoint] = row
    return tuple(rows.values())


def _budgets(found: list[spending.Spending]) -> tuple[BudgetMetrics, ...]:
    rows: dict[str, BudgetMetrics] = {}
    for each in found:
        row = BudgetMetrics(
            limiter=each.name,
            limit=float(limits.dollars(each.money.n)),
            spent=float(each.spent),
            reserved=float(each.reserved),
            keys=each.keys,
            warned=each.warned,
            used_up=each.used_up,
            # A minute is the unit of windows: the series must not change with each scrape.
            resets=None
            if each.reset_after is None
            else round((time.time() + each.reset_after) / 60) * 60.0,
        )
        rows.setdefault(each.name, row)  # names of two may be shown alike
    return tuple(rows.values())


def _spending(
    of: Segment, found: list[spending.Spending], most: int
) -> tuple[SpendingMetrics, ...]:
    rows: dict[tuple[str, str], SpendingMetrics] = {}
    for row in spending.rows(of, found, most):
        numbers = float(row.limit), float(row.spent), float(row.reserved)
        rows.setdefault((row.budget, row.key), SpendingMetrics(row.budget, row.key, *numbers))
    return tuple(rows.values())


def _busiest(of: Segment, most: int) -> tuple[KeyMetrics, ...]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in Inspection(of).keys(top=most):
        before = found.get((row.limiter, row.key), (0, 0))  # two keys may be shown alike
        found[row.limiter, row.key] = before[0] + row.admitted, before[1] + row.denied
    return tuple(KeyMetrics(*key, *counts) for key, counts in found.items())


# deployments and operations -----------------------------------------------------------------------


def deployments_of(of: Segment) -> Iterator[Any]:
    """The ``fshm_deployment_info`` of each deployment that routers know, valid until the next."""
    entries = list(range(_DEPLOYMENTS))
    infos = ffi.new("fshm_deployment_info[]", len(entries))
    lib.fshm_deployment_look(of._handle, entries, len(entries), 0, 1, infos)
    seen = set()
    for info in infos:
        if info.id and info.id not in seen:
            seen.add(info.id)
            yield info


def _deployments(
    of: Segment, names: Mapping[bytes, tuple[str, str]]
) -> Iterator[DeploymentMetrics]:
    ids = {lib.fshm_deployment_id(of._handle, raw, len(raw)): shown for raw, shown in names.items()}
    for info in deployments_of(of):
        router, deployment = ids.get(info.id, ("", f"#{info.id:016x}"))
        unknown = info.latency_ns == UNKNOWN
        yield DeploymentMetrics(
            router=router,
            deployment=deployment,
            in_flight=info.in_flight,
            requests=info.records,
            latency_seconds=None if unknown else info.latency_ns / 1e9,
            success_ratio=info.success_rate,
            cooldown_seconds=info.cooldown_ns / 1e9,
        )


def _operations(of: Segment) -> Iterator[OperationMetrics]:
    info, number = ffi.new("fshm_metric_info *"), 0
    numbers: dict[tuple[str, str], list[int]] = {}  # several, if their names are shown alike
    while (status := lib.fshm_metric_at(of._handle, number, info)) >= 0:
        if status == lib.FSHM_OK:
            raw: bytes = ffi.buffer(info.name, info.name_length)[:]
            component = raw[: info.component_length].decode("utf-8", "replace")
            operation = raw[info.component_length + 1 :].decode("utf-8", "replace")
            numbers.setdefault((component, operation), []).append(number)
        number += 1
    calls = ffi.new("uint64_t[]", lib.FSHM_OCTAVES)
    for (component, operation), found in numbers.items():
        lib.fshm_metric_octaves(of._handle, found, len(found), calls)
        lib.fshm_metric_sum(of._handle, found, len(found), info)
        yield OperationMetrics(component, operation, tuple(calls), info.errors, info.sum_ns / 1e9)
