"""Who counts as alive: not who dumps core; and who lives, whatever it did to its descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import world
from support.names import left_over
from support.waiting import TooSlow, wait_until

import fast_litellm_shm
from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm._shared.native import lib

GIGABYTE = 1 << 30
EVE = 12347
NEWPID = 0x20000000


def _lock_of(name: str) -> str:
    return next(path for path in left_over(name) if path.endswith(".lock"))


def _permits(name: str, n: int = 1, **options: Any) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(n, name="p", segment=Segment(name, capacity=100, **options))


def _holds(name: str, deed: Callable[[ConcurrencyLimiter], Any] = lambda _: True) -> Any:
    """A permit, held while the deed is done, and after it."""
    permits = _permits(name)
    permit = permits.acquire("k")
    return permit and [permits, permit, deed(permits)]


# Dead --------------------------------------------------------------------------------------------


def _will_dump(name: str, where: Path) -> Any:
    os.chdir(where)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    held = _holds(name, lambda of: lib.fshm_lead(of.segment._handle, 0) == 1)
    return held and [held, bytearray(os.urandom(4096)) * (GIGABYTE // 4096)]


def _dumps(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "CoreDumping:\t1" in Path(f"/proc/{pid}/status").read_text()
    return False


def test_who_dumps_core_is_dead(segment_name: str, tmp_path: Path) -> None:
    """Its permits come back, and another leads the host, while the kernel still writes."""
    permits = _permits(segment_name)
    with world.forked(lambda: _will_dump(segment_name, tmp_path)) as pid:
        assert not world.takes(permits, "k")
        os.kill(pid, signal.SIGQUIT)
        try:
            wait_until("it dumps core", lambda: _dumps(pid), seconds=10)
        except TooSlow as late:
            pytest.skip(f"no core file is written here: {late}")
        assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))
        leads = lib.fshm_lead(permits.segment._handle, 0)
        seen = [process["pid"] for process in permits.segment.processes()]
        assert _dumps(pid)  # the permit came, and it is still at it
    for core in tmp_path.iterdir():  # as far as it came
        core.unlink()
    assert leads == 1
    assert seen == [os.getpid()]


def _has_a_child(name: str) -> Any:
    held = _holds(name)
    child = os.fork()
    if not child:  # never calls the library
        os.closerange(3, 1024)  # the pipes, whose other ends wait for
        signal.pause()
        os._exit(0)
    return held and [*held, os.write(_tells[1], f"{child} ".encode())]


_tells: tuple[int, int]


def test_who_died_before_its_child_is_dead(segment_name: str) -> None:
    global _tells
    _tells = os.pipe()
    permits = _permits(segment_name)
    child = 0
    try:
        with world.forked(lambda: _has_a_child(segment_name)) as pid:
            child = int(os.read(_tells[0], 20))
            assert not world.takes(permits, "k")
            world.kill(pid)
            assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))
            os.kill(child, 0)  # the child lives on
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        for end in _tells:
            os.close(end)


def _replaced(name: str) -> None:
    held = _holds(name)
    if held:
        os.execv(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"])


def test_who_runs_another_program_is_dead(segment_name: str) -> None:
    """Its pid lives on."""
    permits = _permits(segment_name)
    pid = os.fork()
    if not pid:
        _replaced(segment_name)
        os._exit(1)
    try:
        wait_until("it has become another", lambda: b"pause" in _command(pid))
        assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        world.kill(pid)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


# Alive -------------------------------------------------------------------------------------------


def _reads_the_lock_file(permits: ConcurrencyLimiter) -> bool:
    return Path(_lock_of(permits.segment.name)).read_bytes() == b""


def _locks_the_lock_file(permits: ConcurrencyLimiter) -> bool:
    with open(_lock_of(permits.segment.name), "r+b") as file, contextlib.suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _closes_descriptors(permits: ConcurrencyLimiter) -> bool:
    """As daemonisers do. (All files: the pipes are this test's.)"""
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(number).st_mode):
                os.close(number)
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    return permits.segment.liveness_unknown is None and len(taken) == 20


def _looks(permits: ConcurrencyLimiter) -> bool:
    looking = Segment(permits.segment.name, _read_only=True)
    return len(looking.processes()) == 2  # and closes its handle


_copies: str


def _loads_a_second_copy(permits: ConcurrencyLimiter) -> Any:
    """Which takes and gives back permits, by a place of its own."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fast_litellm_shm"]:
        del sys.modules[name]
    sys.path.insert(0, _copies)
    copy = importlib.import_module("fast_litellm_shm")
    assert str(copy.__file__).startswith(_copies)
    segment = copy.Segment(permits.segment.name)
    others = copy.ConcurrencyLimiter(1, name="others", segment=segment)
    mine = ConcurrencyLimiter(1, name="others", segment=permits.segment)
    with others.acquire("k") as permit:
        assert permit
        assert not world.takes(mine, "k")
    assert world.takes(mine, "k")
    assert not copy.ConcurrencyLimiter(1, name="p", segment=segment).acquire("k")
    assert [process["pid"] for process in segment.processes()].count(os.getpid()) == 2
    return [others]


@pytest.mark.parametrize(
    "deed",
    [
        _reads_the_lock_file,
        _locks_the_lock_file,
        _closes_descriptors,
        _looks,
        _loads_a_second_copy,
    ],
)
def test_who_lives_keeps_its_permits(
    segment_name: str, tmp_path: Path, deed: Callable[[ConcurrencyLimiter], Any]
) -> None:
    global _copies
    _copies = str(tmp_path)
    if deed is _loads_a_second_copy:
        package = Path(fast_litellm_shm.__file__).parent
        shutil.copytree(package, tmp_path / package.name)
    permits = _permits(segment_name)
    assert world.takes(permits, "k")
    with world.forked(lambda: _holds(segment_name, deed)) as pid:
        assert not world.takes(permits, "k")
        assert permits.in_flight("k") == 1
        assert pid in {process["pid"] for process in permits.segment.processes()}
        assert not world.in_child(_takes_afresh, segment_name)  # a newcomer takes no place of its
        assert not world.takes(permits, "k")
        world.kill(pid)
        assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))


def _takes_afresh(name: str) -> bool:
    return world.takes(_permits(name), "k")


# Readers -----------------------------------------------------------------------------------------


def _reader_locks_all(name: str) -> list[Any]:
    world.become(EVE, EVE)
    try:
        kept = open(_lock_of(name), "rb")  # noqa: SIM115 (locked until its end)
        fcntl.lockf(kept, fcntl.LOCK_SH)
    except PermissionError:
        return ["refused"]
    return [kept]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_reader_keeps_nobody_out(segment_name: str) -> None:
    """Whoever may read the segment, and not write it, can lock nothing for reading."""
    permits = _permits(segment_name, mode=0o644)
    assert world.takes(permits, "k")
    with world.forked(lambda: _reader_locks_all(segment_name)):
        assert world.in_child(_takes_afresh, segment_name)
        with world.forked(lambda: _holds(segment_name)) as pid:
            assert not world.takes(permits, "k")
            world.kill(pid)
            assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))
    assert os.stat(_lock_of(segment_name)).st_mode & 0o777 == 0o600


def _reader_sees(name: str) -> tuple[list[int], str | None]:
    world.become(EVE, EVE)
    segment = Segment(name, allow_other_owner=True, _read_only=True)
    return [process["pid"] for process in segment.processes()], segment.liveness_unknown


def test_a_reader_sees_who_lives(segment_name: str) -> None:
    """By /proc, since it may not ask for locks."""
    with world.forked(lambda: _holds_for_all(segment_name)) as pid:
        assert world.in_child(_reader_sees, segment_name) == ([pid], None)
        world.kill(pid)
        assert world.in_child(_reader_sees, segment_name) == ([], None)


def _holds_for_all(name: str) -> Any:
    permits = _permits(name, mode=0o644)
    return permits.acquire("k") and permits


# Pid namespaces ----------------------------------------------------------------------------------


def _in_pid_namespace(task: Callable[..., Any], *arguments: Any) -> Any:
    """As pid 1 of a new one."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEWPID):
        raise world.Missing(f"a pid namespace: {os.strerror(ctypes.get_errno())}")
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.write(done, json.dumps(task(*arguments)).encode())
        os._exit(0)
    os.close(done)
    with open(ready, "rb") as end:
        said = end.read()
    os.waitpid(pid, 0)
    return json.loads(said)


def _lives_and_dies(name: str) -> int:
    assert RateLimiter(Window(5, 60), name="t", segment=Segment(name, capacity=100)).acquire("k")
    return os.getpid()


def _sees(name: str) -> list[int]:
    return [os.getpid(), len(Segment(name, _read_only=True).processes())]


def test_a_dead_process_with_our_pid(segment_name: str) -> None:
    """Of another pid namespace: a reader does not take it for itself."""
    assert world.in_child(_in_pid_namespace, _lives_and_dies, segment_name) == 1
    assert world.in_child(_in_pid_namespace, _sees, segment_name) == [1, 0]


def _lives(name: str, ready: int, done: int) -> int:
    permits = _permits(name)
    with permits.acquire("k"):
        os.write(ready, b"!")
        os.read(done, 1)
    return os.getpid()


def test_a_process_of_another_pid_namespace(segment_name: str) -> None:
    """It keeps its permit; and whoever inspects is told what cannot be seen of it."""
    permits = _permits(segment_name)
    (hears, ready), (done, ends) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ends)
        os.close(hears)
        with contextlib.suppress(BaseException):
            _in_pid_namespace(_lives, segment_name, ready, done)
        os._exit(0)
    os.close(ready)
    try:
        if not os.read(hears, 1):
            pytest.skip("a pid namespace is not to be had here")
        assert permits.in_flight("k") == 1
        said = world.fast_shm("inspect", "--name", segment_name).stdout
        assert "it cannot be seen here whether they dump core" in " ".join(said.split())
        assert "as they have them: 1)" in " ".join(said.split())
    finally:
        for end in (hears, done, ends):
            os.close(end)
        os.waitpid(pid, 0)
    assert permits.in_flight("k") == 0
    said = world.fast_shm("inspect", "--name", segment_name).stdout
    assert "dump core" not in said


# Users -------------------------------------------------------------------------------------------


def _drops_its_rights(name: str) -> Any:
    """As a worker of gunicorn's whose master, root, has loaded the application."""
    world.become(EVE, EVE)
    return _holds_by(_preloaded)


_preloaded: ConcurrencyLimiter


def _holds_by(permits: ConcurrencyLimiter) -> Any:
    permit = permits.acquire("k")
    return permit and [permit, permits.segment.liveness_unknown is None]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_worker_that_may_not_open_the_lock_file(segment_name: str) -> None:
    """It has it from its parent."""
    global _preloaded
    permits = _preloaded = _permits(segment_name)
    assert world.takes(permits, "k")
    with world.forked(lambda: _drops_its_rights(segment_name)) as pid:
        assert permits.in_flight("k") == 1
        assert not world.takes(permits, "k")
        world.kill(pid)
        assert wait_until("its permit comes back", lambda: world.takes(permits, "k"))


# What is lost ------------------------------------------------------------------------------------


def test_what_is_lost_is_logged(segment_name: str, caplog: pytest.LogCaptureFixture) -> None:
    segment = Segment(segment_name, capacity=100)
    assert world.takes(ConcurrencyLimiter(1, name="p", segment=segment), "k")
    os.unlink(_lock_of(segment_name))
    said = [segment.liveness_unknown for _ in range(3)]
    assert said[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"segment {segment_name!r}: {said[0]}"
    ]
