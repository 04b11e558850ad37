"""Segments that were removed while processes use them: what the command says about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from support.children import PATIENCE

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm.cli import segments

from .conftest import Command


def test_a_removed_segment_in_use(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    assert segments.removed_users(segment_name) == []
    fast_shm("rm", "--name", segment_name, "--yes")
    pids = ", ".join(map(str, sorted(workers)))
    done = fast_shm("inspect", "--name", segment_name)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"is still in use by 3 processes (pids: {pids})" in done.stderr
    assert "Restart them" in done.stderr
    (row,) = (r for r in json.loads(fast_shm("ls", "--json").stdout) if r["name"] == segment_name)
    assert (row["error"], row["pids"]) == ("removed", sorted(workers))
    shown = fast_shm("ls").stdout
    line = next(line for line in shown.splitlines() if line.startswith(segment_name))
    assert line.split()[1:] == ["3", "removed"]
    assert "Restart them" in shown and pids in shown


def test_a_segment_that_has_taken_its_place(
    fast_shm: Command, workers: list[int], segment_name: str
) -> None:
    Segment(segment_name, create=False).remove()
    Segment(segment_name, capacity=500)
    shown = " ".join(fast_shm("inspect", "--name", segment_name).stdout.split())
    assert "0 of a capacity of 500" in shown
    pids = ", ".join(map(str, sorted(workers)))
    assert f"a removed segment '{segment_name}' is still in use by 3 processes" in shown
    assert f"(pids: {pids})" in shown and "Restart them" in shown
    found = json.loads(fast_shm("inspect", "--name", segment_name, "--json").stdout)
    assert found["removed_users"] == sorted(workers)
    rows = json.loads(fast_shm("ls", "--json").stdout)
    assert [r["error"] for r in rows if r["name"] == segment_name] == [None, "removed"]


def test_two_removed_segments_of_one_name(segment_name: str) -> None:
    both = []
    for _ in range(2):
        both.append(Segment(segment_name, capacity=10))
        both[-1].remove()
    found = [each for each in segments.removed() if each.name == segment_name]
    assert [each.pids for each in found] == [(os.getpid(),)] * 2
    assert segments.removed_users(segment_name) == [os.getpid()]


def test_only_users_count_and_no_views(segment_name: str) -> None:
    """A view, such as fast-shm top, maps for reading alone, and there is nothing to restart."""
    make = "import sys; from fast_litellm_shm import Segment; Segment(sys.argv[1], capacity=10)"
    subprocess.run([sys.executable, "-c", make, segment_name], check=True, timeout=PATIENCE)
    view = open_for_reading(segment_name)
    view.remove()
    assert view.unlinked and segments.removed_users(segment_name) == []
