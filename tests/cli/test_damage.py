"""fast-shm on a segment that was written over."""

from __future__ import annotations

import json
import os

from support.damage import SECRET, damage_limits, write_word

from fast_litellm_shm import Limit, RateLimiter, Segment

from .conftest import Command


def test_inspect_tells(fast_shm: Command, segment: Segment) -> None:
    RateLimiter(Limit(5), name="good", segment=segment).acquire("k")
    RateLimiter(Limit(5), name="bad", segment=segment).acquire("k")
    damage_limits(segment, 1)  # inspect finds it by itself
    done = fast_shm("inspect", "--name", segment.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "DAMAGED" in done.stdout
    text = " ".join(done.stdout.split())
    assert "WARNING" in text and "limiter number 1 do not add up" in text
    assert f"`fast-shm rm --name {segment.name}`" in text
    assert "good" in text  # the rest is shown
    found = json.loads(fast_shm("inspect", "--json", "--name", segment.name).stdout)
    assert "limiter number 1" in found["segment"]["damaged"]
    assert [limiter["name"] for limiter in found["limiters"]] == ["good"]


def test_ls_tells(fast_shm: Command, segment: Segment) -> None:
    RateLimiter(Limit(5), name="bad", segment=segment)
    damage_limits(segment, 0)
    rows = json.loads(fast_shm("ls", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == segment.name]
    assert row["error"] == "damaged" and "fast-shm rm" in row["detail"]
    assert row["capacity"] == 1000
    (line,) = [
        line for line in fast_shm("ls").stdout.splitlines() if line.startswith(segment.name[:20])
    ]
    assert line.split()[-1] == "damaged"


def test_the_others_tell(fast_shm: Command, segment: Segment) -> None:
    RateLimiter(Limit(5), name="bad", segment=segment)
    damage_limits(segment, 0)
    done = fast_shm("reset", "--name", segment.name, "--limiter", "bad")
    assert done.returncode == 1 and "no limiter 'bad'" in done.stderr
    assert fast_shm("release", "--dead", "--name", segment.name).returncode == 0
    write_word(segment, SECRET, 1)
    for verb in (["inspect"], ["reset", "k"], ["release", "--dead"]):
        done = fast_shm(*verb, "--name", segment.name)
        assert done.returncode == 1
        assert "damaged" in done.stderr and "fast-shm rm" in done.stderr
        assert "Traceback" not in done.stderr


def test_cut(fast_shm: Command, segment: Segment) -> None:
    os.truncate(segment.path, 4096)
    done = fast_shm("inspect", "--name", segment.name)
    assert done.returncode == 1 and "damaged" in done.stderr
    done = fast_shm("rm", "--yes", "--name", segment.name)
    assert (done.returncode, done.stderr) == (0, "")
