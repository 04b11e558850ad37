"""fast-shm rm --unused: what it removes, and what it keeps. In a /dev/shm of its own: it would
remove what other tests use."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support import world
from support.children import PATIENCE

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.segment import path_of
from fast_litellm_shm.cli import segments, unused

from .conftest import Command, environment

_USER = """
import sys
from fast_litellm_shm import RateLimiter, Segment, Window
segment = Segment(sys.argv[1], capacity=100)
if sys.argv[2] == "calls":
    RateLimiter(Window(9, 3600), name="t", segment=segment).acquire("k")
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _using(name: str, how: str) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", _USER, name, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        yield child.pid
        child.communicate(timeout=PATIENCE)


def _run(*arguments: str) -> tuple[int, str]:
    done = world.fast_shm("rm", "--unused", *arguments)
    return done.returncode, done.stdout + done.stderr


def _names() -> list[str]:
    return [each.name for each in segments.found()]


_YOUNG = """
import sys
from fast_litellm_shm.cli import main, unused
unused._YOUNG = 0.0
sys.exit(main(["rm", "--unused", *sys.argv[1:]]))
"""


def _old(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, to which all segments are old."""
    return subprocess.run(
        [sys.executable, "-c", _YOUNG, *arguments],
        **{"stdin": subprocess.DEVNULL, "capture_output": True, **options},
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment(),
    )


def _what_is_kept() -> list[Any]:
    world.own_shm("size=40m,mode=1777")
    for name in ("consumed", "empty"):
        with _using(name, "calls" if name == "consumed" else "nothing"):
            pass
    with open(path_of("damaged"), "wb") as file:
        file.write(b"not a segment" * 1000)
    other = path_of("older").replace(f".{lib.FSHM_LAYOUT_VERSION}.", ".1.")
    held = path_of("older-held").replace(f".{lib.FSHM_LAYOUT_VERSION}.", ".1.")
    for path in (other, held):
        with open(path, "wb") as file:
            file.write(b"of another release")
    os.mkdir(path_of("folder"))
    with _using("calls", "calls") as calls, _using("maps", "nothing") as maps:
        # The lock file of a segment of another release, which a process of that release holds.
        lock = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "import fcntl, sys\n"
                "file = open(sys.argv[1], 'wb')\n"
                "fcntl.lockf(file, fcntl.LOCK_EX, 1, 4100)\n"
                "print('ready', flush=True)\n"
                "sys.stdin.read()",
                f"{held}.0123456789abcdef.lock",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with lock:
            assert lock.stdout is not None and lock.stdout.readline() == b"ready\n"
            young = _run("--yes")
            refused = _old()
            before = _names()
            removed = _old("--yes")
            after = _names()
            lock.communicate(timeout=PATIENCE)
    again = _old("--yes")
    nothing = _old("--yes")
    told = [
        [each.returncode, each.stdout, each.stderr] for each in (refused, removed, again, nothing)
    ]
    return [calls, maps, young, told, before, after, _names(), os.listdir("/dev/shm")]


def _told(text: str) -> dict[str, str]:
    """By segment, what is said."""
    lines = [line.split(None, 1) for line in text.splitlines() if line.startswith("  ")]
    return {name: said for name, said in lines}


def test_what_is_kept_and_why() -> None:
    calls, maps, young, told, before, after, last, files = world.in_child(_what_is_kept)
    assert young[0] == 0 and "No segment in /dev/shm is unused." in young[1]
    assert "a process may be about to use it" in _told(young[1])["empty"]
    refused, removed, again, nothing = told
    assert refused[0] == 1 and "nothing removed: give --yes" in refused[2]
    everything = {"calls", "consumed", "damaged", "empty", "folder", "maps", "older", "older-held"}
    assert set(before) == everything
    said = _told(removed[1])
    assert said["calls"] == f"in use by 1 process (pid {calls})"
    assert said["maps"] == f"in use by 1 process (pid {maps})"
    assert said["folder"] == "no regular file: find out who made it"
    assert said["older-held"] == "in use: a process holds a lock on its lock file"
    assert "1 slot in use, made " in said["consumed"]
    assert "nothing in it counts, made " in said["empty"]
    assert ", damaged, made " in said["damaged"]
    assert ", layout 1, of another release, made " in said["older"]
    assert removed[0] == 0 and removed[1].endswith("Removed 4 segments.\n") and not removed[2]
    assert sorted(after) == ["calls", "folder", "maps", "older-held"]
    assert again[1].endswith("Removed 3 segments.\n")
    assert (nothing[0], last) == (0, ["folder"])
    assert "No segment in /dev/shm is unused." in nothing[1]
    assert [os.path.basename(path_of("folder"))] == files  # no lock file is left either


def _of_another_user() -> list[Any]:
    world.own_shm()
    segment = Segment("ours", capacity=10)
    os.chown(path_of("ours"), 12345, 12345)
    ours = _old("--yes")
    forced = _old("--yes", "--allow-other-owner")
    assert not segment.unlinked
    return [[each.returncode, each.stdout] for each in (ours, forced)]


def test_one_of_another_user() -> None:
    ours, forced = world.in_child(_of_another_user)
    assert _told(ours[1])["ours"] == (
        "it belongs to uid 12345: run as that user, or give --allow-other-owner"
    )
    # This process has it open.
    assert "in use by 1 process" in _told(forced[1])["ours"]


def _on_a_terminal(answer: bytes) -> list[Any]:
    world.own_shm()
    with _using("empty", "nothing"):
        pass
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    done = _old(stdin=theirs)
    return [done.returncode, done.stderr, _names()]


@pytest.mark.parametrize(
    ("answer", "status", "left"), [(b"n\n", 1, ["empty"]), (b"\n", 1, ["empty"]), (b"y\n", 0, [])]
)
def test_it_asks_on_a_terminal(answer: bytes, status: int, left: list[str]) -> None:
    returned, said, names = world.in_child(_on_a_terminal, answer)
    assert (returned, names) == (status, left)
    assert "Remove 1 segment? [y/N]" in said


def test_with_a_name(fast_shm: Command) -> None:
    done = fast_shm("rm", "--unused", "--name", "shop")
    assert done.returncode == 2 and "leave out --name" in done.stderr


def test_one_that_is_taken_while_a_person_reads(segment_name: str) -> None:
    """The second look keeps it."""
    segment = Segment(segment_name, capacity=10)
    (found,) = (each for each in segments.found() if each.name == segment_name)
    look = unused._look(found, segments.mapped_by(), False)
    assert look.kept == f"in use by 1 process (pid {os.getpid()})"
    assert not segment.unlinked
