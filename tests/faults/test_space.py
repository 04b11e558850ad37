"""/dev/shm is small, full, absent, read-only or under a quota."""

from __future__ import annotations

import os
from typing import Any

from support import world
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm._shared.native import lib


def _window(name: str, **options: Any) -> RateLimiter:
    return RateLimiter(Window(5, 3600), name="t", segment=Segment(name, **options))


def _too_small() -> tuple[str, list[str]]:
    world.own_shm("size=1m,mode=1777")
    return world.failure(Segment, "s", capacity=100_000), os.listdir("/dev/shm")


def test_too_small_for_a_segment() -> None:
    said, left = world.in_child(_too_small)
    needs = lib.fshm_memory_for(100_000) / 2**20
    assert said == (
        "SegmentSpaceError: cannot open segment /dev/shm/fast_litellm_shm.6.s: no space left for "
        f"it: it needs {needs:.1f} MiB, and /dev/shm has 1.0 MiB free; free some there, mount it "
        "larger (in a container: --shm-size), or ask for a smaller capacity "
        "(FAST_LITELLM_SHM_CAPACITY)"
    )
    assert left == []  # no half-made file, and no memory that it holds


def _full_in_use() -> dict[str, Any]:
    world.own_shm()
    segment = Segment("s", capacity=100)
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    world.fill("/dev/shm/filler")
    # the first call, which makes the lock file: it takes an inode, and no block
    found: dict[str, Any] = {"before": limiter.is_allowed("k"), "lock": segment.liveness_unknown}
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    with world.forked(lambda: permits.acquire("k")) as holder:
        found["held"] = world.takes(permits, "k")
        world.kill(holder)
    found["back"] = wait_until("its permit is back", lambda: world.takes(permits, "k"))
    found["exactly"] = sum(limiter.is_allowed("k") for _ in range(9))
    found["keys"] = sum(limiter.is_allowed(f"key {i}") for i in range(100))
    found["second"] = world.failure(Segment, "second", capacity=100)
    found["again"] = world.failure(Segment, "s", create=False)
    found["inspect"] = world.fast_shm("inspect", "--name", "s").returncode
    return found


def test_full_in_use() -> None:
    found = world.in_child(_full_in_use)
    assert "and /dev/shm has 0.0 MiB free" in found.pop("second")
    assert found == {
        "before": True,
        "lock": None,
        "held": False,
        "back": True,
        "exactly": 4,
        "keys": 100,
        "again": "",
        "inspect": 0,
    }


def _no_inode() -> dict[str, Any]:
    world.own_shm("size=4m,nr_inodes=3,mode=1777")  # the root directory is one
    segment = Segment("s", capacity=100)
    with open("/dev/shm/other", "w"):
        pass
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    found: dict[str, Any] = {"rates": sum(limiter.is_allowed("k") for _ in range(9))}
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    found["permit"] = world.failure(permits.acquire, "k")
    found["unknown"] = segment.liveness_unknown
    found["second"] = world.failure(Segment, "second", capacity=100)
    os.unlink("/dev/shm/other")
    found["later"] = world.takes(permits, "k")
    found["known"] = segment.liveness_unknown
    return found


def test_no_inode_for_the_lock_file() -> None:
    found = world.in_child(_no_inode)
    why = ".lock cannot be opened: No space left on device"
    assert found["rates"] == 5
    assert found["permit"].startswith(
        "SegmentError: limiter 'p' in segment 's': no permit can be owned by this process: "
        "its lock file /dev/shm/fast_litellm_shm.6.s."
    )
    assert why in found["permit"] and why in found["unknown"]
    assert "but no inode for another file" in found["second"]
    assert found["later"] and found["known"] is None


def _no_directory() -> dict[str, Any]:
    world.own_mounts()
    world.mount("/dev", "tmpfs", 0, "size=64k")
    with open("/dev/null", "w"):  # for the command's standard input
        pass
    return {
        "make": world.failure(Segment, "s"),
        "attach": world.failure(Segment, "s", create=False),
        "ls": world.fast_shm("ls"),
        "inspect": world.fast_shm("inspect", "--name", "s"),
        "rm": world.fast_shm("rm", "--name", "s", "--yes"),
    }


def test_no_directory() -> None:
    found = world.in_child(_no_directory)
    for name in ("make", "attach"):
        assert found[name].startswith(
            "SegmentNotFoundError: cannot open segment /dev/shm/fast_litellm_shm.6.s: there is no "
            "directory /dev/shm; mount a tmpfs there (mount -t tmpfs "
        ), found[name]
    assert (found["ls"].returncode, found["inspect"].returncode, found["rm"].returncode) == (
        1,
        3,
        3,
    )
    for name in ("ls", "inspect", "rm"):
        assert "there is no directory /dev/shm" in found[name].stderr, found[name]
        assert "Traceback" not in found[name].stderr
        assert "first worker" not in found[name].stderr  # makes one: not here


def _gone_in_use() -> dict[str, Any]:
    world.own_shm()
    limiter = _window("s", capacity=100)
    first = limiter.is_allowed("k")
    world.unmount("/dev/shm")
    return {
        "allowed": first + sum(limiter.is_allowed("k") for _ in range(9)),
        "unlinked": limiter.segment.unlinked,
    }


def test_unmounted_in_use() -> None:
    assert world.in_child(_gone_in_use) == {"allowed": 5, "unlinked": True}


def _worker() -> Any:
    limiter = _window("s", capacity=100)
    return limiter.is_allowed("k") and limiter


def _read_only() -> dict[str, Any]:
    world.own_shm()
    with world.forked(_worker):
        world.read_only_shm()
        return {
            "attach": world.failure(Segment, "s"),
            "make": world.failure(Segment, "new", capacity=10),
            "inspect": world.fast_shm("inspect", "--name", "s"),
            "ls": world.fast_shm("ls"),
            "rm": world.fast_shm("rm", "--name", "s", "--yes"),
        }


def test_read_only() -> None:
    found = world.in_child(_read_only)
    for name in ("attach", "make"):
        assert found[name].startswith("SegmentPermissionError: cannot open segment /dev/shm/")
        assert "/dev/shm is mounted read-only; mount it read-write" in found[name]
    assert found["inspect"].returncode == 0, found["inspect"].stderr
    assert "1 admitted, 0 denied" in found["inspect"].stdout
    assert "Processes (1)" in found["inspect"].stdout
    assert found["ls"].returncode == 0 and " 100 " in found["ls"].stdout
    assert found["rm"].returncode == 1 and "mounted read-only" in found["rm"].stderr


def _quota() -> str:
    world.own_shm("size=4m,mode=1777,usrquota,usrquota_block_hardlimit=128k")
    world.become(12345, 12345)
    return world.failure(Segment, "s", capacity=1000)


def test_a_disk_quota() -> None:
    said = world.in_child(_quota)
    assert said.startswith("SegmentSpaceError: cannot open segment /dev/shm/")
    assert "and the quota of uid 12345 in /dev/shm is used up; free some of it" in said
