"""fast-shm ls, from outside."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.segment import path_of

from .conftest import Command

LAYOUT = lib.FSHM_LAYOUT_VERSION


def _rows(done: Any) -> dict[str, dict[str, Any]]:
    """What ``ls --json`` printed, by file: other tests have segments too."""
    return {os.path.basename(row["path"]): row for row in json.loads(done.stdout)}


def _file(segment_name: str, layout: int = LAYOUT) -> str:
    return os.path.basename(path_of(segment_name)).replace(f".{LAYOUT}.", f".{layout}.", 1)


def test_lists_segments_alone(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    half_made = f"{path_of(segment_name)}.0123456789abcdef.tmp"
    with open(half_made, "wb"):
        rows = _rows(fast_shm("ls", "--json"))
    os.unlink(half_made)
    mine = [name for name in rows if segment_name in name]
    assert mine == [_file(segment_name)]
    row = rows[mine[0]]
    assert (row["name"], row["capacity"], row["processes"]) == (segment_name, 1000, len(workers))
    assert row["error"] is None and row["used"] > 0 and row["size_bytes"] > 0
    shown = fast_shm("ls")
    line = next(s for s in shown.stdout.splitlines() if segment_name in s).split()
    assert line[0] == segment_name and line[4:6] == ["1,000", "3"] and "\x1b" not in shown.stdout


def test_name_that_ends_like_a_lock_file(fast_shm: Command, segment_name: str) -> None:
    segment = Segment(segment_name[:50] + ".lock", capacity=10)
    try:
        assert _file(segment.name) in _rows(fast_shm("ls", "--json"))
    finally:
        segment.remove()


def test_a_layout_that_is_no_number_of_ours(fast_shm: Command, segment_name: str) -> None:
    """Any user can put such a file there. It made the table hundreds of columns wide."""
    path = path_of(segment_name).replace(f".{LAYOUT}.", f".{'9' * 150}.", 1)
    with open(path, "wb"):
        pass
    try:
        assert segment_name not in fast_shm("ls").stdout
        assert segment_name not in fast_shm("ls", "--json").stdout
    finally:
        os.unlink(path)


def test_what_cannot_be_read(fast_shm: Command, segment_name: str) -> None:
    with open(path_of(segment_name), "wb") as file:
        file.write(b"not a segment")
    later = path_of(segment_name).replace(f".{LAYOUT}.", ".99.", 1)
    with open(later, "wb"):
        pass
    try:
        rows = _rows(fast_shm("ls", "--json"))
        shown = fast_shm("ls")
    finally:
        os.unlink(later)
    assert rows[_file(segment_name)]["error"] == "damaged"
    assert rows[_file(segment_name, 99)]["error"] == "layout-99"
    assert shown.returncode == 0 and "damaged" in shown.stdout and "layout-99" in shown.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_other_owner(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    os.chown(path_of(segment_name), 12345, -1)
    assert _rows(fast_shm("ls", "--json"))[_file(segment_name)]["error"] == "other-owner"
    done = fast_shm("inspect", "--name", segment_name)
    assert done.returncode == 1 and "--allow-other-owner" in done.stderr
    done = fast_shm("inspect", "--name", segment_name, "--allow-other-owner")
    assert done.returncode == 0
    allowed = _rows(fast_shm("ls", "--json", "--allow-other-owner"))[_file(segment_name)]
    assert allowed["error"] is None
