"""fast-shm inspect, from outside."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios

import pytest
from support.children import PATIENCE

from fast_litellm_shm import ConcurrencyLimiter, Limit, RateLimiter, Segment
from fast_litellm_shm._shared.segment import path_of

from .conftest import COMMAND, Command, environment

NEVER = rb"(?!)"  # matches nothing
NASTY: list[str | bytes] = [
    "[red]x[/red]",
    "two\nlines",
    "\x1b[2Jclear",
    ":smile: 🎉",
    b"\xff\xferaw",
    "",
    "nul\0",
    "\u202eevil",
    "back\\slash",
    "x" * 300,
]


def _column(output: str, title: str) -> list[str]:
    """The first column of the table with this title."""
    lines = output.split(title, 1)[1].split("\n\n", 1)[0].splitlines()
    return [line.split()[0] for line in lines[3:] if line]


def test_table(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    done = fast_shm("inspect", "--name", segment_name)
    assert (done.returncode, done.stderr) == (0, "")
    assert path_of(segment_name) in done.stdout
    assert "8 of a capacity of 1,000" in done.stdout  # four keys under two limits
    assert sorted(_column(done.stdout, "Processes (3)")) == sorted(str(pid) for pid in workers)
    assert "10/3600s + 500/3600s window" in done.stdout
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("busy"))
    assert row[1:5] == ["chat", "10", "8", "0"]
    assert "WARNING" not in done.stdout
    assert "Permits" not in done.stdout and "Pools" not in done.stdout  # nothing is held


def test_pipe_has_no_colours_and_full_rows(
    fast_shm: Command, segment: Segment, segment_name: str
) -> None:
    limiter = RateLimiter(Limit(5), name="n" * 90, segment=segment)
    limiter.acquire("k" * 190)
    done = fast_shm(
        "inspect", "--name", segment_name, env=environment(FORCE_COLOR="1", COLUMNS="80")
    )
    assert "\x1b" not in done.stdout
    assert any("k" * 190 in line and "n" * 90 in line for line in done.stdout.splitlines())


def test_json(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    done = fast_shm("inspect", "--name", segment_name, "--json")
    found = json.loads(done.stdout)
    held = {"permits", "pools", "waiting"}
    assert set(found) == {"segment", "limiters", "keys", "processes", *held}
    assert all(found[name] == [] for name in held)
    assert found["segment"]["name"] == segment_name
    assert found["limiters"][0]["name"] == "chat"
    assert {process["pid"] for process in found["processes"]} == set(workers)
    assert all("python" in process["command"] for process in found["processes"])
    keys = {row["key"]: row for row in found["keys"]}
    assert set(keys) == {"busy", "user-0", "user-1", "user-2"}
    busy = keys["busy"]
    assert (busy["limiter"], busy["admitted"], busy["denied"]) == ("chat", 10, 8)
    assert busy["remaining"] == 0 and 0 < busy["retry_after"] <= 360
    assert keys["user-0"]["remaining"] == 9 and keys["user-0"]["retry_after"] == 0


def test_top_sort_match_limiter(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    def keys(*options: str) -> list[str]:
        done = fast_shm("inspect", "--name", segment_name, "--json", *options)
        return [row["key"] for row in json.loads(done.stdout)["keys"]]

    assert keys("--top", "1") == ["busy"]
    assert keys("--top", "1", "--sort", "denied") == ["busy"]
    assert keys("--sort", "key") == ["busy", "user-0", "user-1", "user-2"]
    assert keys("--sort", "key", "--match", "user-[01]") == ["user-0", "user-1"]
    assert len(keys("--top", "0")) == 4
    assert len(keys("--limiter", "chat")) == 4
    done = fast_shm("inspect", "--name", segment_name, "--limiter", "cat")
    assert done.returncode == 1 and "'chat'" in done.stderr


def test_table_shows_twenty_keys(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    RateLimiter(Limit(5), name="many", segment=segment).acquire_many([f"k{i}" for i in range(50)])
    assert len(_column(fast_shm("inspect", "--name", segment_name).stdout, "Keys (50")) == 20
    all_of_them = fast_shm("inspect", "--name", segment_name, "--top", "0").stdout
    assert len(_column(all_of_them, "Keys (50")) == 50


def test_no_segment(fast_shm: Command, segment_name: str) -> None:
    for option in ([], ["--json"], ["--watch"]):
        done = fast_shm("inspect", "--name", segment_name, *option)
        assert (done.returncode, done.stdout) == (3, "")
        assert path_of(segment_name) in done.stderr and "fast-shm ls" in done.stderr
        assert "Traceback" not in done.stderr
    assert not os.path.exists(path_of(segment_name))


def test_default_name_is_the_workers(fast_shm: Command) -> None:
    Segment.default()
    done = fast_shm("inspect", "--json")
    assert json.loads(done.stdout)["segment"]["name"] == os.environ["FAST_LITELLM_SHM_NAME"]


def test_environment_does_not_matter(
    fast_shm: Command, segment: Segment, segment_name: str
) -> None:
    wrong = environment(FAST_LITELLM_SHM_CAPACITY="77", FAST_LITELLM_SHM_MODE="nonsense")
    assert fast_shm("inspect", "--name", segment_name, env=wrong).returncode == 0
    assert segment.geometry().capacity == 1000


def test_disturbs_nothing(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    RateLimiter(Limit(5), name="quiet", segment=segment).acquire("k")
    with open(path_of(segment_name), "rb") as file:
        before = file.read()
        fast_shm("inspect", "--name", segment_name)
        fast_shm("inspect", "--name", segment_name, "--json")
        fast_shm("ls")
        file.seek(0)
        assert file.read() == before


def test_warns_from_80_percent(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    limiter = RateLimiter(Limit(5, per=3600), name="full", segment=segment)
    limiter.acquire_many([f"k{i}" for i in range(790)])
    assert "WARNING" not in fast_shm("inspect", "--name", segment_name).stdout
    limiter.acquire_many([f"k{i}" for i in range(790, 810)])
    shown = fast_shm("inspect", "--name", segment_name).stdout
    assert "WARNING  81% of the capacity" in shown
    assert "FAST_LITELLM_SHM_CAPACITY=2000" in shown


def test_bad_name(fast_shm: Command) -> None:
    done = fast_shm("inspect", "--name", "a/b")
    assert done.returncode == 2 and "'a/b'" in done.stderr and "Traceback" not in done.stderr


def test_nasty_keys(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    limiter = RateLimiter(Limit(5), name="[bold]odd\x1b[31m", segment=segment)
    for key in NASTY:
        limiter.acquire(key)
    shown = fast_shm("inspect", "--name", segment_name, "--sort", "key").stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)
    table = shown.split("Keys (", 1)[1].splitlines()
    assert len([line for line in table if "[bold]odd\\x1b[31m" in line]) == len(NASTY)
    for text in (
        "[red]x[/red]",
        "two\\nlines",
        "\\x1b[2Jclear",
        ":smile: 🎉",
        "\\xff\\xferaw",
        "''",
        "nul\\x00",
        "\\u202eevil",
        "back\\\\slash",
        "x" * 200 + "…",
    ):
        assert any(line.startswith(text + " ") for line in table), text
    rows = json.loads(fast_shm("inspect", "--name", segment_name, "--json").stdout)["keys"]
    keys = {row["key"] for row in rows}
    assert {key for key in NASTY if isinstance(key, str) and len(key) < 200} <= keys
    assert [row["key_hex"] for row in rows if "key_hex" in row] == [b"\xff\xferaw".hex()]


def test_ascii_output(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    RateLimiter(Limit(5), name="ascii", segment=segment).acquire("🎉")
    done = fast_shm("inspect", "--name", segment_name, env=environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and "\\U0001f389" in done.stdout


def test_many_keys(fast_shm: Command, segment_name: str) -> None:
    limiter = RateLimiter(
        Limit(5, per=3600), name="many", segment=Segment(segment_name, capacity=150_000)
    )
    limiter.acquire_many([f"user-{i}" for i in range(100_001)])
    found = json.loads(fast_shm("inspect", "--name", segment_name, "--json").stdout)
    assert len(found["keys"]) == 100_001
    assert sum(row["admitted"] for row in found["keys"]) == 100_001


def test_reader_that_leaves_early(segment: Segment, segment_name: str) -> None:
    limiter = RateLimiter(Limit(5, per=3600), name="many", segment=segment)
    limiter.acquire_many([f"{'user' * 40}-{i}" for i in range(900)])  # more than a pipe holds
    for options in (["--json"], ["--top", "0"]):
        child = subprocess.Popen(
            [*COMMAND, "inspect", "--name", segment_name, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        assert child.stdout is not None and child.stdout.read(1)
        child.stdout.close()
        assert child.stderr is not None and child.stderr.read() == b""
        assert child.wait(PATIENCE) == 0
        child.stderr.close()


def test_full_disk_behind_stdout(segment: Segment, segment_name: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "inspect", "--name", segment_name],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"space" in done.stderr


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_watch_in_a_pipe(segment: Segment, segment_name: str, option: list[str]) -> None:
    limiter = RateLimiter(Limit(5), name="watched", segment=segment)
    child = subprocess.Popen(
        [*COMMAND, "inspect", "--name", segment_name, "--watch", "0.1", *option],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    frames, later = 0, False
    for line in child.stdout:
        frames += path_of(segment_name) in line
        later |= "later" in line
        if frames == 1:
            limiter.acquire("later")
        if frames > 1 and later:
            child.send_signal(signal.SIGINT)
            break
    _, errors = child.communicate(timeout=PATIENCE)
    assert (child.returncode, errors, later) == (0, "", True)


def test_watch_sees_the_removal(segment: Segment, segment_name: str) -> None:
    child = subprocess.Popen(
        [*COMMAND, "inspect", "--name", segment_name, "--watch", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    assert segment_name in child.stdout.readline()
    segment.remove()
    assert any("this segment was removed" in line for line in child.stdout)
    made_again = Segment(segment_name, capacity=500)
    assert any("0 of a capacity of 500" in line for line in child.stdout)
    made_again.remove()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 0


def _on_a_terminal(
    arguments: list[str], until: bytes, columns: int = 80, **variables: str
) -> tuple[bytes, int]:
    """Run it on a terminal, interrupt it when ``until`` has been seen, and return what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm-256color", **variables),
    )
    os.close(theirs)
    seen, sent = b"", False
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
            if not sent and re.search(until, seen, re.DOTALL):
                child.send_signal(signal.SIGINT)
                sent = True
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    return seen, child.wait(PATIENCE)


def test_terminal_has_colours(segment: Segment, segment_name: str) -> None:
    RateLimiter(Limit(1, per=3600), name="once", segment=segment).acquire("k")
    seen, status = _on_a_terminal(["inspect", "--name", segment_name], NEVER)
    assert status == 0 and b"\x1b[31m" in seen  # the key that has to wait
    seen, status = _on_a_terminal(["inspect", "--name", segment_name], NEVER, NO_COLOR="1")
    assert status == 0 and b"\x1b[" not in seen


def test_watch_on_a_terminal(segment: Segment, segment_name: str) -> None:
    seen, status = _on_a_terminal(
        ["inspect", "--name", segment_name, "--watch", "0.1"], rb"(Ctrl-C ends.*){2}"
    )
    assert status == 0 and b"Traceback" not in seen
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen  # took the second screen, gave it back


def test_narrow_terminal_cuts_text_and_no_number(
    workers: list[int], segment: Segment, segment_name: str
) -> None:
    RateLimiter(Limit(10, per=3600), name="x" * 90, segment=segment).acquire("k" * 150)
    limiter = ConcurrencyLimiter(3, name="y" * 90, segment=segment)
    permits = [limiter.acquire("p" * 150) for _ in range(2)]
    seen, _ = _on_a_terminal(["inspect", "--name", segment_name], NEVER, 64, NO_COLOR="1")
    lines = [line.rstrip() for line in seen.decode().splitlines()]
    assert max(len(line) for line in lines if line[:4] != "path") <= 64  # the path is never cut
    for pid in workers:
        assert any(line.split()[:1] == [str(pid)] for line in lines)
    assert any(re.match(r"k+…? +x+… +1 +0 +9 +-$", line) for line in lines)
    assert any(re.match(r"p+…? +y+… +2 +3 +.* +- +\+1$", line) for line in lines)
    assert all(permit.release() for permit in permits)
