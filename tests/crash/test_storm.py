"""Workers killed with SIGKILL and frozen with SIGSTOP at random moments: no limit is exceeded,
nothing is lost, and nobody else waits. FAST_LITELLM_SHM_STORM_SECONDS lengthens it,
FAST_LITELLM_SHM_STORM_SEED repeats its choices.
"""

from __future__ import annotations

import os
import time

from support import churn, storm
from support.children import run_one

from fast_litellm_shm import Segment

SECONDS = float(os.environ.get("FAST_LITELLM_SHM_STORM_SECONDS", "20"))
SEED = int(os.environ.get("FAST_LITELLM_SHM_STORM_SEED", str(time.time_ns() % 10**6)))


def test_storm(segment_name: str) -> None:
    rounds = int(SECONDS * 1e9 / storm.ROUND) + 50
    capacity = churn.LIVE + rounds + 100
    segment = Segment(segment_name, capacity=capacity)
    # in a process of its own, which has no threads when it forks
    report = run_one(
        storm.storm, segment_name, SECONDS, SEED, method="spawn", patience=SECONDS + 90
    )
    shown = f"seed {SEED}: {report}"
    assert report.kills > SECONDS, shown
    assert report.stops > 0, shown

    assert max(report.rounds) <= storm.ROUND_LIMIT, shown
    # nothing was lost: a round that denied is short of the limit by at most one for each kill
    assert len(report.exhausted) > 1, shown
    assert sum(storm.ROUND_LIMIT - n for n in report.exhausted) <= report.kills, shown

    windows = report.elapsed_ns // int(storm.HOT_PER * 1e9) + 1
    assert storm.HOT_N < report.hot <= windows * storm.HOT_N, shown

    assert report.churn_keys > 10 * capacity * min(SECONDS / 20, 1), shown
    assert report.churn_most == 1, shown

    # afterwards: nobody is left, nothing is stuck, and the segment goes on
    assert [p["pid"] for p in segment.processes() if p["pid"] != os.getpid()] == []
    _, finished, churned = storm.limiters_of(segment)
    assert not finished.is_allowed("round-1")
    assert all(churned.is_allowed(f"after-{i}") for i in range(churn.LIVE))
