"""What happens where a request cannot be judged: no segment, a full one, or a fault of ours.

Each such request is counted for the host (``get_performance_stats("litellm_plugin")``, and
``health_check()["litellm"]``; while there is no segment, in the worker), and told in the log once a
minute.
"""

from __future__ import annotations

import contextlib
import logging
import time

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import performance
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.metrics.health import PLUGIN

OPERATION = "could_not_judge"
_QUIET_SECONDS = 60.0

_told = -_QUIET_SECONDS
_untold = 0


def failed(doing: str, error: BaseException, consequence: str) -> None:
    """Count it and log it. doing: "judging a request", say. consequence: what becomes of it."""
    global _told, _untold
    performance.record_failure(PLUGIN, OPERATION)
    now = time.monotonic()
    if now - _told < _QUIET_SECONDS:
        _untold += 1
        return
    since = f" ({_untold} more like it in the last minutes)" if _untold else ""
    _told, _untold = now, 0
    logging.getLogger("fast_litellm_shm").error(
        "%s failed: %s: %s; %s%s", doing, type(error).__name__, error, consequence, since
    )


def judged() -> None:
    """One was judged, by limits that are in the segment: what was kept for it is counted there."""
    if performance.kept(PLUGIN):
        with contextlib.suppress(exceptions.FastShmError, OSError):  # it may have gone again
            performance.count_kept(Segment.default())


def forget() -> None:
    """For tests: the next failure is logged again."""
    global _told, _untold
    _told, _untold = -_QUIET_SECONDS, 0
