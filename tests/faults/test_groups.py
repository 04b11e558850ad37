"""Users of a group who share a segment by one variable, FAST_LITELLM_SHM_GROUP."""

from __future__ import annotations

import contextlib
import grp  # loaded before the user changes, who may not be able to read it
import io
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import world
from support.names import left_over, remove

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window, cli
from fast_litellm_shm._shared.segment import path_of

# Each has a primary group of its own, as users have; GROUP is a second one of ann and bob.
# The segment is named after it, and other processes run these tests at the same time.
ANN, BOB, EVE, OTHER = 12361, 12362, 12363, 12371
GROUP = 1_000_000 + os.getpid()
GROUPS = {ANN: (ANN, GROUP), BOB: (BOB, OTHER, GROUP), EVE: (EVE,)}


@pytest.fixture(autouse=True)
def only_the_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NAME", "MODE", "ALLOW_OTHER_OWNER"):
        monkeypatch.delenv(f"FAST_LITELLM_SHM_{name}", raising=False)
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", str(GROUP))
    yield
    remove(f"gid{GROUP}")


def _as(uid: int, task: Callable[..., Any], *arguments: Any) -> Any:
    world.become(uid, *GROUPS[uid])
    return task(*arguments)


def _admitted() -> int:
    limiter = RateLimiter(Window(50, 3600), name="t")
    return sum(limiter.is_allowed("k") for _ in range(30))


def _file(path: str) -> tuple[int, int, str]:
    found = os.stat(path)
    return found.st_uid, found.st_gid, f"{stat.S_IMODE(found.st_mode):o}"


@pytest.mark.parametrize("first", [ANN, BOB])
def test_one_variable_is_enough(first: int) -> None:
    """No name, no mode, no acceptance of other owners: two users have 50 together."""
    second = BOB if first == ANN else ANN
    assert world.in_child(_as, first, _admitted) == 30
    assert world.in_child(_as, second, _admitted) == 20
    files = sorted(left_over(f"gid{GROUP}"))
    assert [_file(path) for path in files] == [(first, GROUP, "660")] * 2


def _command(*arguments: str) -> tuple[int, str]:
    """Its exit code, and what it prints. Not in a process of its own: another user may not be able
    to read the Python of the tests."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return cli.main(list(arguments)), out.getvalue()


def test_the_command_needs_no_more(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=10, group=os.getegid())
    RateLimiter(Window(50, 3600), name="t", segment=segment).acquire("k")
    assert _command("inspect", "--name", segment_name)[0] == 0  # loads what it needs
    assert world.in_child(_as, ANN, _admitted) == 30
    shown, text = world.in_child(_as, BOB, _command, "inspect")
    assert shown == 0 and "30 admitted" in text, text
    # /dev/shm is sticky: only its owner removes a segment.
    assert world.in_child(_as, ANN, _command, "release", "--dead")[0] == 0
    removed, why = world.in_child(_as, BOB, _command, "rm")
    assert removed == 1 and f"it belongs to uid {ANN}" in why, why


def _holder(uid: int) -> Callable[[], Any]:
    def hold() -> Any:
        world.become(uid, *GROUPS[uid])
        permits = ConcurrencyLimiter(3, name="p")
        return [permit for _ in range(3) if (permit := permits.acquire("k"))]

    return hold


def _look() -> list[Any]:
    permits = ConcurrencyLimiter(3, name="p")
    return [permits.in_flight("k"), world.takes(permits, "k"), permits.segment.liveness_unknown]


@pytest.mark.parametrize("killed", [ANN, BOB])
def test_permits_of_the_other_users_killed_process(killed: int) -> None:
    other = BOB if killed == ANN else ANN
    try:
        with world.forked(_holder(killed)) as holder:
            assert world.in_child(_as, other, _look) == [3, False, None]
            world.kill(holder)
            assert world.in_child(_as, other, _look) == [0, True, None]
    except AssertionError as error:
        if "Missing" in str(error):
            pytest.skip(str(error))
        raise


def _opened() -> str:
    return world.failure(Segment)


def test_who_is_no_member() -> None:
    """Neither makes it nor opens it, and reads what to do."""
    said = world.in_child(_as, EVE, _opened)
    assert said.startswith("SegmentPermissionError: cannot open segment ")
    assert f"uid {EVE} cannot give it to gid {GROUP} (Operation not permitted): add the" in said
    assert left_over(f"gid{GROUP}") == []
    world.in_child(_as, ANN, _admitted)
    said = world.in_child(_as, EVE, _opened)
    assert f"this process is no member of gid {GROUP}: add its user to the group" in said


def _without_the_variable(name: str) -> None:
    del os.environ["FAST_LITELLM_SHM_GROUP"]
    Segment(name, capacity=10)


def _named(name: str) -> str:
    os.environ["FAST_LITELLM_SHM_NAME"] = name
    return _opened()


def test_one_that_was_made_without_it(segment_name: str) -> None:
    world.in_child(_as, ANN, _without_the_variable, segment_name)
    said = world.in_child(_as, BOB, _named, segment_name)
    assert f"made without FAST_LITELLM_SHM_GROUP (gid {GROUP}): stop its workers" in said
    assert f"`fast-shm rm --name {segment_name}` as uid {ANN}" in said


def test_its_owner_is_told_too(segment_name: str, caplog: pytest.LogCaptureFixture) -> None:
    group = os.environ.pop("FAST_LITELLM_SHM_GROUP")
    Segment(segment_name, capacity=10)
    os.environ["FAST_LITELLM_SHM_GROUP"] = group
    for _ in range(2):
        Segment(segment_name)
    (record,) = caplog.records
    assert f"and it should be shared by gid {GROUP} (FAST_LITELLM_SHM_GROUP)" in record.getMessage()
    assert "with mode 0600, " in record.getMessage()


def _planted(name: str) -> None:
    os.umask(0)
    Segment(name, capacity=10, mode=0o664)


def test_another_users_segment_of_another_group_is_refused(
    segment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can take the name first. Only members can give it the group."""
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", str(EVE))
    world.in_child(_as, EVE, _planted, segment_name)
    os.chmod(path_of(segment_name), 0o666)
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", str(GROUP))
    said = world.in_child(_as, ANN, _named, segment_name)
    assert said.startswith("SegmentOwnerError: ") and f"it is not of gid {GROUP}" in said


def test_a_group_by_its_name(segment_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = grp.getgrall()[-1]
    segment = Segment(segment_name, capacity=10, group=group.gr_name)
    assert os.stat(segment.path).st_gid == group.gr_gid
    monkeypatch.delenv("FAST_LITELLM_SHM_GROUP")
    assert pickle.loads(pickle.dumps(segment)).path == segment.path


@pytest.mark.parametrize(
    ("given", "mode", "said"),
    [
        ("no-such-group", "", "GROUP: this host has no group 'no-such-group'; make it (groupadd)"),
        ("4294967295", "", "GROUP must be the name or the number of a group, not '4294967295'"),
        (str(GROUP), "0600", "the mode must let it read and write, as 0660 does, not 0600"),
        (str(GROUP), "0640", "the mode must let it read and write, as 0660 does, not 0640"),
    ],
    ids=["unknown", "number", "0600", "0640"],
)
def test_wrong_settings(
    monkeypatch: pytest.MonkeyPatch, segment_name: str, given: str, mode: str, said: str
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", given)
    monkeypatch.setenv("FAST_LITELLM_SHM_MODE", mode)
    assert said in world.failure(Segment, segment_name)
    if not mode:
        done = world.fast_shm("inspect")
        assert done.returncode == 2 and said in done.stderr
    assert left_over(segment_name) == []


@pytest.mark.parametrize("given", [True, 1.5, b"shop"])
def test_a_group_of_another_type(segment_name: str, given: Any) -> None:
    said = world.failure(Segment, segment_name, group=given)
    assert said == f"TypeError: group must be the name or the number of a group, not {given!r}"
