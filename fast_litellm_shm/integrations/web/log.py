"""Log: what a gate logs. Clients can cause these lines at will, and choose what is in them. So each
kind of line is written at most once in some seconds, and long values are cut."""

from __future__ import annotations

import logging
import time

from fast_litellm_shm.integrations.web.outcome import Outcome
from fast_litellm_shm.integrations.web.request import Request

_log = logging.getLogger("fast_litellm_shm")
_FAILURE_INTERVAL = 10.0  # s between two lines about one kind of failure
_DRY_RUN_INTERVAL = 1.0  # s between two lines about the dry run of one rule
_LONGEST = 100  # characters of what a client sent


class Log:
    def __init__(self) -> None:
        self._failures: dict[str, float] = {}  # when each was logged last
        self._dry_runs: dict[str, tuple[float, int]] = {}  # likewise, and how many since then

    def failure(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._failures.get(what, -_FAILURE_INTERVAL) >= _FAILURE_INTERVAL:
            self._failures[what] = now
            _log.error("%s", what, exc_info=error)

    def dry_run(self, outcome: Outcome, request: Request) -> None:
        """Logs which request a rule with dry_run would have refused."""
        now, rule = time.monotonic(), outcome.rule.name
        last, more = self._dry_runs.get(rule, (-_DRY_RUN_INTERVAL, 0))
        if now - last < _DRY_RUN_INTERVAL:
            self._dry_runs[rule] = last, more + 1
            return
        self._dry_runs[rule] = now, 0
        _log.info(
            "dry run: rule %r would have refused %s for key %s (%s)%s",
            rule,
            _cut(str(request)),
            _cut(repr(outcome.key)),
            outcome.violated,
            f"; and {more} more since the last such line" if more else "",
        )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
