"""Who waits, and who holds, killed with SIGKILL and stopped at random moments: never more in flight
than the limit, and afterwards nothing is held. FAST_LITELLM_SHM_STORM_SECONDS lengthens it,
FAST_LITELLM_SHM_STORM_SEED repeats its choices.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from support import wait_storm
from support.children import run_one

from fast_litellm_shm import Segment

SECONDS = float(os.environ.get("FAST_LITELLM_SHM_STORM_SECONDS", "6"))
SEED = int(os.environ.get("FAST_LITELLM_SHM_STORM_SEED", str(time.time_ns() % 10**6)))


def test_waiters_and_holders_in_a_storm(segment_name: str, tmp_path: Path) -> None:
    Segment(segment_name, capacity=10_000)
    report = run_one(
        wait_storm.storm,
        segment_name,
        str(tmp_path / "held"),
        SECONDS,
        SEED,
        patience=SECONDS + 200,
    )
    shown = f"seed {SEED}: {report}"
    assert not report.wrong, shown
    assert report.kills > SECONDS and report.stops > 0, shown
    assert all(report.served) and report.left > 0, shown
    assert report.most == list(wait_storm.MOST), shown  # each was in full use, and no more
