"""Recommendations from the metrics of this host: what to change, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import features, performance, spending
from fast_litellm_shm._shared.inspection import POOL, POOL_TOTAL, Inspection
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.metrics import health

HIGH, MEDIUM, LOW = "high", "medium", "low"
_FILLING, _FULL = 0.8, 0.95  # shares of a table
_CALLS = 100  # fewer calls give no meaningful share
_DENIED = 0.9  # share of the calls of a key
_ERRORS = 0.05  # share of the calls of a component
_HITS_LOW = 0.1  # share of the lookups in the memo
_WAITED = 10.0  # seconds
_SHOWN = 5  # keys in recommendations of one type


def _one(
    kind: str, component: str, priority: str, description: str, suggestion: str
) -> dict[str, Any]:
    return {
        "type": kind,
        "component": component,
        "priority": priority,
        "description": description,
        "suggestion": suggestion,
        "message": f"{description} {suggestion}",
    }


def _segment(state: dict[str, Any], segment: Segment) -> Iterator[dict[str, Any]]:
    larger = (
        f"Stop the workers, run `fast-shm rm --name {state['name']}`, and start them with "
        f"FAST_LITELLM_SHM_CAPACITY={2 * state['capacity']}."
    )
    if health.removed_segments():
        yield _one(
            "segment_removed",
            "segment",
            HIGH,
            f"The segment {state['name']} was removed while this process used it: limiters made "
            "before count apart from new ones.",
            "Restart the workers that are still attached to it.",
        )
    for kind in ("damaged", "liveness_unknown"):
        if state[kind] and not state["unlinked"]:  # for a removed one see above
            what, _, cure = state[kind].partition("; ")  # what is wrong, and what to do
            yield _one(
                f"segment_{kind}",
                "segment",
                HIGH,
                f"{what}." if kind == "damaged" else f"Segment {state['name']}: {what}.",
                f"{cure[:1].upper()}{cure[1:]}." if cure else "Fix that, and restart the workers.",
            )
    if state["occupancy"] >= _FILLING:
        yield _one(
            "segment_full",
            "segment",
            HIGH if state["occupancy"] >= _FULL else MEDIUM,
            f"{state['occupancy']:.0%} of the capacity of {state['capacity']} keys is used.",
            larger,
        )
    if state["refused_full"]:
        yield _one(
            "keys_refused",
            "segment",
            HIGH,
            f"{state['refused_full']} calls met a full table: on_full decided about them.",
            larger,
        )
    geometry = segment.geometry()
    if state["limiters"] >= _FILLING * geometry.limiters:
        yield _one(
            "limiters_full",
            "segment",
            MEDIUM,
            f"{state['limiters']} of {geometry.limiters} entries for limiters are in use; they are "
            "never freed.",
            "Use keys instead of a limiter for each user, or a larger capacity.",
        )
    if state["processes_alive"] >= _FILLING * geometry.processes:
        yield _one(
            "processes_full",
            "segment",
            MEDIUM,
            f"{state['processes_alive']} of {geometry.processes} entries for processes are in use.",
            "Use fewer processes for one segment: a process without an entry can hold no permits.",
        )


def _keys(inspection: Inspection) -> Iterator[dict[str, Any]]:
    shown = 0
    for row in inspection.keys(sort="denied", top=50):
        calls = row.admitted + row.denied
        if calls < _CALLS or row.denied < _DENIED * calls or shown >= _SHOWN:
            continue
        shown += 1
        yield _one(
            "key_denied",
            "rate_limiter",
            MEDIUM,
            f"Key {row.key!r} of limiter {row.limiter!r}: {row.denied} of {calls} calls were "
            "denied.",
            "Raise the limit if these calls are wanted, let the caller wait for retry_after_ms, or "
            "find out which client sends them.",
        )


def _budgets(inspection: Inspection) -> Iterator[dict[str, Any]]:
    for row in spending.rows(inspection.segment, inspection.spending, _SHOWN):
        over = not row.remaining
        if not over and not row.warned:
            continue
        until = "" if row.reset_after is None else f" for the next {row.reset_after / 3600:.1f} h"
        yield _one(
            "budget_used_up" if over else "budget_warned",
            "budget",
            HIGH if over else MEDIUM,
            f"Key {row.key!r} of budget {row.budget!r} has used ${row.used:f} of "
            f"${row.limit:f}{until}.",
            "Its calls are denied: raise the budget with add(), or let it be."
            if over
            else "Raise the budget with add(), or find out which calls cost so much.",
        )


def _permits(inspection: Inspection) -> Iterator[dict[str, Any]]:
    shown = 0
    for row in inspection.in_flight():
        most, pool = row["max_in_flight"], row["limiter"].startswith((POOL, POOL_TOTAL))
        used = row["in_flight"] - (row["idle"] if pool else 0)  # idle ones are free for use
        if most is None or used < most or shown >= _SHOWN:
            continue
        shown += 1
        what = "connections" if pool else "permits"
        yield _one(
            "pool_full" if pool else "permits_full",
            "connection_pool" if pool else "concurrency_limiter",
            MEDIUM,
            f"{row['limiter']!r}, {row['key']!r}: all {most} {what} are out, the oldest for "
            f"{row['oldest_seconds']} s.",
            "Look for connections that are never returned, run cleanup_expired_connections(), or "
            "raise FAST_LITELLM_POOL_MAX_PER_ENDPOINT or FAST_LITELLM_POOL_MAX_TOTAL."
            if pool
            else "Look for permits that are never released, or raise the limit.",
        )


def _waiting(inspection: Inspection) -> Iterator[dict[str, Any]]:
    rows = [row for row in inspection.waiting() if row["longest_seconds"] >= _WAITED]
    for row in rows[:_SHOWN]:
        callers = "1 caller waits" if row["callers"] == 1 else f"{row['callers']} callers wait"
        yield _one(
            "long_wait",
            "wait_queue",
            MEDIUM,
            f"{row['limiter']!r}, {row['key']!r}: {callers}, the first for "
            f"{row['longest_seconds']:.0f} s.",
            "Raise the limit, or let callers give up sooner: give them a timeout.",
        )


def _measured(segment: Segment) -> Iterator[dict[str, Any]]:
    stats = performance.segment_stats(segment)
    for name, found in stats.items():
        rate = 1 - found["success_rate"]
        if found["total_calls"] >= _CALLS and rate >= _ERRORS:
            worst = max(found["operations"].items(), key=lambda item: item[1]["error_count"])
            yield _one(
                "error_rate",
                name,
                HIGH if rate >= 0.25 else MEDIUM,
                f"{found['error_count']} of {found['total_calls']} calls failed ({rate:.0%}), most "
                f"of them in {worst[0]!r}.",
                "The log has their cause.",
            )
    if "(other)" in stats:
        yield _one(
            "metrics_full",
            "monitoring",
            LOW,
            "More pairs of component and operation were recorded than the segment keeps: the last "
            "ones are summed as '(other)'.",
            "Use fewer names: no ids of requests or users in them.",
        )


def _memo(segment: Segment) -> Iterator[dict[str, Any]]:
    memo = health.memo_state(segment)
    asked = memo["hits"] + memo["misses"]
    if asked < 10 * _CALLS or memo["hit_rate"] is None:
        return
    if memo["hit_rate"] < 0.5 and memo["texts"] >= _FULL * memo["places"]:
        yield _one(
            "memo_full",
            "tokens",
            MEDIUM,
            f"{memo['hit_rate']:.0%} of {asked} texts were known to the token memo, which is full "
            f"({memo['texts']} texts).",
            "Make the segment with a larger FAST_LITELLM_SHM_CAPACITY: the memo grows with it.",
        )
    elif memo["hit_rate"] < _HITS_LOW:
        yield _one(
            "memo_misses",
            "tokens",
            LOW,
            f"{memo['hit_rate']:.0%} of {asked} texts were known to the token memo.",
            "Count messages one by one instead of whole conversations: then the earlier ones are "
            "known. If every text is new, there is nothing to gain.",
        )


def _features() -> Iterator[dict[str, Any]]:
    for name, found in features.get_feature_status().items():
        if found["state"] == features.AFTER_ERRORS:
            last = f" The last here: {found['errors'][-1]}." if found["errors"] else ""
            yield _one(
                "feature_failed",
                name,
                HIGH,
                f"{name} is off in all workers after {found['error_count']} errors.{last}",
                f"Fix their cause, then call reset_errors({name!r}).",
            )
        elif not found["enabled"]:
            enforced = name in ("rust_rate_limiting", "rust_connection_pool")
            yield _one(
                "feature_off",
                name,
                LOW,
                f"{name} is switched off by a setting."
                + (" Its limits stay in force." if enforced else ""),
                f"Remove FAST_LITELLM_{name.upper()} or FAST_LITELLM_ENABLED, or the file's entry, "
                "if that is no longer wanted.",
            )


def get_recommendations() -> list[dict[str, Any]]:
    """What to do about problems on this host, the most urgent first; [] if there are none.

    Each is a dict: type, component, priority (``high``, ``medium``, ``low``), description (what was
    found, with figures), suggestion (what to do), message (both)."""
    out: list[dict[str, Any]] = []
    try:
        segment = Segment.default()
        out += _segment(health.segment_state(segment), segment)
        inspection = Inspection(segment)
        for look in (_keys, _budgets, _permits, _waiting):
            out += look(inspection)
        for measure in (_measured, _memo):
            out += measure(segment)
    except exceptions.SegmentError as error:
        out.append(
            _one("no_segment", "segment", HIGH, str(error), "Until then, nothing is shared.")
        )
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        out.append(
            _one(
                "segment_damaged",
                "segment",
                HIGH,
                f"The segment's contents do not add up: {error}.",
                f"Stop the workers, remove it with `fast-shm rm --name {segment.name}`, and find "
                "out what overwrote it.",
            )
        )
    out += _features()
    order = (HIGH, MEDIUM, LOW)
    return sorted(out, key=lambda found: order.index(found["priority"]))
