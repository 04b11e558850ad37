"""OpenTelemetry's SDK, with a reader in memory."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from support.scene import Scene

from fast_litellm_shm import Limit, RateLimiter, Segment
from fast_litellm_shm.integrations.opentelemetry import _collections, instrument
from fast_litellm_shm.metrics.families import FAMILIES, UP, Histogram, collected
from fast_litellm_shm.metrics.source import Source

# What differs from one read to the next.
MOVING = ("fast_shm.read.duration", "fast_shm.deployment.cooldown", "fast_shm.permits.oldest.age")


class Reader:
    """A provider with one reader."""

    def __init__(self, segment: Any, **options: Any) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])
        instrument(self.provider.get_meter("test"), segment, **options)

    def collect(self) -> dict[str, Any]:
        """Metrics that have points, by name."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.data.data_points  # an older SDK tells of metrics that have none now
        }

    def value(self, name: str) -> Any:
        """Of the only point; None where there is none."""
        metric = self.collect().get(name)
        return None if metric is None else metric.data.data_points[0].value

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.provider.shutdown()


def test_everything_is_told(scene: Scene) -> None:
    expected = {
        family.name: (family, rows)
        for family, rows in collected([(scene.segment.name, Source(scene.segment, keys=5).read())])
    }
    with Reader(scene.segment, keys=5) as reader:
        found = reader.collect()
    assert len(found) == len(FAMILIES) + 2  # one of them is two
    for family in (UP, *FAMILIES):
        _, rows = expected[family.name]
        if family.kind == "histogram":
            counts = found[f"{family.name}.count"], found[f"{family.name}.sum"]
            assert [metric.unit for metric in counts] == ["{call}", "s"]
            for labels, value in rows:
                assert isinstance(value, Histogram)
                assert _of(counts[0], labels) == value.counts[-1]
                assert _of(counts[1], labels) == value.total
            continue
        metric = found[family.name]
        assert (metric.unit, metric.description) == (family.unit, family.help)
        kind = "Sum" if family.kind == "counter" else "Gauge"
        assert type(metric.data).__name__ == kind
        assert family.kind != "counter" or metric.data.is_monotonic
        names = {f"fast_shm.{label}" for label in ("segment", *family.labels)}
        assert all(set(point.attributes) == names for point in metric.data.data_points)
        assert len(metric.data.data_points) == len(rows)
        if family.name not in MOVING:
            for labels, value in rows:
                assert _of(metric, labels) == value, family.name


def _of(metric: Any, labels: tuple[str, ...]) -> Any:
    (found,) = (
        point.value
        for point in metric.data.data_points
        if tuple(point.attributes.values()) == labels
        or set(point.attributes.values()) == set(labels)
    )
    return found


def test_each_collection_looks_anew(segment: Segment) -> None:
    limiter = RateLimiter(Limit(3, per=3600), name="a", segment=segment)
    with Reader(segment) as reader:
        for admitted in (1, 2, 3):
            limiter.is_allowed("k")
            assert reader.value("fast_shm.admitted") == admitted
            assert reader.value("fast_shm.limiter.admitted") == admitted


def _report_until_killed(name: str, ready: int) -> None:
    with Reader(name) as reader:
        os.write(ready, b"+" if reader.value("fast_shm.up") == 1 else b"-")
        while True:
            signal.pause()


def test_one_process_reports_at_a_time(segment: Segment) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            _report_until_killed(segment.name, told)
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"+"
        with Reader(segment) as reader, Reader(segment, once_per_host=False) as alone:
            assert reader.collect() == {}
            assert alone.value("fast_shm.up") == 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert reader.value("fast_shm.up") == 1
    finally:
        os.close(ready)
        os.close(told)


def test_a_forked_child_does_not_report_for_its_parent(segment: Segment) -> None:
    with Reader(segment) as reader:
        assert reader.value("fast_shm.up") == 1
        child = os.fork()
        if not child:
            os._exit(0 if reader.collect() == {} else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert reader.value("fast_shm.up") == 1  # the child's end has not taken the turn away


def test_a_fork_in_the_middle_of_a_collection(segment: Segment) -> None:
    with Reader(segment, once_per_host=False) as reader:
        assert reader.value("fast_shm.up") == 1
        (collections,) = (each for each in _collections if segment.name in each._sources.names)
        with collections._lock:  # as a thread of the parent has it
            child = os.fork()
            if not child:
                signal.alarm(20)
                os._exit(0 if collections.rows("fast_shm.up", "") else 1)
            assert os.waitpid(child, 0)[1] == 0


def test_a_segment_that_comes_later_and_is_made_anew(segment_name: str) -> None:
    with Reader(segment_name) as reader:
        assert reader.collect() == {}
        first = Segment(segment_name, capacity=100)
        assert reader.value("fast_shm.capacity") == 100
        first.remove()
        assert reader.collect() == {}
        Segment(segment_name, capacity=200)
        assert reader.value("fast_shm.capacity") == 200


def test_bad_arguments_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="keys must be between 0 and 1000"):
        instrument(keys=5000)
    with pytest.raises(TypeError, match="segment must be"):
        instrument(segment=3.5)  # type: ignore[arg-type]
