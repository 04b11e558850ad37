"""examples/otel under four workers: one of them exports the sums of all, and when it is killed
another one goes on."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections import Counter
from typing import Any

from support.served import ask_of_several, served, uvicorn
from support.waiting import wait_until

LIMIT, REQUESTS = 100, 160


def _points(line: str) -> dict[str, list[Any]]:
    """The values of each metric that an export has points of."""
    return {
        metric["name"]: [point["value"] for point in metric["data"]["data_points"]]
        for resource in json.loads(line)["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        if metric["data"]["data_points"]
    }


def _exports(folder: pathlib.Path) -> dict[int, list[dict[str, list[Any]]]]:
    """What each worker has exported, by its pid; without those that exported nothing."""
    found = {}
    for path in folder.iterdir():
        *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last one is being written
        told = [points for line in lines if (points := _points(line))]
        if told:
            found[int(path.stem)] = told
    return found


def _told_all(folder: pathlib.Path, but: int = 0) -> int:
    """Which worker's last export has the sums of all; 0: none, as yet. but: not this one."""
    for pid, told in _exports(folder).items():
        sums = (told[-1]["fast_shm.admitted"], told[-1]["fast_shm.denied"])
        if pid != but and sums == ([LIMIT], [REQUESTS - LIMIT]):
            return pid
    return 0


def test_one_of_four_workers_exports_the_sums(segment_name: str, tmp_path: pathlib.Path) -> None:
    env = {
        "SEGMENT": segment_name,
        "METRICS_FOLDER": str(tmp_path),
        "OTEL_METRIC_EXPORT_INTERVAL": "100",
    }
    needs = ("fastapi", "uvicorn", "opentelemetry.sdk")
    with served("otel", uvicorn("app:app"), needs, segment_name, env) as path:
        answers = ask_of_several(path, "/", REQUESTS, LIMIT // 2)
        assert Counter(status for status, *_ in answers) == {200: LIMIT, 429: REQUESTS - LIMIT}
        assert len({body for _, body, _ in answers}) > 1, "one worker alone has answered"
        reporter = wait_until("one has exported the sums", lambda: _told_all(tmp_path))
        assert set(_exports(tmp_path)) == {reporter}, "two workers have exported the sums of all"
        os.kill(reporter, signal.SIGKILL)
        heir = wait_until("another one goes on", lambda: _told_all(tmp_path, but=reporter))
        exports = _exports(tmp_path)
        assert set(exports) == {reporter, heir}
    for name in ("fast_shm.admitted", "fast_shm.limiter.denied"):
        values = [told[name] for pid in (reporter, heir) for told in exports[pid] if name in told]
        assert values == sorted(values), f"{name} has fallen"
