"""hiro's clock, which fakes Python's, with that of segments: needs ahead.c in LD_PRELOAD."""

from __future__ import annotations

import ctypes
import datetime
import time
from typing import Any

import hiro

_libc = ctypes.CDLL(None)
_ahead = ctypes.c_longlong.in_dll(_libc, "ahead_ns")
_frozen = ctypes.c_longlong.in_dll(_libc, "frozen_ns")
_boot_time = time.clock_gettime_ns  # before hiro fakes it


_MORE = 200_000  # ns: windows began up to 0.1 ms after the instant at which the clock was stopped


def _seen() -> None:
    """What the clock of segments said last is good for 0.1 ms: see csrc/core/clock.c."""
    _libc.usleep(200)


class Timeline(hiro.Timeline):  # type: ignore[misc]
    """hiro's, with the clock of segments."""

    def forward(self, amount: Any) -> Any:
        timed = isinstance(amount, datetime.timedelta)
        _ahead.value += int((amount.total_seconds() if timed else amount) * 1e9) + _MORE
        _seen()
        return super().forward(amount)

    def freeze(self, target_time: Any = None) -> Any:
        assert target_time is None, "the clock of segments has no date"
        _frozen.value = _boot_time(time.CLOCK_BOOTTIME) - _ahead.value
        _seen()
        return super().freeze()

    def unfreeze(self) -> Any:
        _frozen.value = 0
        return super().unfreeze()

    def __exit__(self, *exc: Any) -> None:
        _frozen.value = 0
        super().__exit__(*exc)
