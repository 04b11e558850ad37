"""Durations of calls, summed over all workers of the host.

:func:`record_performance` adds one call to the sums of (component, operation). The library adds its
own calls: it measures one in a hundred, and counts it a hundred times. The file that
``FAST_LITELLM_FEATURE_CONFIG`` names may set ``monitoring.sample_rate``, or switch that off with
``monitoring.enabled: false``. Sums are exact while no worker is killed; quantiles are within 5 %,
from 64 ns to 18 minutes.

    >>> record_performance("rust_routing", "pick", 0.4)
    >>> record_performance("python_routing", "pick", 1.2, success=False)
    >>> get_performance_stats("python_routing")["python_routing"]["error_count"]
    1
    >>> round(compare_implementations("rust_routing", "python_routing")["speedup"], 2)
    3.0
"""

from __future__ import annotations

import os
import time
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.native import Recorder, address, ffi, lib
from fast_litellm_shm._shared.segment import Segment

# Bytes of a component's name that the segment keeps: csrc/stats/histogram.c.
_KEPT = len(ffi.new("fshm_metric_info *").name) // 2 - 1


class _DefaultRecorder(Recorder):
    """Records in the default segment, which it opens at the first call. Where that fails, it drops
    what it is given, with one warning: nothing depends on these sums."""

    _segment: Segment | None = None
    _again = 0.0  # when to try once more

    def _bind(self) -> None:
        if time.monotonic() < self._again:
            return
        try:
            self.bind(Segment.default())
        except (exceptions.SegmentError, ValueError) as error:
            self._again = time.monotonic() + 1
            settings.warn_once("nothing is recorded by record_performance()", error)

    def bind(self, segment: Segment | None) -> None:
        """Record in this segment from now on; None: in the default one, found at the next call."""
        if segment is self._segment and segment is not None:
            return
        self._segment, self._again = segment, 0.0
        handle = None if segment is None else segment._handle
        self._set(handle, 0 if handle is None else address(handle))


_recorder = _DefaultRecorder()
record_performance = _recorder.record

# By component and operation: failures that no segment has counted yet. (If two threads fail at the
# same moment, one failure may be missed.)
_kept: dict[tuple[str, str], int] = {}
os.register_at_fork(after_in_child=_kept.clear)  # the parent counts them


def record_failure(component: str, operation: str) -> None:
    """Count a failure. Where no segment can be opened, this process keeps it for
    :func:`count_kept`."""
    record_performance(component, operation, 0.0, success=False)
    if _recorder._segment is None:
        _kept[component, operation] = _kept.get((component, operation), 0) + 1


def kept(component: str) -> int:
    """How many failures of a component this process keeps."""
    return sum(n for (of, _), n in list(_kept.items()) if of == component) if _kept else 0


def metric(segment: Segment, component: str, operation: str) -> int:
    """The number of a metric in the segment. Negative: it has no room for another one."""
    first, second = component.encode(), operation.encode()
    return int(lib.fshm_metric_open(segment._handle, first, len(first), second, len(second)))


def count_kept(segment: Segment) -> None:
    """Count in the segment what this process has kept."""
    while _kept:
        try:
            (component, operation), n = _kept.popitem()
        except KeyError:  # another thread has counted it
            return
        number = metric(segment, component, operation)
        lib.fshm_metric_record(segment._handle, number, 0, n, 0, 0, 0)


def _sample_every() -> int:
    """n, where one of n of the library's own calls is measured; 0: none."""
    path, config = settings.config_or_warning()
    where = f"{path}: monitoring"
    found = settings.known_keys(where, config.get("monitoring", {}), ("enabled", "sample_rate"))
    enabled = settings.switch(where, found, "enabled")
    rate = found.get("sample_rate", 0.01)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        settings.warn_once(
            f"{where}.sample_rate must be a number from 0 to 1, not {rate!r}; 0.01 is used"
        )
        rate = 0.01
    return round(min(1 / rate, 2**32 - 1)) if enabled and rate > 0 else 0


def measured(component: str, operation: str, segment: Segment | None = None) -> tuple[int, int]:
    """For the native types, which measure themselves: the number of the metric in the segment
    (default: Segment.default()), and n, where one of n calls is recorded. (-1, 0): none."""
    every = _sample_every()
    if not every:
        return -1, 0
    return metric(segment or Segment.default(), component, operation), every


def measured_by(component: str, operation: str, segment: Segment) -> tuple[int, int, int]:
    """The arguments of a native type's _measure(): the segment's address, and measured()."""
    return address(segment._handle), *measured(component, operation, segment)


def _fields(info: Any) -> dict[str, Any]:
    """The statistics of a component, or of one of its operations."""
    calls = info.calls
    return {
        "total_calls": calls,
        "average_duration_ms": info.sum_ns / calls / 1e6 if calls else 0.0,
        "success_rate": 1 - min(info.errors / calls, 1.0) if calls else 1.0,
        "error_count": info.errors,
        "min_duration_ms": info.least_ns / 1e6,
        "max_duration_ms": info.most_ns / 1e6,
        "total_duration_ms": info.sum_ns / 1e6,
        "p50_duration_ms": info.p50_ns / 1e6,
        "p95_duration_ms": info.p95_ns / 1e6,
        "p99_duration_ms": info.p99_ns / 1e6,
        "total_input_size": info.size_in,
        "total_output_size": info.size_out,
    }


FIELDS = tuple(_fields(ffi.new("fshm_metric_info *")))  # their names


def _as_kept(component: str) -> str:
    """A component's name as the statistics show it."""
    return component.encode("utf-8", "surrogatepass")[:_KEPT].decode("utf-8", "replace")


def segment_stats(segment: Segment, component: str | None = None) -> dict[str, dict[str, Any]]:
    """:func:`get_performance_stats` of this segment."""
    info, handle = ffi.new("fshm_metric_info *"), segment._handle
    wanted = None if component is None else _as_kept(component)
    numbers: dict[str, dict[str, list[int]]] = {}  # several, where cut names are the same
    number = 0
    while (status := lib.fshm_metric_at(handle, number, info)) >= 0:
        number += 1
        if status != lib.FSHM_OK or not info.calls:
            continue
        raw: bytes = ffi.buffer(info.name, info.name_length)[:]
        name = raw[: info.component_length].decode("utf-8", "replace")
        operation = raw[info.component_length + 1 :].decode("utf-8", "replace")
        if wanted is None or name == wanted:
            numbers.setdefault(name, {}).setdefault(operation, []).append(number - 1)

    def summed(found: list[int]) -> dict[str, Any]:
        lib.fshm_metric_sum(handle, found, len(found), info)
        return _fields(info)

    return {
        name: {
            **summed([each for several in found.values() for each in several]),
            "operations": {operation: summed(several) for operation, several in found.items()},
        }
        for name, found in numbers.items()
    }


def get_performance_stats(component: str | None = None) -> dict[str, dict[str, Any]]:
    """By component, over all workers: total_calls, average_duration_ms, success_rate (0..1),
    error_count, min_duration_ms, max_duration_ms, total_duration_ms, p50_duration_ms,
    p95_duration_ms, p99_duration_ms, total_input_size, total_output_size, and the same by operation
    under ``operations``. ``component``: only that one; {} where it has no data. The segment keeps
    the first 51 bytes of a component's name and 52 of an operation's; the calls of names that are
    the same in these are summed.

    Components of the library itself are sampled: their numbers of calls are estimates, and their
    minima and maxima are those of the measured calls. Raises SegmentError where no segment can be
    opened, TypeError for a component that is no str.
    """
    if component is not None and not isinstance(component, str):
        raise TypeError(f"component must be a str or None, not {component!r}")
    segment = Segment.default()
    _recorder.bind(segment)  # a removed segment's successor is found here at the latest
    return segment_stats(segment, component)


def compare_implementations(rust_component: str, python_component: str) -> dict[str, Any]:
    """Compare two components: rust, python (their statistics), rust_avg_ms, python_avg_ms, speedup
    (python / rust), improvement_percentage, recommendation. {} where either has no data."""
    for name, given in (("rust_component", rust_component), ("python_component", python_component)):
        if not isinstance(given, str):
            raise TypeError(f"{name} must be a str, not {given!r}")
    stats = get_performance_stats()
    rust, python = stats.get(_as_kept(rust_component)), stats.get(_as_kept(python_component))
    if rust is None or python is None:
        return {}
    ours, theirs = rust["average_duration_ms"], python["average_duration_ms"]
    speedup = theirs / ours if ours else None
    if speedup is None:
        advice = f"{rust_component} took no time that can be measured: no comparison is possible."
    elif speedup >= 1.05:
        advice = f"Use {rust_component}: it is {speedup:.2f} times as fast."
    elif speedup <= 1 / 1.05:
        advice = f"Use {python_component}: it is {1 / speedup:.2f} times as fast."
    else:
        advice = "They are equally fast, within 5 %: take the one that is simpler to run."
    few = min(rust["total_calls"], python["total_calls"])
    if few < 30:
        advice += f" Only {few} calls of one of them were recorded: record more before you decide."
    return {
        "rust": rust,
        "python": python,
        "rust_avg_ms": ours,
        "python_avg_ms": theirs,
        "speedup": speedup,
        "improvement_percentage": None if speedup is None else (speedup - 1) * 100,
        "recommendation": advice,
    }


def export_performance_data(component: str | None = None, format: str | None = "json") -> str:
    """:func:`get_performance_stats` as text. ``"json"``: the same object. ``"csv"``: a row for each
    component (operation empty) and one for each of its operations. Raises ValueError for another
    format."""
    import csv
    import io
    import json

    if format is None:  # as fast-litellm has it
        format = "json"
    if format not in ("json", "csv"):
        raise ValueError(f"format must be 'json' or 'csv', not {format!r}")
    stats = get_performance_stats(component)
    if format == "json":
        return json.dumps(stats, indent=2)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("component", "operation", *FIELDS))
    for name, found in stats.items():
        for operation, row in (("", found), *found["operations"].items()):
            writer.writerow((name, operation, *(row[field] for field in FIELDS)))
    return out.getvalue()
