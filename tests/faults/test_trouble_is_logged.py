"""Workers that go on counting in a segment that was removed or damaged say so in their log, once
each, whatever they call: nobody else tells them."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.children import PATIENCE
from support.names import left_over
from support.waiting import wait_until

from fast_litellm_shm._shared.segment import path_of

_CALLS = {
    "acquire": "RateLimiter(Window(9, 60), name='a', segment=s).acquire('k')",
    "is_allowed": "RateLimiter(Window(9, 60), name='a', segment=s).is_allowed('k')",
    "permit": "ConcurrencyLimiter(9, name='b', segment=s).acquire('k').release()",
    "slot": "ConcurrencyLimiter(9, name='b', segment=s).slot('k').__enter__().release()",
    "quota": "Quota(rpm=9, name='c', segment=s).admit('k').release()",
    "budget": "Budget(9, per='day', name='d', segment=s).reserve('k', 1).release()",
    "pool": "SimpleConnectionPool('e', segment=s).get_connection('http://x')",
    "limits": "_storage().incr('k/9/1/minute', 60)",
}
# One object for all calls, as in a worker: what makes it is run once.
_WORKER = """
import logging, os, signal, sys, time
from fast_litellm_shm import *
from fast_litellm_shm import Budget, ConcurrencyLimiter, Quota, RateLimiter, Segment, Window

calls = 0


class Log(logging.Handler):
    def emit(self, record):
        line = f"{os.getpid()} LOG after {calls} calls: {record.getMessage()}\\n"
        os.write(2, line.encode())


logging.getLogger().addHandler(Log())
s = Segment(sys.argv[1], capacity=1000)


def _storage():
    from limits.storage import storage_from_string
    import fast_litellm_shm.integrations.limits
    return storage_from_string("shm://" + sys.argv[1])


made, call = sys.argv[2].split(").", 1)
limiter = eval(made + ")")
for _ in range(int(sys.argv[3])):
    os.fork()
eval("limiter." + call)
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
print(f"{os.getpid()} ready\\n", end="", flush=True)
while not ended:
    calls += 1
    eval("limiter." + call)
    time.sleep(float(sys.argv[4]))
"""


@contextmanager
def _workers(
    name: str, call: str, log: str, doubled: int = 0, pause: str = "0.001"
) -> Iterator[list[int]]:
    """2 ** doubled processes that call it again and again; their pids. What they log is in the file
    ``log`` at the end."""
    with open(log, "wb") as file:
        first = subprocess.Popen(
            [sys.executable, "-c", _WORKER, name, call, str(doubled), pause],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    assert first.stdout is not None
    pids: list[int] = []
    try:
        pids += [int(first.stdout.readline().split()[0]) for _ in range(2**doubled)]
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        first.stdout.read()  # until the last has ended
        first.stdout.close()
        first.wait(PATIENCE)


def _logged(log: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    with open(log) as file:
        for line in file:
            assert " LOG " in line, line
            pid, _, text = line.rstrip("\n").partition(" LOG ")
            found.setdefault(int(pid), []).append(text.partition(": ")[2])
    return found


def _removed(name: str) -> None:
    for path in left_over(name):  # as systemd-logind does
        os.unlink(path)


def _cut(name: str) -> None:
    with open(path_of(name), "r+b") as file:
        file.truncate(os.stat(path_of(name)).st_size + 4096)


def _written_over(name: str) -> None:
    with open(path_of(name), "r+b") as file:
        file.seek(64)
        file.write(b"x" * 8)


def _lock_file_removed(name: str) -> None:
    (lock,) = (path for path in left_over(name) if path != path_of(name))
    os.unlink(lock)


@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
def test_a_removed_segment(segment_name: str, tmp_path: pathlib.Path, call: str) -> None:
    """Without a restart, without another call of the library than those that a worker makes."""
    if "_storage" in call:
        pytest.importorskip("limits")
    log = str(tmp_path / "log")
    with _workers(segment_name, call, log) as (pid,):
        _removed(segment_name)
        wait_until("it is logged", lambda: _logged(log))
    assert _logged(log) == {
        pid: [
            f"segment {segment_name!r}: segment {path_of(segment_name)} was removed; restart the "
            "processes that are attached to it: they count apart from new ones"
        ]
    }


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_removed, "was removed; restart the processes"),
        (_cut, "segment '%s' was damaged: its file has "),
        (_written_over, "segment '%s' was damaged: its header was written over, at byte 64; stop"),
        (_lock_file_removed, ".lock was deleted, so it cannot tell who is alive; stop"),
    ],
    ids=["removed", "cut", "header", "lock-file"],
)
def test_each_worker_says_it_once(
    segment_name: str, tmp_path: pathlib.Path, harm: Callable[[str], None], said: str
) -> None:
    """Four forked workers of one parent; two looks later nothing has been added."""
    log = str(tmp_path / "log")
    if "%s" in said:
        said = said % segment_name
    with _workers(segment_name, _CALLS["acquire"], log, doubled=2) as pids:
        harm(segment_name)
        wait_until("each has logged it", lambda: _logged(log).keys() == set(pids))
        # A second harm is looked for by the same looks: where it is logged, another look is over.
        if harm is not _removed:
            _removed(segment_name)
            wait_until(
                "each has logged the removal too",
                lambda: all(len(lines) > 1 for lines in _logged(log).values()),
            )
    found = _logged(log)
    assert found.keys() == set(pids)
    for lines in found.values():
        assert said in lines[0]
        assert len(lines) == (1 if harm is _removed else 2), lines


@pytest.mark.parametrize("monitoring", [True, False])
def test_a_worker_with_few_calls(
    segment_name: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    monitoring: bool,
) -> None:
    """It is not waited until there are as many calls as a busy worker makes between two looks."""
    (tmp_path / "flags").write_text(json.dumps({"monitoring": {"enabled": monitoring}}))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(tmp_path / "flags"))
    log = str(tmp_path / "log")
    with _workers(segment_name, _CALLS["is_allowed"], log, pause="0.25") as pids:
        _removed(segment_name)
        wait_until("it is logged", lambda: _logged(log))
    assert _logged(log).keys() == set(pids)
    with open(log) as file:
        assert int(file.read().split()[3]) < 100
