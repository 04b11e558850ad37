"""Snapshots as Prometheus' text format, for example for node_exporter's textfile collector.

Version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats. It is written here so
that ``fast-shm export`` does not need prometheus_client, whose parser reads it in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fast_litellm_shm.metrics.families import Family, Histogram, Row, collected
from fast_litellm_shm.metrics.model import DURATION_BOUNDS, Snapshot

_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})
_LABEL = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
BOUNDS = (*(f"{bound:.9g}" for bound in DURATION_BOUNDS), "+Inf")  # as values of the label le


def prometheus_text(snapshots: Sequence[tuple[str, Snapshot | None]]) -> str:
    """Segments by name, each with its snapshot; None: the segment cannot be read."""
    return "".join(line for each in collected(snapshots) for line in _family(*each))


def _family(family: Family, rows: list[Row]) -> Iterator[str]:
    name = family.prometheus
    yield f"# HELP {name} {family.help.translate(_HELP)}\n"
    yield f"# TYPE {name} {family.kind}\n"
    for values, value in rows:
        labels = dict(zip(("segment", *family.labels), values, strict=True))
        if not isinstance(value, Histogram):
            yield _sample(name, labels, value)
            continue
        for bound, count in zip(BOUNDS, value.counts, strict=True):
            yield _sample(f"{name}_bucket", {**labels, "le": bound}, count)
        yield _sample(f"{name}_sum", labels, value.total)
        yield _sample(f"{name}_count", labels, value.counts[-1])


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    shown = ",".join(f'{label}="{text.translate(_LABEL)}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {value!r}\n"
