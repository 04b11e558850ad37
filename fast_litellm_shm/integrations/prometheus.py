"""Metrics for ``prometheus_client``: one scrape of any worker shows the sums of all workers.

    from fast_litellm_shm.integrations import prometheus
    prometheus.register()

Then ``/metrics`` has them, however the application serves it. They do not need
PROMETHEUS_MULTIPROC_DIR: each scrape reads the segment. Scrape one worker, whichever answers (or
use ``max by`` over several): each shows the numbers of all. docs/metrics.md has the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.prometheus needs prometheus_client: "
        'pip install "fast-litellm-shm[prometheus]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.metrics.families import Family, Histogram, Row, collected
from fast_litellm_shm.metrics.prometheus_text import BOUNDS
from fast_litellm_shm.metrics.source import Sources

__all__ = ["FastShmCollector", "register"]


class FastShmCollector(Collector):
    """The numbers of one segment, or of several, at each scrape.

    segment: a Segment, a name, several of either, or None for the default segment. It need not
    exist yet: ``fast_shm_up`` is 0 until it does. If it is removed and created again, the new one
    is read. registry: where it registers itself; None: nowhere yet.

    keys: 0 .. 1000; so many of the busiest keys get series of their own, named by key. Prometheus
    keeps a series for every key that ever was among them, and a scrape then holds the GIL for
    longer: docs/metrics.md. deployments: by the name of their router, the names of deployments,
    which are shown in place of hashes.

    A scrape never raises. Raises ValueError or TypeError for bad arguments.
    """

    def __init__(
        self,
        segment: Segment | str | Iterable[Segment | str] | None = None,
        registry: CollectorRegistry | None = None,
        *,
        keys: int = 0,
        deployments: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self._sources = Sources(segment, keys=keys, deployments=deployments)
        if registry is not None:
            registry.register(self)

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the segments that it reads."""
        return self._sources.names

    def describe(self) -> Iterator[Metric]:
        """The names alone, so that a registration reads no segment."""
        for family, _ in collected(()):
            yield _metric(family, [])

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        for family, rows in collected(self._sources.read()):
            yield _metric(family, rows)


def register(
    segment: Segment | str | Iterable[Segment | str] | None = None,
    registry: CollectorRegistry = REGISTRY,
    *,
    keys: int = 0,
    deployments: Mapping[str, Iterable[str]] | None = None,
) -> FastShmCollector:
    """Register a :class:`FastShmCollector`, by default in prometheus_client's own registry. Call it
    once for each registry: to read several segments, name them all. Raises ValueError where the
    registry has one already."""
    return FastShmCollector(segment, registry, keys=keys, deployments=deployments)


def _metric(family: Family, rows: list[Row]) -> Metric:
    labels = ("segment", *family.labels)
    name = family.prometheus
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=labels)
        for values, value in rows:
            if isinstance(value, Histogram):
                buckets = list(zip(BOUNDS, map(float, value.counts), strict=True))
                histogram.add_metric(values, buckets, value.total)
        return histogram
    made = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(
        name, family.help, labels=labels
    )
    for values, value in rows:
        if not isinstance(value, Histogram):
            made.add_metric(values, value)
    return made
