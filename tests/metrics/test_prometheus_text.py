"""Prometheus' text format, ours and prometheus_client's, by the parsers of others."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from support.children import PATIENCE
from support.scene import AWKWARD, Scene

from fast_litellm_shm import Segment
from fast_litellm_shm.integrations.prometheus import FastShmCollector, register
from fast_litellm_shm.metrics import LimiterMetrics, Snapshot
from fast_litellm_shm.metrics.families import FAMILIES, UP
from fast_litellm_shm.metrics.prometheus_text import prometheus_text
from fast_litellm_shm.metrics.source import Source

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(families: Any) -> Samples:
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def _ours(snapshot: Snapshot) -> str:
    return prometheus_text([(snapshot.segment.name, snapshot)])


def _changing(samples: Samples) -> Samples:
    """Without what differs from one read to the next."""
    moving = ("fast_shm_read_duration", "fast_shm_deployment_cooldown", "fast_shm_permits_oldest")
    return {key: value for key, value in samples.items() if not key[0].startswith(moving)}


def test_ours_and_the_library_s_are_the_same(scene: Scene) -> None:
    registry = CollectorRegistry()
    FastShmCollector(scene.segment, registry, keys=5)
    theirs = _samples(parse(generate_latest(registry).decode()))
    snapshot = Source(scene.segment, keys=5).read()
    ours = _samples(parse(_ours(snapshot)))
    assert _changing(ours) == _changing(theirs)
    assert set(ours) == set(theirs)
    in_open = _samples(parse_open(openmetrics(registry).decode()))
    assert _changing(in_open) == _changing(ours)
    awkward = [labels for _, labels in ours if ("limiter", AWKWARD) in labels]
    assert awkward, "the awkward name has changed on its way"
    assert any(("key", AWKWARD) in labels for labels in awkward)


def test_every_family_has_samples(scene: Scene) -> None:
    """No family is without rows, and each has help, a type and our prefix."""
    families = {
        family.name: family for family in parse(_ours(Source(scene.segment, keys=5).read()))
    }
    for family in (UP, *FAMILIES):
        found = families[family.prometheus.removesuffix("_total")]
        assert found.samples, family.name
        assert found.type == family.kind and found.documentation == family.help
        assert found.name.startswith("fast_shm_")
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == {"segment", *family.labels}


def test_histograms_are_cumulative(scene: Scene) -> None:
    families = {family.name: family for family in parse(_ours(Source(scene.segment).read()))}
    rows: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    counts: dict[tuple[str, ...], float] = {}
    for sample in families["fast_shm_operation_duration_seconds"].samples:
        which = sample.labels["component"], sample.labels["operation"]
        if sample.name.endswith("_bucket"):
            rows[which].append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_count"):
            counts[which] = sample.value
    assert counts and set(counts) == set(rows)
    for labels, buckets in rows.items():
        bounds, values = zip(*buckets, strict=True)
        assert list(bounds) == sorted(bounds) and bounds[-1] == math.inf
        assert list(values) == sorted(values) and values[-1] == counts[labels]


def test_any_name_comes_back_as_it_was(segment: Segment) -> None:
    empty = Source(segment).read()

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text(min_size=1, max_size=40))
    def comes_back(name: str) -> None:
        text = _ours(replace(empty, limiters=(LimiterMetrics(name, (), 1, 2, 3, 4),)))
        families = {family.name: family for family in parse(text)}
        (sample,) = families["fast_shm_limiter_keys"].samples
        assert sample.labels["limiter"] == name

    comes_back()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(scene: Scene) -> None:
    registry = CollectorRegistry()
    FastShmCollector(scene.segment, registry, keys=5)
    for text in (_ours(Source(scene.segment, keys=5).read()), generate_latest(registry).decode()):
        said = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_registering_reads_nothing(segment_name: str) -> None:
    registry = CollectorRegistry()
    collector = register(segment_name, registry)
    assert collector.segments == (segment_name,)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        register(segment_name, registry)
    registry.unregister(collector)
    register(segment_name, registry)


def test_several_segments_and_one_that_is_not_there(segment_name: str, segment: Segment) -> None:
    registry = CollectorRegistry()
    FastShmCollector([segment, "t-nobody-has-made-this"], registry)
    found = _samples(parse(generate_latest(registry).decode()))
    up = {dict(labels)["segment"]: value for (name, labels), value in found.items() if "up" in name}
    assert up == {segment_name: 1.0, "t-nobody-has-made-this": 0.0}
    others = {dict(labels)["segment"] for (name, labels) in found if "up" not in name}
    assert others == {segment_name}


def test_the_default_segment_is_found_when_it_is_made() -> None:
    registry = CollectorRegistry()
    collector = FastShmCollector(registry=registry)
    labels = {"segment": collector.segments[0]}
    assert registry.get_sample_value("fast_shm_up", labels) == 0
    Segment.default()
    assert registry.get_sample_value("fast_shm_up", labels) == 1
    assert registry.get_sample_value("fast_shm_admitted_total", labels) == 0
