"""What a process holds comes back when it dies, however it dies, and only then.

FAST_LITELLM_SHM_KILLS sets the number of kills at random moments (default 10,000, some 40 seconds),
FAST_LITELLM_SHM_STORM_SEED repeats them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings

import psutil
import pytest
from support.children import run_one
from support.permits import Holder, kill_at_random, wait_until_dead
from support.waiting import PATIENCE, comes_true

from fast_litellm_shm import ConcurrencyLimiter, Segment

KILLS = int(os.environ.get("FAST_LITELLM_SHM_KILLS", "10000"))
SEED = int(os.environ.get("FAST_LITELLM_SHM_STORM_SEED", str(time.time_ns() % 10**6)))
PROMISE = 1.0  # seconds until what a dead process held is back


def make(segment: Segment, most: int = 5) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name="held", segment=segment)


def holder(segment: Segment, count: int, most: int = 5) -> Holder:
    return Holder(segment.name, most, "k", count)


@pytest.mark.parametrize(
    ("how", "code"),
    [("os._exit", 7), ("segv", -signal.SIGSEGV), ("abort", -signal.SIGABRT)],
)
def test_it_ends_by_itself(segment: Segment, how: str, code: int) -> None:
    limiter = make(segment)
    with limiter.slot("k"), holder(segment, 4) as other:
        assert not limiter.acquire("k")
        other.order(how)
        assert other.join() == code
        assert limiter.in_flight("k") == 1
        permits = [limiter.acquire("k") for _ in range(5)]
        assert [bool(permit) for permit in permits] == [True] * 4 + [False]
        for permit in permits:
            permit.release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGBUS, signal.SIGABRT])
def test_it_is_killed(segment: Segment, number: signal.Signals) -> None:
    limiter = make(segment)
    with holder(segment, 5) as other:
        if number != signal.SIGKILL:
            assert not limiter.acquire("k")
        other.kill(number)
        other.join()
        with limiter.acquire("k") as permit:  # without looking first: the acquire itself looks
            assert permit
            assert limiter.in_flight("k") == 1


def test_back_within_a_second_100_of_100(segment: Segment) -> None:
    limiter, late = make(segment), []
    for i in range(100):
        with holder(segment, 5) as other:
            assert other.held == 5
            other.kill()
            other.join()  # how long a busy system takes to end a process is not ours
            if not comes_true(lambda: not limiter.in_flight("k"), PROMISE):
                late.append((i, other.pid, segment.processes(), segment.liveness_unknown))
    assert late == []


def test_a_waiter_looks_for_the_dead_itself(segment: Segment) -> None:
    limiter = make(segment)
    with holder(segment, 5) as other:
        threading.Timer(0.1, other.kill).start()
        with limiter.slot("k", timeout=PATIENCE):
            assert limiter.in_flight("k") == 1


def test_an_unreaped_zombie_holds_nothing(segment: Segment) -> None:
    limiter = make(segment)
    with holder(segment, 5) as other:
        other.kill()
        wait_until_dead(other.pid)
        assert limiter.in_flight("k") == 0
        assert other.pid not in [found["pid"] for found in segment.processes()]
        assert psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE  # nobody reaped it


def test_a_stopped_process_keeps_its_permits(segment: Segment) -> None:
    limiter = make(segment)
    with holder(segment, 4) as other:
        other.kill(signal.SIGSTOP)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert limiter.in_flight("k") == 4
            with limiter.acquire("k") as permit:
                assert permit
                assert not limiter.acquire("k")
            time.sleep(0.05)
        other.kill(signal.SIGCONT)
        assert other.ask("release") == 4
        assert limiter.in_flight("k") == 0


def test_a_stopped_process_that_is_killed(segment: Segment) -> None:
    limiter = make(segment)
    with holder(segment, 5) as other:
        other.kill(signal.SIGSTOP)
        assert limiter.in_flight("k") == 5
        other.kill()
        other.join()
        assert limiter.in_flight("k") == 0


IN_THREADS = """
import sys, threading
from fast_litellm_shm import ConcurrencyLimiter, Segment
limiter = ConcurrencyLimiter(5, name="held", segment=Segment(sys.argv[1]))
taken = threading.Barrier(6)
def hold():
    with limiter.slot("k"):
        taken.wait()
        if sys.argv[2] == "daemon":
            threading.Event().wait()
        elif sys.argv[2] == "kept":
            sys.stdin.read()
for _ in range(5):
    threading.Thread(target=hold, daemon=sys.argv[2] == "daemon").start()
taken.wait()
print(limiter.in_flight("k"), flush=True)
if sys.argv[2] != "kept":
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["daemon", "kept"])
def test_the_main_thread_ends_while_threads_hold(segment: Segment, kind: str) -> None:
    """Daemon threads are stopped where they are; others keep the process, and so the permits."""
    limiter = make(segment)
    command = [sys.executable, "-c", IN_THREADS, segment.name, kind]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "5\n"
            assert limiter.in_flight("k") == 5
            process.communicate(timeout=PATIENCE)
            assert process.returncode == 0
            assert limiter.in_flight("k") == 0
        finally:
            process.kill()


def test_a_thread_that_ends_does_not_end_its_process(segment: Segment) -> None:
    limiter, permits = make(segment), []
    thread = threading.Thread(target=lambda: permits.append(limiter.acquire("k")))
    thread.start()
    thread.join()
    assert run_one(_in_flight, segment.name, method="fork") == 1
    permits.pop().release()
    assert limiter.in_flight("k") == 0


def _in_flight(name: str) -> int:
    return make(Segment(name)).in_flight("k")


def test_fork_with_permits_held(segment: Segment) -> None:
    """They are the parent's: the child can neither free nor lose them."""
    limiter = make(segment, 3)
    with limiter.slot("k") as permit:
        dropped = [limiter.acquire("k")]
        pid = os.fork()
        if not pid:
            try:
                warnings.simplefilter("error")
                sys.unraisablehook = lambda _: os._exit(2)
                good = not permit.release() and not permit.release()
                dropped.clear()  # no warning in here: nothing was lost
                good &= limiter.in_flight("k") == 2
                mine = limiter.acquire("k")
                good &= bool(mine) and not limiter.acquire("k")
                os._exit(0 if good else 1)  # dies with one of its own
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert limiter.in_flight("k") == 2
        assert dropped.pop().release()
        assert permit.release()
        assert limiter.in_flight("k") == 0


def test_the_parent_dies_and_its_forked_child_lives(segment: Segment) -> None:
    """The child inherits descriptors and memory, but is not the owner."""
    limiter = make(segment)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            mine = limiter.acquire("k")
            child = os.fork()
            if not child:
                theirs = limiter.acquire("k")
                os.write(writing, f"{os.getpid()}\n".encode())
                while theirs:
                    time.sleep(PATIENCE)
            while mine:
                time.sleep(PATIENCE)
        finally:
            os._exit(1)
    child = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    assert limiter.in_flight("k") == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert limiter.in_flight("k") == 1
    os.kill(child, signal.SIGKILL)
    wait_until_dead(child)  # not ours to reap
    assert comes_true(lambda: not limiter.in_flight("k"), PROMISE)


def test_exec_ends_the_owner(segment: Segment) -> None:
    """The pid goes on as another program, which cannot know of the permits."""
    limiter = make(segment)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            permit = limiter.acquire("k")
            os.dup2(writing, 1)
            if permit:
                os.execvp("sh", ["sh", "-c", "echo; sleep 60"])
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"\n"
        assert psutil.pid_exists(pid)
        assert limiter.in_flight("k") == 0
    finally:
        os.close(reading)
        os.close(writing)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _namespace_command() -> list[str] | None:
    for extra in ([], ["--map-root-user"]):
        command = ["unshare", *extra, "--pid", "--fork", "--kill-child"]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return None


NAMESPACED = """
import os, sys
from fast_litellm_shm import ConcurrencyLimiter, Segment
limiter = ConcurrencyLimiter(5, name="held", segment=Segment(sys.argv[1]))
held = [limiter.acquire("k") for _ in range(2)]
print(os.getpid(), limiter.in_flight("k"), flush=True)
sys.stdin.readline()
print(limiter.in_flight("k"), flush=True)
sys.stdin.readline()
"""


def test_a_second_pid_namespace(segment: Segment) -> None:
    """Pids mean nothing between namespaces: both processes in there have pid 1."""
    unshare = _namespace_command()
    if unshare is None:
        pytest.skip("this user may not make pid namespaces (unshare --pid)")
    limiter, pipe = make(segment), subprocess.PIPE
    command = [*unshare, sys.executable, "-c", NAMESPACED, segment.name]
    begun = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        said = []
        for process in begun:
            assert process.stdout
            assert select.select([process.stdout], [], [], PATIENCE)[0]
            said.append(process.stdout.readline())
        # Who looks last sees all four; the other, what there was of them when it looked.
        assert sorted(said)[0] in ("1 2\n", "1 3\n", "1 4\n")
        assert sorted(said)[1] == "1 4\n"
        with limiter.acquire("k") as fifth:
            assert fifth
            assert not limiter.acquire("k")
            first, second = begun
            (within,) = psutil.Process(first.pid).children()
            first.kill()
            first.wait()
            wait_until_dead(within.pid)  # --kill-child reaches it a moment later
            assert comes_true(lambda: limiter.in_flight("k") == 3, PROMISE)
            assert second.stdin
            assert second.stdout
            second.stdin.write("\n")
            second.stdin.flush()
            assert second.stdout.readline() == "3\n"  # seen from in there too
    finally:
        for process in begun:
            process.kill()
            process.communicate()


def test_killed_at_random_moments(segment: Segment) -> None:
    patience = max(60.0, KILLS / 20)
    done, wrong = run_one(kill_at_random, segment.name, KILLS, SEED, patience=patience)
    assert wrong == [], f"seed {SEED}"
    assert done >= KILLS
    assert [found["pid"] for found in segment.processes() if found["pid"] != os.getpid()] == []
