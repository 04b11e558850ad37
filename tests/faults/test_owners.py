"""umask, other users, and two users who share by a group."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from support import world
from support.names import left_over

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.segment import path_of

ANN, BOB, EVE, GROUP = 12345, 12346, 12347, 12350


def _limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(50, 3600), name="t", segment=segment)


def _permits(segment: Segment) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(3, name="p", segment=segment)


def _made_under(mask: int, name: str, mode: int) -> list[int]:
    os.umask(mask)
    segment = Segment(name, capacity=100, mode=mode)
    assert world.takes(_permits(segment), "k")
    return [os.stat(path).st_mode & 0o7777 for path in sorted(left_over(name))]


@pytest.mark.parametrize("mask", [0o077, 0, 0o777])
@pytest.mark.parametrize(("mode", "lock"), [(0o600, 0o600), (0o660, 0o660), (0o664, 0o660)])
def test_umask(segment_name: str, mask: int, mode: int, lock: int) -> None:
    """The mode is the given one. The lock file is for those who may write the segment."""
    assert world.in_child(_made_under, mask, segment_name, mode) == [mode, lock]


def _as(uid: int, groups: tuple[int, ...], task: Callable[..., Any], *arguments: Any) -> Any:
    world.become(uid, *groups)
    return task(*arguments)


def _use(name: str, allow: bool) -> tuple[str, int]:
    """What opening says; and how often it was admitted."""
    said = world.failure(Segment, name, capacity=100, mode=0o660, allow_other_owner=allow)
    if said:
        return said, 0
    segment = Segment(name, mode=0o660, allow_other_owner=allow)
    return "", sum(_limiter(segment).is_allowed("k") for _ in range(20))


def test_two_users_count_together(segment_name: str) -> None:
    said = [
        world.in_child(_as, uid, groups, _use, segment_name, allow)
        for uid, groups, allow in (
            (ANN, (GROUP,), False),
            (BOB, (BOB, GROUP), False),
            (BOB, (BOB, GROUP), True),
            (EVE, (EVE,), True),
            (ANN, (GROUP,), False),
        )
    ]
    assert said[0] == said[2] == ("", 20)
    assert said[1][0].startswith("SegmentOwnerError: ")
    assert f"it belongs to uid {ANN}, and you are uid {BOB}; use another name" in said[1][0]
    assert said[3][0].startswith("SegmentPermissionError: ")
    assert (
        f"it belongs to uid {ANN}, gid {GROUP}, with mode 0660, and you are uid {EVE}" in said[3][0]
    )
    assert said[4] == ("", 10)  # 50 in all


def _holder(uid: int, groups: tuple[int, ...], name: str) -> Callable[[], Any]:
    def hold() -> Any:
        world.become(uid, *groups)
        segment = Segment(name, capacity=100, mode=0o660, allow_other_owner=True)
        permits = _permits(segment)
        return [permit for _ in range(3) if (permit := permits.acquire("k"))]

    return hold


def _look(name: str) -> list[Any]:
    permits = _permits(Segment(name, allow_other_owner=True))
    return [permits.in_flight("k"), world.takes(permits, "k"), permits.segment.liveness_unknown]


@pytest.mark.parametrize("killed_first", ["ann", "bob"])
def test_permits_of_the_other_users_killed_process(segment_name: str, killed_first: str) -> None:
    """Whoever of the two makes the lock file, the other can ask by it."""
    users = {"ann": (ANN, (GROUP, ANN)), "bob": (BOB, (BOB, GROUP))}
    uid, groups = users[killed_first]
    # The segment is ann's; the first to join, who makes the lock file, is the one that is killed.
    world.in_child(_as, ANN, (GROUP,), _make, segment_name)
    other = users["bob" if killed_first == "ann" else "ann"]
    try:
        with world.forked(_holder(uid, groups, segment_name)) as holder:
            assert world.in_child(_as, *other, _look, segment_name) == [3, False, None]
            world.kill(holder)
            assert world.in_child(_as, *other, _look, segment_name) == [0, True, None]
    except AssertionError as error:
        if "Missing" in str(error):
            pytest.skip(str(error))
        raise
    lock = next(path for path in left_over(segment_name) if path.endswith(".lock"))
    assert os.stat(lock).st_gid == GROUP
    assert os.stat(lock).st_mode & 0o777 == 0o660


def _plants_a_lock_file(name: str) -> None:
    segment = open_for_reading(name, True)  # which tells what the lock file will be called
    lock = f"{segment.path}.{segment.geometry().instance:016x}.lock"
    os.umask(0)
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))


def _asks_by_it(name: str) -> list[Any]:
    segment = Segment(name, allow_other_owner=True)
    rates = sum(_limiter(segment).is_allowed("k") for _ in range(60))
    return [rates, world.failure(_permits(segment).acquire, "k"), segment.liveness_unknown]


@pytest.mark.parametrize("victim", [ANN, 0])
def test_a_lock_file_that_a_reader_made(segment_name: str, victim: int) -> None:
    """By its locks he said who lives, and kept everybody out of the process table."""
    world.in_child(_as, ANN, (ANN,), _make, segment_name, 0o644)
    world.in_child(_as, EVE, (EVE,), _plants_a_lock_file, segment_name)
    lock = next(path for path in left_over(segment_name) if path.endswith(".lock"))
    rates, permit, unknown = world.in_child(_as, victim, (victim,), _asks_by_it, segment_name)
    assert rates == 50
    assert permit.startswith("SegmentOwnerError") and lock in permit and lock in unknown
    assert (os.stat(lock).st_uid, os.stat(lock).st_mode & 0o777) == (EVE, 0o666)  # left alone
    os.unlink(lock)
    assert world.in_child(_as, ANN, (ANN,), _look, segment_name) == [0, True, None]


def _make(name: str, mode: int = 0o660) -> None:
    Segment(name, capacity=100, mode=mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_looks_first(segment_name: str) -> None:
    """An operator's command makes no lock file that the workers' user cannot open."""
    world.in_child(_as, ANN, (ANN,), _made_by_ann, segment_name)
    said = world.fast_shm("reset", "--name", segment_name, "--all", "--allow-other-owner")
    assert said.returncode == 0, said.stderr
    permits = _permits(Segment(segment_name, allow_other_owner=True))
    assert world.takes(permits, "k")
    for path in left_over(segment_name):
        assert (os.stat(path).st_uid, os.stat(path).st_gid) == (ANN, ANN), path
    assert world.in_child(_as, ANN, (ANN,), _look, segment_name) == [0, True, None]


def _made_by_ann(name: str) -> None:
    Segment(name, capacity=100)


def _may_not_write(name: str) -> list[str]:
    world.own_shm("size=1m,mode=0755")
    world.become(ANN, ANN)
    return [world.failure(Segment, name, capacity=10), world.failure(Segment, name, create=False)]


def test_a_directory_that_others_may_not_write() -> None:
    made, attached = world.in_child(_may_not_write, "s")
    assert made.startswith(f"SegmentPermissionError: cannot open segment {path_of('s')}: ")
    assert f"uid {ANN} may not make files in /dev/shm; it should have mode 1777" in made
    assert attached.startswith("SegmentNotFoundError: ")
