"""Requests whose limits could not be checked: no segment, a full one, or a fault of the plugin.

Each is counted for the host (``get_performance_stats("litellm_plugin")`` and
``health_check()["litellm"]``), and logged at most once a minute. While there is no segment, the
worker keeps the count, and :func:`flush` adds it to the segment later.
"""

from __future__ import annotations

import contextlib
import logging
import time

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import performance
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.metrics.health import PLUGIN

OPERATION = "could_not_judge"  # a key of health_check()'s JSON
_LOG_SECONDS = 60.0

_logged_at = -_LOG_SECONDS
_not_logged = 0


def report(doing: str, error: BaseException, consequence: str) -> None:
    """Count a failure and log it. doing: "checking a request", for example. consequence: what
    happens to the request now."""
    global _logged_at, _not_logged
    performance.record_failure(PLUGIN, OPERATION)
    now = time.monotonic()
    if now - _logged_at < _LOG_SECONDS:
        _not_logged += 1
        return
    since = f" ({_not_logged} more like it in the last minutes)" if _not_logged else ""
    _logged_at, _not_logged = now, 0
    logging.getLogger("fast_litellm_shm").error(
        "%s failed: %s: %s; %s%s", doing, type(error).__name__, error, consequence, since
    )


def flush() -> None:
    """The segment is reachable: add the failures that this worker has kept."""
    if performance.kept(PLUGIN):
        with contextlib.suppress(exceptions.FastShmError, OSError):  # it may be gone again
            performance.count_kept(Segment.default())


def forget() -> None:
    """For tests: the next failure is logged again."""
    global _logged_at, _not_logged
    _logged_at, _not_logged = -_LOG_SECONDS, 0
