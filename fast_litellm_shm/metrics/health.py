"""Whether the library works on this host: :func:`health_check`.

>>> health_check()["status"]
'ok'
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import features, performance, segment, settings
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment

NATIVE_AVAILABLE = True  # else the package cannot be imported
RUST_ACCELERATION_AVAILABLE = NATIVE_AVAILABLE  # the name in fast-litellm
PLUGIN = "litellm_plugin"  # the component of integrations.litellm's failed checks
NEARLY_FULL = 0.9  # share of the capacity from which health_check reports it

_COMPONENTS = {
    "core": "_native",
    "rate_limiter": "limiters.rate",
    "concurrency_limiter": "limiters.concurrency",
    "connection_pool": "pools.connection_pool",
    "quota": "limiters.quota",
    "budget": "limiters.budget",
    "tokens": "tokens.counter",
    "routing": "routing.router",
    "monitoring": "_shared.performance",
    "acceleration": "fast_litellm.acceleration",
}


def rust_acceleration_available() -> bool:
    """``RUST_ACCELERATION_AVAILABLE``, as a function: True."""
    return RUST_ACCELERATION_AVAILABLE


def removed_segments() -> list[Segment]:
    """The removed segments of the default name that this process still uses."""
    return [found for found in segment.opened(settings.segment_name()) if found.unlinked]


def memo_state(of: Segment) -> dict[str, Any]:
    """The token memo: places (its size), texts (in it), hits, misses, hit_rate (None: not used)."""
    info = ffi.new("fshm_memo_info *")
    lib.fshm_memo_at(of._handle, info)
    asked = info.hits + info.misses
    return {
        "places": info.entries,
        "texts": info.texts,
        "hits": info.hits,
        "misses": info.misses,
        "hit_rate": info.hits / asked if asked else None,
    }


def segment_state(of: Segment) -> dict[str, Any]:
    """A segment, for health_check. Raises ValueError if its contents do not add up."""
    stats, geometry = of.stats(), of.geometry()
    process, dead = ffi.new("fshm_process_info *"), 0
    for index in range(geometry.processes_joined):
        lib.fshm_process_at(of._handle, index, process)
        dead += process.pid != 0 and not process.alive
    inspection = Inspection(of)
    permits = list(inspection.permits())
    same = "name path capacity used occupancy unlinked damaged liveness_unknown"
    return {
        **{field: stats[field] for field in same.split()},
        "processes_alive": stats["processes"],
        "processes_dead": dead,
        "permits": len(permits),
        "permits_of_dead": sum(permit.pid is None for permit in permits),
        "limiters": stats["limiters"],
        "refused_full": sum(found["refused_full"] for found in of.processes()),
        "budgets": [each.as_dict() for each in inspection.spending],
    }


def _problems(state: dict[str, Any]) -> list[str]:
    out = []
    if state["occupancy"] >= NEARLY_FULL:
        out.append(
            f"{state['occupancy']:.0%} of the segment's capacity of {state['capacity']} keys is "
            "used: make it again with a larger FAST_LITELLM_SHM_CAPACITY"
        )
    if state["unlinked"]:
        out.append(f"the segment {state['name']} was removed: restart the workers")
    elif state["liveness_unknown"]:
        out.append(f"segment {state['name']}: {state['liveness_unknown']}")
    if state["damaged"]:
        out.append(state["damaged"])
    return out


def health_check() -> dict[str, Any]:
    """The state of the library on this host, as a dict. Never raises.

    - status: ``"ok"``, else what is wrong, in sentences.
    - rust_available: True (the native part is loaded). components: the parts of the package.
    - segment: None if there is none and none can be made. Else name, path, capacity, used,
      occupancy, unlinked, damaged, liveness_unknown (a sentence, also in the status, or None),
      processes_alive, processes_dead (entries of ended processes, which new ones reuse), permits,
      permits_of_dead (given back when a caller needs one), limiters, refused_full (calls that met
      a full table), budgets (a dict for each: name, limit of each key, per, timezone, reset_after
      in seconds; over its keys: spent, reserved, keys, warned: keys that reached ``warn_at`` in
      this window, used_up: keys with nothing left; amounts in dollars).
    - memo: the token memo. features_off: names of features that are off.
    - litellm: None, or could_not_judge: requests that LiteLLM's plugin could not check, and that
      ``fail_open`` decided, since the segment was made (without a segment: in this process).
    - cluster: None, or the state of limits over many hosts (hosts, leader, round_trips, failed,
      granted, given_back, admitted, calls_saved, permits, lag_p50_ms, lag_p99_ms, away, lost: see
      cluster/state.py). If a process of this host cannot reach the server, the status says so.
    - durable: None, or the state of durable limits (transactions, failed, granted, given_back,
      lag_p50_ms, lag_p99_ms, away, lost: see durable/state.py). Likewise.
    """
    # not for each worker that imports the package
    from fast_litellm_shm.cluster.state import cluster_state, outage_state, problem
    from fast_litellm_shm.durable.state import durable_state

    problems: list[str] = []
    state = memo = plugin = cluster = durable = None
    off: list[str] = []
    try:
        if removed_segments():
            problems.append(
                f"the segment {settings.segment_name()} was removed while this process used it: "
                "limiters made before count apart from new ones. Restart the workers"
            )
        default = Segment.default()
        state, memo = segment_state(default), memo_state(default)
        cluster, durable = cluster_state(default), durable_state(default)
        performance.count_kept(default)
        failed = performance.segment_stats(default, PLUGIN).get(PLUGIN)
        plugin = {"could_not_judge": failed["error_count"]} if failed else None
        problems += _problems(state)
        outage = outage_state(default)
        if outage is not None:
            problems.append(problem(outage))
    except (exceptions.FastShmError, OSError) as error:
        problems.append(str(error))
    except Exception as error:  # other processes write its contents, and may break anything
        problems.append(f"the segment's contents do not add up: {type(error).__name__}: {error}")
    if plugin is None and performance.kept(PLUGIN):
        plugin = {"could_not_judge": performance.kept(PLUGIN)}
    try:
        for name, found in features.get_feature_status().items():
            if not found["enabled"]:
                off.append(name)
            if found["state"] == features.AFTER_ERRORS:
                problems.append(
                    f"{name} is off after {found['error_count']} errors: fix their cause, then "
                    f"call reset_errors({name!r})"
                )
    except Exception as error:  # for example a warning that a filter turned into an error
        problems.append(f"the state of the features is not known: {error}")
    return {
        "status": "; ".join(problems) or "ok",
        "rust_available": RUST_ACCELERATION_AVAILABLE,
        "components": [
            name
            for name, module in _COMPONENTS.items()
            if importlib.util.find_spec(f"fast_litellm_shm.{module}") is not None
        ],
        "segment": state,
        "memo": memo,
        "features_off": off,
        "litellm": plugin,
        "cluster": cluster,
        "durable": durable,
    }
