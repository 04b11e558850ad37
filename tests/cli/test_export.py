"""``fast-shm export``."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from support.children import PATIENCE
from support.scene import AWKWARD, Scene, scene

from fast_litellm_shm import Limit, RateLimiter, Segment
from fast_litellm_shm.cli.render import escaped

from .conftest import COMMAND, Command, environment

# What differs from one read to the next.
MOVING = ("fast_shm_read_duration", "fast_shm_deployment_cooldown", "fast_shm_permits_oldest")


def _numbers(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
        if not sample.name.startswith(MOVING)
    }


@pytest.fixture(name="made")
def _made() -> Iterator[Scene]:
    with scene() as made:
        yield made


def test_formats_tell_the_same(made: Scene, fast_shm: Command, tmp_path: Path) -> None:
    def exported(kind: str) -> str:
        file = tmp_path / kind  # not by a pipe that is read as text, where \r becomes \n
        arguments = ("--name", made.segment.name, "--keys", "5", "--output", str(file))
        found = fast_shm("export", "--format", kind, *arguments)
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
        return file.read_bytes().decode()

    numbers = _numbers(exported("prometheus"))
    denied = numbers["fast_shm_denied_total", frozenset({("segment", made.segment.name)})]
    assert denied > 2
    rows = list(csv.DictReader(io.StringIO(exported("csv"), newline="")))
    assert list(rows[0]) == [
        "metric", "kind", "unit", "segment", "limiter", "priority", "pool", "endpoint", "key",
        "feature", "router", "deployment", "component", "operation", "le", "value",
    ]  # fmt: skip
    others = ("metric", "kind", "unit", "value")
    from_csv = {
        (row["metric"], frozenset((k, v) for k, v in row.items() if v and k not in others)): float(
            row["value"]
        )
        for row in rows
        if not row["metric"].startswith(MOVING)
    }
    # in CSV, what could move a cursor is escaped
    assert from_csv == {
        (name, frozenset((k, escaped(v)) for k, v in labels if v)): value
        for (name, labels), value in numbers.items()
    }
    found = json.loads(exported("json"))
    assert list(found) == [
        "duration_bounds_seconds", "segment", "limiters", "permits", "waiting", "pools", "keys",
        "memo", "feature_errors", "deployments", "operations", "budgets", "spending",
    ]  # fmt: skip
    assert found["segment"]["denied"] == denied
    assert AWKWARD in {row["limiter"] for row in found["limiters"]}
    assert AWKWARD in {row["key"] for row in found["keys"]}


def test_a_file_is_replaced_whole(segment: Segment, fast_shm: Command, tmp_path: Path) -> None:
    file = tmp_path / "fast_shm.prom"
    file.write_text("old")
    held = file.open()  # who reads the old one goes on doing so
    found = fast_shm("export", "--name", segment.name, "--output", str(file), umask=0o022)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert held.read() == "old"
    held.close()
    assert _numbers(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o644  # node_exporter is another user
    assert os.listdir(tmp_path) == [file.name]


def test_a_file_with_keys_is_its_owners(
    segment: Segment, fast_shm: Command, tmp_path: Path
) -> None:
    """Keys are clients' addresses and tokens. A file that is there keeps who may read it."""
    file = tmp_path / "keys.csv"
    arguments = ("--name", segment.name, "--keys", "5", "--output", str(file))
    for mode, umask in ((0o600, 0o022), (0o640, 0o077)):
        assert fast_shm("export", *arguments, umask=umask).returncode == 0
        assert stat.S_IMODE(file.stat().st_mode) == mode
        file.chmod(0o640)


KEYS = (
    '=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\x1b]0;x\x07", "\x9b2J",
    "\u202e", "plain",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_what_clients_chose_does_nothing(
    segment: Segment, fast_shm: Command, tmp_path: Path, kind: str
) -> None:
    """Not in a spreadsheet, and not on a terminal that shows the file. (Prometheus' format is for a
    machine, which needs the very names.)"""
    limiter = RateLimiter(Limit(3, per=3600), name="=1+1", segment=segment)
    for key in KEYS:
        limiter.acquire(key)
    file = tmp_path / "out"
    arguments = ("--name", segment.name, "--keys", "20", "--format", kind)
    assert fast_shm("export", *arguments, "--output", str(file)).returncode == 0
    text = file.read_bytes().decode()
    if kind == "csv":
        rows = list(csv.reader(io.StringIO(text, newline="")))
        cells = [cell for row in rows for cell in row if cell != "+Inf"]  # a bound, ours
        assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
        assert {"'=1+1", "'" + KEYS[0], "plain", "\\x1b]0;x\\x07"} <= set(cells)
    assert all(character.isprintable() for character in text.replace("\n", ""))


def test_a_terminal_is_left_alone(segment: Segment) -> None:
    limiter = RateLimiter(Limit(3, per=3600), name="t", segment=segment)
    for key in KEYS:
        limiter.acquire(key)
    ours, theirs = pty.openpty()
    arguments = ("export", "--name", segment.name, "--keys", "20")
    child = subprocess.Popen([*COMMAND, *arguments], stdout=theirs, env=environment())
    os.close(theirs)
    raw = b""
    with suppress(OSError):  # Linux: the other side is closed
        while chunk := os.read(ours, 65536):
            raw += chunk
    os.close(ours)
    assert child.wait(PATIENCE) == 0
    text = raw.decode()
    assert all(character.isprintable() for character in text.replace("\r\n", ""))
    assert "x1b]0;x" in text


def test_a_file_that_cannot_be_written(segment: Segment, fast_shm: Command, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "x.prom", "No such file or directory"),
        (Path("/proc/x.prom"), "cannot write /proc/x.prom"),
    ):
        found = fast_shm("export", "--name", segment.name, "--output", str(path))
        assert found.returncode == 1 and said in found.stderr and "Traceback" not in found.stderr
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_is_not_replaced(
    segment: Segment, fast_shm: Command, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "link", "null"):
        before = (tmp_path / name).lstat()
        found = fast_shm("export", "--name", segment.name, "--output", str(tmp_path / name))
        assert found.returncode == 1 and "it is not a regular file" in found.stderr, name
        assert (tmp_path / name).lstat().st_ino == before.st_ino
    assert (tmp_path / "target").read_text() == "old"


def test_it_is_utf8_in_any_locale(segment: Segment, fast_shm: Command) -> None:
    RateLimiter(Limit(3, per=3600), name="é", segment=segment).acquire("漢")
    for locale in ("ascii", "latin-1"):
        found = fast_shm(
            "export", "--name", segment.name, "--keys", "1",
            env=environment(PYTHONIOENCODING=locale),
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert 'limiter="é",key="漢"} 1\n' in found.stdout


def test_no_segment_leaves_the_file(segment_name: str, fast_shm: Command, tmp_path: Path) -> None:
    file = tmp_path / "fast_shm.prom"
    file.write_text("old")
    found = fast_shm("export", "--name", segment_name, "--output", str(file))
    assert found.returncode == 3 and "there is no such segment" in found.stderr
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--keys", "x"), "must be a whole number, 0 to 1000, not 'x'"),
        (("--keys", "1001"), "must be a whole number, 0 to 1000, not '1001'"),
        (("--format", "xml"), "invalid choice: 'xml'"),
        (("--name", "a/b"), "segment name must be"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, fast_shm: Command) -> None:
    found = fast_shm("export", *arguments)
    assert found.returncode == 2 and said in found.stderr
