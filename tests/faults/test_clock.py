"""Clocks that step, stand still or belong to somebody else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
from support.children import PATIENCE
from support.names import left_over

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm._shared.native import ffi, lib

SECOND = 10**9
YEAR = 365 * 86400 * SECOND
END = 2**57 - 1  # where segment time saturates (csrc/limits/algorithms.h)
KINDS: list[Any] = [Window(5, 60), Limit(5, 60), SlidingWindow(5, 60)]


def _at(limiter: RateLimiter, now: int, times: int = 9) -> int:
    """How many of so many calls are admitted, all at this instant of segment time."""
    out, admitted = ffi.new("fshm_decision *"), 0
    for _ in range(times):
        lib.fshm_apply(limiter._handle, lib.FSHM_ACQUIRE, b"k", 1, ffi.NULL, 0, now, out)
        admitted += out.status == lib.FSHM_ALLOWED
    return admitted


@pytest.fixture(params=KINDS, ids=repr)
def limiter(request: pytest.FixtureRequest, segment: Segment) -> RateLimiter:
    return RateLimiter(request.param, name="t", segment=segment)


@pytest.mark.parametrize("back", [1, 30 * SECOND, 900 * SECOND, 999 * SECOND])
def test_stepped_back(limiter: RateLimiter, back: int) -> None:
    """An earlier instant sees the state that is there: nothing is admitted twice."""
    now = 1000 * SECOND
    assert _at(limiter, now) == 5
    assert _at(limiter, now - back) == 0
    assert _at(limiter, now) == 0
    # Not locked out either: as long after as if the clock had never stepped.
    assert _at(limiter, now + 120 * SECOND) == 5


def test_back_to_the_beginning_and_on(limiter: RateLimiter) -> None:
    """A clock that runs backwards in small steps, over several periods, admits one period's
    worth; a bucket one less, since what it had is drained later by such a clock."""
    admitted = sum(_at(limiter, now * SECOND, 1) for now in range(1000, 600, -1))
    assert admitted == 5 - isinstance(limiter.limits[0], Limit)


@pytest.mark.parametrize("years", [1, 3, 4])
def test_stepped_forward_by_years(limiter: RateLimiter, years: int) -> None:
    assert _at(limiter, SECOND) == 5
    assert _at(limiter, years * YEAR) == 5  # a whole period's, and no more
    assert _at(limiter, years * YEAR + 120 * SECOND) == 5
    # ... and back: denied until then, which is what the message of a stuck clock would have to say
    assert _at(limiter, 300 * SECOND) == 0


@pytest.mark.parametrize("now", [END - 1, END, 2**62, 2**64 - 1])
def test_saturated(limiter: RateLimiter, now: int) -> None:
    """After 4.5 years all is denied, and never the reverse; no call goes wrong."""
    assert _at(limiter, now) == 0
    assert _at(limiter, now) == 0
    assert _at(limiter, SECOND) == 5  # denials have consumed nothing


_USE = """
import sys
from fast_litellm_shm import RateLimiter, Segment, SegmentClockError, Window
try:
    limiter = RateLimiter(Window(5, 3600), name="t", segment=Segment(sys.argv[1], capacity=100))
    print(sum(limiter.is_allowed("k") for _ in range(9)))
except SegmentClockError as error:
    print(error)
"""


def _use_at(offset: int | None, name: str) -> str:
    command = [sys.executable, "-c", _USE, name]
    if offset is not None:
        command = ["unshare", "-T", "--boottime", str(offset), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def time_namespaces() -> None:
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, for a time namespace")
    trial = subprocess.run(
        ["unshare", "-T", "--boottime", "1000", "true"], capture_output=True, check=False
    )
    if trial.returncode:
        pytest.skip(f"no time namespace may be made here: {trial.stderr.decode().strip()}")


@pytest.mark.usefixtures("time_namespaces")
@pytest.mark.parametrize("offset", [0, 86400, 10**8])
def test_another_time_namespace(segment_name: str, offset: int) -> None:
    """Refused both ways, whatever the offset is."""
    assert _use_at(None, segment_name) == "5"
    refused = _use_at(offset, segment_name)
    assert "was made before the last boot or in another time namespace (time:[" in refused
    assert "and this process is in time:[" in refused and "fast-shm rm" in refused
    assert _use_at(None, segment_name) == "0"  # nothing happened to it


@pytest.mark.usefixtures("time_namespaces")
def test_made_in_another_time_namespace(segment_name: str) -> None:
    assert _use_at(10**8, segment_name) == "5"
    assert "in another time namespace (time:[" in _use_at(None, segment_name)
    Segment(f"{segment_name[:50]}-mine", capacity=10).remove()  # other names are not concerned
    assert len(left_over(segment_name)) == 2
