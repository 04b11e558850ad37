"""The example: four client workers and one upstream, which asks for a pause."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

from integrations.httpx.server import upstream_server
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import Segment

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "httpx_client" / "client.py"
WORKERS, EACH, PAUSE = 4, 10, 1  # PAUSE: s


def attached(segment: Segment, count: int) -> None:
    """Wait until so many processes have the segment."""
    wait_until("the workers come", lambda: segment.stats()["processes"] >= count, every=0.01)


def test_a_pause_is_kept_by_all_workers(segment_name: str) -> None:
    """All four are there when the first answer asks for a pause; none asks before it is over."""
    segment = Segment(segment_name)
    with upstream_server() as server, ExitStack() as stack:
        server.answer = (429, {"Retry-After": str(PAUSE)})
        command = [sys.executable, str(EXAMPLE), f"{server.origin}/first", str(EACH)]
        env = os.environ | {"FAST_LITELLM_SHM_NAME": segment_name}
        workers = [
            stack.enter_context(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(WORKERS)
        ]
        attached(segment, WORKERS)
        server.let_go.set()
        answers = Counter[str]()
        for worker in workers:
            found = Counter(json.loads(worker.communicate(timeout=PATIENCE)[0]))
            assert sum(found.values()) == EACH
            answers += found
    assert answers == {"200": WORKERS * EACH - 1, "429": 1}
    assert server.arrivals[1] >= server.answered + PAUSE
    assert server.most == 1, "never more than one in flight, over all workers"
