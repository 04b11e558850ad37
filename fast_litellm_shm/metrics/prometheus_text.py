"""Snapshots as Prometheus' text format, for example for node_exporter's textfile collector.

Version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats. It is written here so
that ``fast-shm export`` does not need prometheus_client, whose parser reads it in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fast_litellm_shm.metrics import DURATION_BOUNDS, Snapshot
from fast_litellm_shm.metrics.families import Family, Histogram, Row, collected

_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})
_LABEL = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
BOUNDS = (*(f"{bound:.9g}" for bound in DURATION_BOUNDS), "+Inf")  # as values of the label le


def prometheus_text(snapshots: Sequence[tuple[str, Snapshot | None]]) -> str:
    """Segments by name, each with its snapshot; None: the segment cannot be read."""
    return "".join(line for each in collected(snapshots) for line in _family(*each))


def samples(family: Family, rows: list[Row]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample; a histogram has many."""
    name = family.prometheus
    for values, value in rows:
        labels = dict(zip(("segment", *family.labels), values, strict=True))
        if not isinstance(value, Histogram):
            yield name, labels, value
            continue
        for bound, count in zip(BOUNDS, value.counts, strict=True):
            yield f"{name}_bucket", {**labels, "le": bound}, count
        yield f"{name}_sum", labels, value.total
        yield f"{name}_count", labels, value.counts[-1]


def _family(family: Family, rows: list[Row]) -> Iterator[str]:
    yield f"# HELP {family.prometheus} {family.help.translate(_HELP)}\n"
    yield f"# TYPE {family.prometheus} {family.kind}\n"
    for name, labels, value in samples(family, rows):
        shown = ",".join(f'{label}="{text.translate(_LABEL)}"' for label, text in labels.items())
        yield f"{name}{{{shown}}} {value!r}\n"
