"""examples/prometheus under four workers: a scrape of any one has the exact sums of all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from support.children import PATIENCE
from support.served import EXAMPLES, WORKERS, ask, ask_of_several, served, uvicorn

from fast_litellm_shm.metrics.source import Source

EXAMPLE = EXAMPLES / "prometheus"
LIMIT, REQUESTS = 100, 160


def _scrape(path: str) -> dict[str, Any]:
    status, body, headers = ask(path, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
    return {family.name: family for family in parse(body)}


def _value(families: dict[str, Any], name: str, **labels: str) -> float:
    (found,) = (
        sample.value for sample in families[name].samples if labels.items() <= sample.labels.items()
    )
    return float(found)


def test_one_worker_tells_the_sums_of_four(segment_name: str) -> None:
    server = served(
        "prometheus",
        uvicorn("app:app"),
        ("fastapi", "uvicorn"),
        segment_name,
        {"SEGMENT": segment_name},
    )
    with server as path:
        answers = ask_of_several(path, "/", REQUESTS, LIMIT // 2)
        assert Counter(status for status, *_ in answers) == {200: LIMIT, 429: REQUESTS - LIMIT}
        assert len({body for _, body, _ in answers}) > 1, "one worker alone has answered"
        scrapes = [_scrape(path) for _ in range(8)]  # any worker may answer
        for found in scrapes:
            assert _value(found, "fast_shm_up") == 1
            assert _value(found, "fast_shm_processes") == WORKERS
            for name in ("fast_shm", "fast_shm_limiter"):
                labels = {"limiter": "api"} if name == "fast_shm_limiter" else {}
                assert _value(found, f"{name}_admitted", **labels) == LIMIT
                assert _value(found, f"{name}_denied", **labels) == REQUESTS - LIMIT
            assert _value(found, "fast_shm_permits_in_flight", limiter="work") == 0
        _check_expressions(scrapes[0])
    # They outlive the workers: who comes after a restart goes on with them.
    left = Source(segment_name).read().segment
    assert (left.admitted, left.denied, left.processes) == (LIMIT, REQUESTS - LIMIT, 0)


def _names(node: Any, found: set[str]) -> set[str]:
    """The metrics that a PromQL expression asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        assert node.name, f"no metric: {node}"
        found.add(node.name)
    for child in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if hasattr(node, child) and not isinstance(getattr(node, child), (str, type(None))):
            _names(getattr(node, child), found)
    for child in getattr(node, "args", ()) or ():
        _names(child, found)
    return found


def _expressions() -> Iterator[str]:
    dashboard = json.loads((EXAMPLE / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "5m")
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert asked
            yield asked[1]
    rules = (EXAMPLE / "alerts.yml").read_text(encoding="utf-8")
    yield from re.findall(r"^ +expr: (.+)$", rules, re.MULTILINE)


def _check_expressions(families: dict[str, Any]) -> None:
    """Whatever the dashboard and the alerts ask for is there, by these names."""
    # Families without a sample as yet have their names all the same, in HELP and TYPE.
    there = set()
    for family in families.values():
        total = "_total" if family.type == "counter" else ""
        there.add(family.name + total)
        if family.type == "histogram":
            there |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    asked = set[str]()
    expressions = list(_expressions())
    assert len(expressions) > 40
    for expression in expressions:
        names = _names(promql_parser.parse(expression), set())
        assert names, expression
        assert names <= there, f"{expression}: there is no {names - there}"
        asked |= names
    # And what is worth telling is shown.
    unshown = there - asked - {f"fast_shm_operation_duration_seconds{s}" for s in ("", "_bucket")}
    assert unshown == {
        "fast_shm_pool_dead",
        "fast_shm_permits_key_max",
        "fast_shm_shared_total",  # by limiter it is
    }


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads((EXAMPLE / "dashboard.json").read_text(encoding="utf-8"))
    assert dashboard["id"] is None and dashboard["uid"] and dashboard["title"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        area = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not area & taken, f"{panel['title']} lies over another panel"
        taken |= area
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"] and panel["fieldConfig"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration() -> None:
    said = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "1 rule files found" in said.stdout and "10 rules found" in said.stdout
