"""The clock of a state file: ns that never go back, also over reboots.

Within a boot it goes by the kernel's clock since boot, as the segment's does. So setting the time
of day changes nothing. Over a reboot it goes on by the time of day: if that went back, by nothing.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

_SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def since_boot() -> int:
    return time.clock_gettime_ns(_SINCE_BOOT)


def time_of_day() -> int:
    return time.time_ns()


def boot() -> str:
    """Names this run of the kernel, and its clock: "" where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            found = file.read().strip()
        return f"{found}/{os.stat('/proc/self/ns/time').st_ino}"
    except OSError:
        return ""


def host() -> str:
    """Names this host, also after a reboot."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            found = file.read().strip()
    except (OSError, UnicodeError):
        found = ""
    return found or socket.gethostname()


_WRONG = 86_400 * 10**9  # ns: a time of day that was set back by more had been wrong


def not_before(floor: int) -> int:
    """The time of day, for windows of the calendar: where it was set back, it stands still until it
    has caught up with the latest that was seen (as csrc/core/wall.h has it for a segment)."""
    wall = time_of_day()
    return wall if floor - wall > _WRONG else max(floor, wall)


class Clock(NamedTuple):
    """The line of a boot: at ``since_boot`` ns of it, the file's time was ``now``. wall: the time
    of day then. floor: the latest time of day that was seen."""

    boot: str
    since_boot: int
    now: int
    wall: int
    floor: int

    @classmethod
    def begun(cls) -> Clock:
        """Of a new file."""
        wall = time_of_day()
        return cls(boot(), since_boot(), wall, wall, wall)

    def goes_on(self) -> Clock:
        """In this boot."""
        mine, at, wall = boot(), since_boot(), time_of_day()
        passed = at - self.since_boot if mine and mine == self.boot else wall - self.wall
        return Clock(mine, at, self.now + max(passed, 0), wall, not_before(self.floor))

    def time(self) -> int:
        return self.now + max(since_boot() - self.since_boot, 0)
