"""What else may lie at a segment's name and at its lock file's, and what becomes of both in use."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from support import world
from support.names import left_over

from fast_litellm_shm import (
    ConcurrencyLimiter,
    RateLimiter,
    Segment,
    SegmentDamagedError,
    SegmentLinkError,
    Window,
)
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.segment import path_of

ROOT = os.geteuid() == 0


def _lock_of(segment: Segment) -> str:
    return f"{segment.path}.{segment.geometry().instance:016x}.lock"


def _limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(5, 3600), name="t", segment=segment)


# At the segment's name ---------------------------------------------------------------------------


def _make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def _make_device(path: str) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


@pytest.mark.parametrize("make", [_make_socket, _make_device, os.mkfifo, os.mkdir])
@pytest.mark.parametrize("create", [True, False])
def test_not_a_file(segment_name: str, make: Any, create: bool) -> None:
    if make is _make_device and not ROOT:
        pytest.skip("only root can make a device")
    path = path_of(segment_name)
    make(path)
    try:
        with pytest.raises(SegmentLinkError, match="not a regular file; find out who made it") as e:
            Segment(segment_name, create=create)
        assert path in str(e.value)
        said = world.fast_shm("inspect", "--name", segment_name)
        assert said.returncode == 1 and "not a regular file" in said.stderr
        assert " link" in world.fast_shm("ls").stdout
    finally:
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


def test_another_layout_beside(segment_name: str) -> None:
    """A release with another layout has a file of its own for the same name: both go on."""
    limiter = _limiter(Segment(segment_name, capacity=100))
    old = path_of(segment_name).replace(
        f"fast_litellm_shm.{lib.FSHM_LAYOUT_VERSION}.", "fast_litellm_shm.0."
    )
    Path(old).write_bytes(b"an older layout")
    try:
        assert limiter.is_allowed("k")
        assert Segment(segment_name).stats()["admitted"] == 1
        listed = world.fast_shm("ls")
        assert "layout-0" in listed.stdout and "another release of this library" in listed.stdout
        limiter.segment.remove()
        assert Path(old).read_bytes() == b"an older layout"
    finally:
        os.unlink(old)


def _make(name: str) -> None:
    Segment(name, capacity=100)


def test_a_lease_on_the_segment(segment_name: str) -> None:
    """A neighbour's, who is asked to give it up: nobody waits for that, and it is said."""
    world.in_child(_make, segment_name)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(path_of(segment_name), "rb+") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            said = world.failure(Segment, segment_name, create=False)
            assert said.startswith("SegmentError: ") and "has a lease on it" in said
    finally:
        signal.signal(signal.SIGIO, before)
    assert _limiter(Segment(segment_name, create=False)).is_allowed("k")


# At the lock file's name -------------------------------------------------------------------------


def _plant_link(path: str) -> None:
    os.symlink("/dev/shm/nowhere", path)


def _plant_hard_link(path: str) -> None:
    Path(f"{path}.victim").write_bytes(b"")
    os.chmod(f"{path}.victim", 0o640)
    os.link(f"{path}.victim", path)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (_plant_link, "is a symbolic link, which is never followed"),
        (os.mkdir, "cannot be opened: Is a directory"),
        (os.mkfifo, "cannot tell who is alive|is not the one"),
        (_plant_hard_link, "cannot tell who is alive|is not the one"),
    ],
)
def test_planted_at_the_lock_files_name(segment: Segment, plant: Any, says: str) -> None:
    lock = _lock_of(segment)
    plant(lock)
    try:
        limiter = _limiter(segment)
        assert sum(limiter.is_allowed("k") for _ in range(9)) == 5  # never uncounted, never alone
        permits = ConcurrencyLimiter(2, name="p", segment=segment)
        said = world.failure(permits.acquire, "k")
        assert "no permit can be owned by this process: its lock file " + lock in said
        with pytest.raises(Exception, match=says):
            permits.acquire("k")
        assert segment.liveness_unknown and lock in segment.liveness_unknown
        assert not os.path.exists("/dev/shm/nowhere")
        if plant is _plant_hard_link:
            assert os.stat(lock).st_mode & 0o777 == 0o640  # somebody else's file is left alone
    finally:
        os.rmdir(lock) if plant is os.mkdir else os.unlink(lock)
        Path(f"{lock}.victim").unlink(missing_ok=True)
    assert world.takes(permits, "k")
    assert segment.liveness_unknown is None


def test_a_lock_file_whose_maker_was_killed(segment: Segment) -> None:
    Path(_lock_of(segment)).touch()
    os.chmod(_lock_of(segment), 0)
    if not ROOT:
        os.chmod(_lock_of(segment), 0o600)
    assert world.takes(ConcurrencyLimiter(1, name="p", segment=segment), "k")
    assert os.stat(_lock_of(segment)).st_mode & 0o777 == 0o600
    assert segment.liveness_unknown is None


def _newcomer(name: str) -> dict[str, Any]:
    """In a process that has inherited nothing."""
    segment = Segment(name)
    permits = ConcurrencyLimiter(2, name="p", segment=segment)
    return {
        "rates": sum(_limiter(segment).is_allowed("k") for _ in range(9)),
        "permit": world.failure(permits.acquire, "k"),
        "seen": permits.in_flight("k"),
        "unknown": segment.liveness_unknown,
        "reaped": world.fast_shm("release", "--name", name, "--dead"),
        "inspect": world.fast_shm("inspect", "--name", name),
    }


@pytest.mark.parametrize("remade", [False, True])
def test_lock_file_deleted_in_use(segment_name: str, remade: bool) -> None:
    """Nobody who lives is taken for dead: their permits stay theirs, whoever comes."""

    def hold() -> Any:
        segment = Segment(segment_name, capacity=100)
        assert _limiter(segment).is_allowed("k")
        permits = ConcurrencyLimiter(2, name="p", segment=segment)
        return [permits.acquire("k"), permits.acquire("k")]

    with world.forked(hold):
        (lock,) = (path for path in left_over(segment_name) if path.endswith(".lock"))
        os.unlink(lock)
        if remade:
            Path(lock).touch()
        found = world.in_child(_newcomer, segment_name)
        assert os.path.exists(lock) == remade  # not made anew by us
    assert found["rates"] == 4
    assert found["seen"] == 2  # still held
    assert found["permit"].startswith("SegmentDamagedError: limiter 'p' in segment ")
    assert lock in found["permit"]
    for said in (
        found["permit"],
        found["unknown"],
        found["reaped"].stderr,
        found["inspect"].stdout,
    ):
        assert ("is not the one" if remade else "was deleted") in said
        assert f"fast-shm rm --name {segment_name}" in said
    assert found["reaped"].returncode == 1
    assert "Dead processes are listed as alive here" in found["inspect"].stdout
    # What the message says to do does help.
    assert world.fast_shm("rm", "--name", segment_name, "--yes").returncode == 0
    assert left_over(segment_name) == []
    assert world.takes(ConcurrencyLimiter(2, name="p", segment=Segment(segment_name)), "k")


def test_members_of_a_deleted_lock_file_go_on(segment: Segment) -> None:
    """With one member that has it open: the member and its forks go on, and tell the dead."""
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    assert world.takes(permits, "other")
    os.unlink(_lock_of(segment))
    with world.forked(lambda: permits.acquire("k")) as holder:
        assert not world.takes(permits, "k")
        world.kill(holder)
    assert world.takes(permits, "k")
    assert "was deleted" in (segment.liveness_unknown or "")


# In use ------------------------------------------------------------------------------------------


def test_unlinked_in_use(segment: Segment) -> None:
    limiter = _limiter(segment)
    assert limiter.is_allowed("k")
    os.unlink(segment.path)
    assert segment.unlinked and segment.stats()["unlinked"]
    assert "was removed; restart" in (segment.liveness_unknown or "")
    assert sum(limiter.is_allowed("k") for _ in range(9)) == 4
    os.symlink("/dev/null", segment.path)  # whatever lies there now, it is not this one
    assert segment.unlinked
    os.unlink(segment.path)
    said = world.fast_shm("rm", "--name", segment.name)
    assert "removed 1 left-over file of" in said.stdout  # its lock file


def _permit_after_removal(name: str) -> tuple[str, str, bool]:
    segment = Segment(name, capacity=100)
    segment.remove()
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    kept = _limiter(segment)
    return world.failure(permits.acquire, "k"), segment.path, kept.is_allowed("k")


def test_a_permit_in_a_removed_segment(segment_name: str) -> None:
    said, path, counted = world.in_child(_permit_after_removal, segment_name)
    assert said.startswith("SegmentNotFoundError: limiter 'p'")
    assert f"segment {path} was removed; restart the processes that are attached" in said
    assert counted


def _touch_after_truncation(name: str) -> None:
    segment = Segment(name)
    limiter = _limiter(segment)
    limiter.is_allowed("k")
    os.truncate(segment.path, 0)
    limiter.is_allowed("k")


def test_truncated_in_use(segment: Segment) -> None:
    """The one thing that ends a process (DESIGN.md, "Hostile contents"); others are refused."""
    pid = os.fork()
    if not pid:
        _touch_after_truncation(segment.name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -7  # SIGBUS
    kept, size = segment.name, os.stat(segment.path).st_size
    assert size == 0
    del segment
    with pytest.raises(SegmentDamagedError, match="size 0, expected"):
        Segment(kept)
    assert "damaged" in world.fast_shm("inspect", "--name", kept).stderr
    assert world.fast_shm("rm", "--name", kept, "--yes").returncode == 0
