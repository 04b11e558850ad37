"""The state of the library on this host, told truthfully.

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

NATIVE_AVAILABLE = True  # without the native part, the package cannot be imported
RUST_ACCELERATION_AVAILABLE = NATIVE_AVAILABLE  # the name in fast-litellm
PLUGIN = "litellm_plugin"  # as which integrations.litellm counts what it could not judge
NEARLY_FULL = 0.9  # of the capacity, from which on health_check says so

_COMPONENTS = {
    "core": "_native",
    "rate_limiter": "limiters.rate",
    "concurrency_limiter": "limiters.concurrency",
    "connection_pool": "pools.connection_pool",
    "quota": "limiters.quota",
    "tokens": "tokens.counter",
    "routing": "routing.router",
    "monitoring": "_shared.performance",
    "acceleration": "fast_litellm.acceleration",
}


def rust_acceleration_available() -> bool:
    """``RUST_ACCELERATION_AVAILABLE``, as a function: True."""
    return RUST_ACCELERATION_AVAILABLE


def removed_segments() -> list[Segment]:
    """Those of the default name that this process still counts in although they were removed."""
    return [found for found in segment.opened(settings.segment_name()) if found.unlinked]


def memo_state(of: Segment) -> dict[str, Any]:
    """The token memo: places, texts, hits, misses, hit_rate (None: never asked)."""
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
    """What health_check tells of a segment. Raises ValueError where it does not add up."""
    stats, geometry = of.stats(), of.geometry()
    process, dead = ffi.new("fshm_process_info *"), 0
    for slot in range(geometry.processes):
        lib.fshm_process_at(of._handle, slot, process)
        dead += process.pid != 0 and not process.alive
    permits = list(Inspection(of).permits())
    return {
        "name": stats["name"],
        "path": stats["path"],
        "capacity": stats["capacity"],
        "used": stats["used"],
        "occupancy": stats["occupancy"],
        "unlinked": stats["unlinked"],
        "damaged": stats["damaged"],
        "liveness_unknown": stats["liveness_unknown"],
        "processes_alive": stats["processes"],
        "processes_dead": dead,
        "permits": len(permits),
        "permits_of_dead": sum(permit.pid is None for permit in permits),
        "limiters": stats["limiters"],
        "refused_full": sum(found["refused_full"] for found in of.processes()),
    }


def _problems(state: dict[str, Any]) -> list[str]:
    out = []
    if state["occupancy"] >= NEARLY_FULL:
        out.append(
            f"{state['occupancy']:.0%} of the segment's capacity of {state['capacity']} keys is "
            "used: make it with a larger FAST_LITELLM_SHM_CAPACITY"
        )
    if state["unlinked"]:
        out.append(f"the segment {state['name']} was removed: restart the workers")
    elif state["liveness_unknown"]:
        out.append(f"segment {state['name']}: {state['liveness_unknown']}")
    if state["damaged"]:
        out.append(state["damaged"])
    return out


def health_check() -> dict[str, Any]:
    """A dict: status (``"ok"``, else what is wrong, in words), rust_available (the native part is
    loaded), components (those there are), segment (None where none is to be had; else name, path,
    capacity, used, occupancy, unlinked, damaged, liveness_unknown (each a sentence, then in the
    status too, or None), processes_alive, processes_dead (places that an ended process left, to be
    used again), permits, permits_of_dead (given back when somebody needs one), limiters,
    refused_full (calls that met a full table)), memo, features_off, and litellm: None, or
    could_not_judge, the requests of LiteLLM's plugin that ``fail_open`` decided about since the
    segment was made (where there is none: those of this process), and cluster: None, or how this
    host fares with limits that are kept for many (hosts, leader, round_trips, failed, granted,
    given_back, admitted, calls_saved, permits, lag_p50_ms, lag_p99_ms, away, lost:
    cluster/state.py). While the server is away for a process of this host, the status says so.

    Never raises.
    """
    # whoever needs it, not each worker
    from fast_litellm_shm.cluster.state import cluster_state, problem

    problems: list[str] = []
    state = memo = plugin = cluster = None
    off: list[str] = []
    try:
        if removed_segments():
            problems.append(
                f"the segment {settings.segment_name()} was removed while this process used it: "
                "limiters made before count apart from new ones; restart the workers"
            )
        default = Segment.default()
        state, memo = segment_state(default), memo_state(default)
        cluster = cluster_state(default)
        performance.count_kept(default)
        failed = performance.segment_stats(default, PLUGIN).get(PLUGIN)
        plugin = {"could_not_judge": failed["error_count"]} if failed else None
        problems += _problems(state)
        if cluster is not None and cluster["away"] is not None:
            problems.append(problem(cluster["away"]))
    except (exceptions.FastShmError, OSError) as error:
        problems.append(str(error))
    except Exception as error:  # its contents are foreign: whatever they break must be told
        problems.append(f"the segment's contents do not add up: {type(error).__name__}: {error}")
    if plugin is None and performance.kept(PLUGIN):
        plugin = {"could_not_judge": performance.kept(PLUGIN)}
    try:
        for name, found in features.get_feature_status().items():
            if not found["enabled"]:
                off.append(name)
            if found["state"] == features.AFTER_ERRORS:
                problems.append(
                    f"{name} is off after {found['error_count']} errors: mend their cause, then "
                    f"call reset_errors({name!r})"
                )
    except Exception as error:  # a warning that was made an error, say
        problems.append(f"the features cannot be told: {error}")
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
    }
