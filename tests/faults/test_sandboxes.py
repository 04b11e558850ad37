"""What service managers and containers put a process into: which of it shares a segment with the
host, and what is said where it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from support import world

from fast_litellm_shm import RateLimiter, Segment, Window

NEWIPC, NEWUTS, NEWNET = 0x08000000, 0x04000000, 0x40000000


def _admitted(name: str) -> int:
    limiter = RateLimiter(Window(50, 3600), name="t", segment=Segment(name))
    return sum(limiter.is_allowed("k") for _ in range(30))


def _apart(flags: int) -> Callable[[str], int]:
    def there(name: str) -> int:
        world._check("a namespace", world._libc.unshare(flags))
        return _admitted(name)

    return there


@pytest.mark.parametrize("flags", [NEWIPC, NEWUTS | NEWNET], ids=["PrivateIPC", "PrivateNetwork"])
def test_namespaces_that_share_it(segment_name: str, flags: int) -> None:
    assert _admitted(segment_name) == 30
    assert world.in_child(_apart(flags), segment_name) == 20


def _remounted(options: str) -> Callable[[str], Any]:
    def there(name: str) -> Any:
        world.own_mounts()
        world.mount("/proc", "proc", 0, options)
        return world.failure(Segment, name) or _admitted(name)

    return there


def test_protect_proc(segment_name: str) -> None:
    """hidepid, as ProtectProc=invisible has it."""
    assert _admitted(segment_name) == 30
    assert world.in_child(_remounted("hidepid=invisible"), segment_name) == 20


def test_proc_subset(segment_name: str) -> None:
    """ProcSubset=pid hides the boot id: the error names it, and not the last boot."""
    assert _admitted(segment_name) == 30
    said = world.in_child(_remounted("subset=pid"), segment_name)
    assert said.startswith("SegmentClockError: ")
    assert "this process cannot read /proc/sys/kernel/random/boot_id" in said
    assert "ProcSubset=pid" in said and "fast-shm rm" not in said


def _read_only(name: str) -> str:
    world.read_only_shm()
    return world.failure(Segment, name)


def test_a_read_only_folder(segment_name: str) -> None:
    said = world.in_child(_read_only, segment_name)
    assert said.startswith("SegmentPermissionError: ") and "/dev/shm is mounted read-only" in said
    assert os.path.isdir("/dev/shm")
