"""Everything that can be wrong with a segment has an error of its own, which says what to do."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support.children import run_one
from support.names import left_over, remove

import fast_litellm_shm as fls
from fast_litellm_shm import Limit, RateLimiter, Segment, SegmentError, Window
from fast_litellm_shm._shared.native import ffi
from fast_litellm_shm._shared.segment import path_of

ROOT = os.geteuid() == 0
NOBODY = 65534
# Offsets in the header, csrc/core/layout.h.
MAGIC, VERSION, BYTE_ORDER, SIZE, CAPACITY = 0, 8, 12, 16, 24
BOOT, TIME_NAMESPACE, EPOCH = 184, 200, 208


def scribble(path: str, at: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))


def fails(name: str, kind: type[SegmentError], *says: str, capacity: int | None = None) -> None:
    """Opening fails with this kind, says all this, and changes nothing."""
    path = path_of(name)
    before = (os.lstat(path), Path(path).read_bytes() if os.path.isfile(path) else None)
    with pytest.raises(kind) as caught:
        Segment(name, capacity=capacity)
    assert type(caught.value) is kind
    for text in (path, *says):
        assert text in str(caught.value)
    after = (os.lstat(path), Path(path).read_bytes() if os.path.isfile(path) else None)
    assert (after[0].st_ino, after[0].st_mtime_ns, after[1]) == (
        before[0].st_ino,
        before[0].st_mtime_ns,
        before[1],
    )


@pytest.fixture
def unused(segment_name: str) -> str:
    """The name of a segment that no process has joined or has open."""
    Segment(segment_name, capacity=100)
    return segment_name


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (MAGIC, "=Q", 0),
        (MAGIC, "=Q", 2**64 - 1),
        (SIZE, "=Q", 4096),
        (CAPACITY, "=Q", 0),
        (CAPACITY, "=Q", 150),
        (CAPACITY, "=Q", 2**63),
        (32, "=Q", 2**60),
        (40, "=Q", 2**64 - 4096),
        (80, "=Q", 1),
        (96, "=I", 2**32 - 1),
        (100, "=I", 2**31),
    ],
)
def test_a_damaged_header(unused: str, at: int, form: str, value: int) -> None:
    scribble(path_of(unused), at, form, value)
    fails(unused, fls.SegmentDamagedError, "damaged", "fast-shm rm")


@pytest.mark.parametrize("size", [0, 1, 447, 448, 4096, 10_000])
def test_a_truncated_one(unused: str, size: int) -> None:
    os.truncate(path_of(unused), size)
    fails(unused, fls.SegmentDamagedError, f"size {size}", "fast-shm rm")


def test_one_that_grew(unused: str) -> None:
    os.truncate(path_of(unused), os.stat(path_of(unused)).st_size + 4096)
    fails(unused, fls.SegmentDamagedError, "fast-shm rm")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100_000, os.urandom(1 << 16)], ids=len)
def test_a_foreign_file(segment_name: str, content: bytes) -> None:
    Path(path_of(segment_name)).write_bytes(content)
    fails(segment_name, fls.SegmentDamagedError, "not a segment of this library", "fast-shm rm")


@pytest.mark.parametrize("version", [0, 1, 2**32 - 1])
def test_another_layout(unused: str, version: int) -> None:
    scribble(path_of(unused), VERSION, "=I", version)
    fails(unused, fls.SegmentLayoutError, f"layout version {version}", "use another name")


def test_another_byte_order(unused: str) -> None:
    scribble(path_of(unused), BYTE_ORDER, "=I", 0x04030201)
    fails(unused, fls.SegmentLayoutError, "byte order", "use another name")


@pytest.mark.parametrize("at", [BOOT, BOOT + 8, TIME_NAMESPACE])
def test_another_boot_or_time_namespace(unused: str, at: int) -> None:
    scribble(path_of(unused), at, "=Q", 12345)
    fails(
        unused,
        fls.SegmentClockError,
        "before the last boot or in another time namespace",
        "fast-shm rm",
    )


def test_an_epoch_to_come(unused: str) -> None:
    scribble(path_of(unused), EPOCH, "=Q", 2**62)
    fails(unused, fls.SegmentClockError, "fast-shm rm")


def test_another_capacity(unused: str) -> None:
    fails(
        unused,
        fls.SegmentCapacityError,
        "a capacity of 100 keys, and 101 was wanted",
        "set 100",
        capacity=101,
    )


def test_a_symbolic_link(segment_name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    Segment(segment_name, capacity=10)
    shutil.move(path_of(segment_name), target)
    os.symlink(target, path_of(segment_name))
    fails(segment_name, fls.SegmentLinkError, "symbolic link", "remove it")
    os.unlink(path_of(segment_name))
    os.symlink(tmp_path / "nowhere", path_of(segment_name))
    fails(segment_name, fls.SegmentLinkError, "symbolic link", "remove it")
    assert not (tmp_path / "nowhere").exists()


def test_a_directory(segment_name: str) -> None:
    os.mkdir(path_of(segment_name))
    try:
        with pytest.raises(SegmentError, match="remove it"):
            Segment(segment_name)
    finally:
        os.rmdir(path_of(segment_name))


def test_a_pipe(segment_name: str) -> None:
    os.mkfifo(path_of(segment_name))
    fails(segment_name, fls.SegmentLinkError, "not a regular file", "remove it")


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
def test_another_owner(unused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(path_of(unused), NOBODY, -1)
    fails(
        unused, fls.SegmentOwnerError, f"uid {NOBODY}, and you are uid 0", "FAST_LITELLM_SHM_NAME"
    )
    assert Segment(unused, allow_other_owner=True).stats()["capacity"] == 100
    monkeypatch.setenv("FAST_LITELLM_SHM_ALLOW_OTHER_OWNER", "true")
    copy = pickle.dumps(Segment(unused))
    with pytest.raises(fls.SegmentOwnerError):
        Segment(unused, allow_other_owner=False)
    monkeypatch.delenv("FAST_LITELLM_SHM_ALLOW_OTHER_OWNER")
    assert pickle.loads(copy).stats()["capacity"] == 100


def _as_nobody(name: str) -> str:
    os.setuid(NOBODY)
    try:
        Segment(name)
    except SegmentError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_no_permission(unused: str) -> None:
    said = run_one(_as_nobody, unused, method="fork")
    assert said.startswith("SegmentPermissionError: cannot open segment /")
    assert "run as the user that made it" in said
    assert "FAST_LITELLM_SHM_GROUP" in said


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_readable_for_all_and_still_another_owners(segment_name: str) -> None:
    os.chmod(Segment(segment_name, capacity=100).path, 0o666)
    said = run_one(_as_nobody, segment_name, method="fork")
    assert said.startswith("SegmentOwnerError: ")
    assert "allow_other_owner=True (FAST_LITELLM_SHM_ALLOW_OTHER_OWNER=true)" in said


FULL = """
import os, sys
from fast_litellm_shm import *
RateLimiter(Limit(5, 3600), name="before", segment=Segment("before", capacity=1)).acquire("k")
for attempt in range(3):
    try:
        Segment("after", capacity=100_000)
    except SegmentSpaceError as error:
        print(error)
limiter = RateLimiter(Limit(5, 3600), name="before", segment=Segment("before"))
print(limiter.peek("k").remaining)
filler = os.open("/dev/shm/filler", os.O_CREAT | os.O_WRONLY)
try:
    while True:  # to the last byte
        os.write(filler, b"x" * 4096)
except OSError:
    pass
print(sum(limiter.is_allowed("k") for _ in range(9)), sorted(os.listdir("/dev/shm"))[-1])
try:
    Segment("after", capacity=1)
except SegmentSpaceError as error:
    print(error)
"""


APART = ["unshare", "-m", "--propagation", "private", "sh", "-c"]


def test_a_full_file_system() -> None:
    """In a mount namespace of its own, where /dev/shm is 2 MiB."""
    inside = 'mount -t tmpfs -o size=2m none /dev/shm && exec "$0" -c "$1"'
    command = [*APART, inside, sys.executable, FULL]
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, to mount a small /dev/shm")
    trial = subprocess.run(
        [*APART, "mount -t tmpfs -o size=2m none /dev/shm"],
        check=False,
        capture_output=True,
        timeout=60,
    )
    if trial.returncode:
        pytest.skip(f"may not mount a small /dev/shm here: {trial.stderr.decode().strip()}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *said, remaining, allowed, last = done.stdout.splitlines()
    assert len(said) == 3
    for message in (*said, last):
        assert message.startswith(
            "cannot open segment /dev/shm/fast_litellm_shm.6.after: no space left"
        )
        assert "FAST_LITELLM_SHM_CAPACITY" in message
    assert remaining == "4"
    assert allowed == "4 filler"  # the worker went on


def test_a_failed_open_loses_nothing_of_a_running_one(segment: Segment) -> None:
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    limiter.acquire("k")
    for _ in range(50):
        with pytest.raises(fls.SegmentCapacityError):
            Segment(segment.name, capacity=1)
    assert limiter.acquire("k").remaining == 3
    assert [p["pid"] for p in segment.processes()] == [os.getpid()]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_failed_open_leaks_nothing(unused: str) -> None:
    scribble(path_of(unused), MAGIC, "=Q", 0)
    before = _descriptors()
    for _ in range(50):
        with pytest.raises(fls.SegmentDamagedError):
            Segment(unused)
    assert _descriptors() == before


def test_limits_that_were_written_over(segment: Segment) -> None:
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    geometry = segment.geometry()
    address = int(ffi.cast("uintptr_t", geometry.base)) + geometry.limiters_offset
    ctypes.memset(address + 128, 0xFF, 1664)  # all its sets of limits
    with pytest.raises(
        fls.SegmentDamagedError, match="limiter number 0 do not add up.*fast-shm rm"
    ):
        limiter.acquire("k")
    assert RateLimiter(Limit(5), name="u", segment=segment).acquire("k")


def test_every_error_is_a_segment_error() -> None:
    names = [name for name in fls.__all__ if name.startswith("Segment") and name.endswith("Error")]
    assert len(names) == 11
    for name in names:
        kind = getattr(fls, name)
        assert issubclass(kind, SegmentError)
        assert issubclass(kind, fls.FastShmError)
        assert kind.__doc__


def test_a_removed_name_is_free_again(unused: str) -> None:
    scribble(path_of(unused), MAGIC, "=Q", 0)
    remove(unused)
    assert left_over(unused) == []
    assert Segment(unused, capacity=5).stats()["capacity"] == 5
