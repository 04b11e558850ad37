"""fast-shm state and fast-shm save, as a person calls them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from support.children import PATIENCE
from support.reboots import Host, leases_of, link_of, spend

from fast_litellm_shm import FixedWindow, Quota, Segment, SlidingWindow, TokenBucket
from fast_litellm_shm.cli import main

DAY = 86_400


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(list(args))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_show(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY), TokenBucket(500, per=60))
    spend(limiter, "user-1", 20)
    status, out, _ = _run(capsys, "state", "show", "--name", host.name)
    assert status == 0
    assert host.path in out.replace("\n", "")
    assert "1 key" in out
    assert "user-1" in out and "free" in out and "yes" in out
    _, out, _ = _run(capsys, "state", "show", "--json", "--name", host.name)
    (key,) = json.loads(out)["keys"]
    used = [each["used"] for each in key["limits"]]
    leased = leases_of(limiter).look(b"user-1")[0]
    assert used[0] == 20 + leased[0] and key["leased"]


def test_save_gives_back_what_is_leased(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    spend(limiter, "k", 3)
    (left,) = leases_of(limiter).look(b"k")[0]
    assert left > 0
    status, out, _ = _run(capsys, "save", "--name", host.name)
    assert (status, out) == (0, f"Gave back {left} tokens of 1 key.\n")
    assert "Nothing to give back" in _run(capsys, "save", "--name", host.name)[1]
    host.lose_power()
    assert spend(host.limiter(FixedWindow(1000, per=DAY)), "k") == 997


@pytest.mark.parametrize("names", ["hashed", "off"])
def test_save_where_the_segment_keeps_no_names(
    host: Host, names: str, capsys: pytest.CaptureFixture[str], segment_name: str
) -> None:
    host.remove_segment()
    from support.names import remove

    remove(segment_name)
    host.segment = Segment(segment_name, capacity=1000, names=names)
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    spend(limiter, "secret-key", 5)
    _run(capsys, "save", "--name", host.name)
    host.lose_power()
    assert spend(host.limiter(FixedWindow(1000, per=DAY)), "secret-key") == 995
    with open(host.path, "rb") as file:
        assert b"secret-key" not in file.read()


def test_check(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    spend(host.limiter(FixedWindow(1000, per=DAY)), "k", 5)
    assert _run(capsys, "state", "check", "--name", host.name)[0] == 0
    with sqlite3.connect(host.path) as db:
        db.execute("UPDATE key SET states = 'x'")
    db.close()
    status, out, err = _run(capsys, "state", "check", "--name", host.name)
    assert (status, out) == (1, "") and "states that are none" in err


def test_compact_removes_what_counts_no_more(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    limiter = host.limiter(FixedWindow(10, per=60))
    for i in range(100):
        limiter.acquire(f"old {i}")
    host.reboot(down=DAY)
    host.limiter(FixedWindow(10, per=60)).acquire("new")
    status, out, _ = _run(capsys, "state", "compact", "--name", host.name)
    assert status == 0 and out.startswith("Removed ")
    assert set(host.rows()) == {b"new"}


def test_old_rows_go_by_themselves(host: Host) -> None:
    limiter = host.limiter(FixedWindow(10, per=60))
    for i in range(100):
        limiter.acquire(f"old {i}")
    host.reboot(down=DAY)
    limiter = host.limiter(FixedWindow(10, per=60))
    for i in range(10):
        host.pass_time(2)
        limiter.acquire(f"new {i}")
    assert all(name.startswith(b"new") for name in host.rows())


def test_an_export_comes_back(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits = FixedWindow(100, per=DAY), TokenBucket(200, per=DAY), SlidingWindow(300, per=DAY)
    limiter = host.limiter(*limits)
    assert spend(limiter, "k", 70) == 70
    limiter.acquire(b"\xff\xfe")
    _run(capsys, "save", "--name", host.name)
    copy = str(tmp_path / "copy.json")
    assert _run(capsys, "state", "export", copy, "--name", host.name)[0] == 0
    assert Path(copy).stat().st_mode & 0o777 == 0o600
    spend(limiter, "k")
    status, out, _ = _run(capsys, "state", "import", copy, "--name", host.name)
    assert status == 0 and out.startswith("Imported 2 keys")
    leases_of(limiter).unrefuse(b"k")
    assert spend(limiter, "k") == 30
    # on another host, later
    host.lose_power()
    Path(host.path).unlink()
    host.pass_time(3600)
    assert _run(capsys, "state", "import", copy, "--name", host.name)[0] == 0
    limiter = host.limiter(*limits)
    assert limiter.peek(b"\xff\xfe").remaining == 99
    assert spend(limiter, "k") == 30


def test_an_import_ends_that_all_keys_count_as_used_up(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limiter = host.limiter(FixedWindow(100, per=DAY))
    assert spend(limiter, "k", 70) == 70
    link_of(limiter).save()
    copy = str(tmp_path / "copy.json")
    _run(capsys, "state", "export", copy, "--name", host.name)
    host.lose_power(down=0)
    Path(host.path).write_bytes(b"junk" * 1000)
    limiter = host.limiter(FixedWindow(100, per=DAY))
    assert not limiter.acquire("k") and not limiter.acquire("new")
    assert "damage " in _run(capsys, "state", "show", "--name", host.name)[1]
    _run(capsys, "state", "import", copy, "--name", host.name)
    for key in (b"k", b"new"):
        leases_of(limiter).unrefuse(key)
    assert spend(limiter, "k") == 30
    assert spend(limiter, "new") == 100


@pytest.mark.parametrize(
    "junk", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "keys": 7}',
             '{"format": 1, "time": 1, "secret": "00", "keys": [{"limiter": "x", "key": "y", '
             '"states": [{"limit": [1, 2, 3, 4, 5]}]}]}'],
)  # fmt: skip
def test_what_is_no_export_changes_nothing(
    host: Host, junk: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spend(host.limiter(FixedWindow(100, per=DAY)), "k", 7)
    before = host.rows()
    (tmp_path / "junk.json").write_text(junk)
    status, _, err = _run(
        capsys, "state", "import", str(tmp_path / "junk.json"), "--name", host.name
    )
    assert status == 1 and "was not imported" in err
    assert host.rows() == before


def test_an_export_that_cannot_be_written(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It leaves nothing beside the target: that would have the secret of the names."""
    spend(host.limiter(FixedWindow(100, per=DAY)), "k", 7)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for target, why in (
        ("folder", "it is a directory"),
        ("none/x.json", "No such file"),
        ("link", "it is not a regular file"),  # which the new one would replace
    ):
        path = str(tmp_path / target)
        status, out, err = _run(capsys, "state", "export", path, "--name", host.name)
        assert (status, out) == (1, "")
        assert err.startswith(f"fast-shm: cannot write {path}: {why}")
    assert not [each for each in os.listdir(tmp_path) if each.endswith(".tmp")]


def test_an_import_that_cannot_be_read(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spend(host.limiter(FixedWindow(100, per=DAY)), "k", 7)
    for target, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        status, _, err = _run(capsys, "state", "import", str(target), "--name", host.name)
        assert status == 1 and err.startswith(f"fast-shm: cannot read {str(target)!r}: {why}")
    (tmp_path / "text").write_bytes(b"\xff no JSON")
    status, _, err = _run(capsys, "state", "import", str(tmp_path / "text"), "--name", host.name)
    assert status == 1 and "it is no JSON" in err and "`fast-shm state export` wrote" in err


@pytest.mark.parametrize("verb", [["save"], ["state", "show"], ["reset", "k"]])
def test_a_folder_that_is_none(
    host: Host,
    verb: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_STATE", "relative")
    status, _, err = _run(capsys, *verb, "--name", host.name)
    assert status == 2 and "FAST_LITELLM_SHM_STATE" in err


@pytest.mark.parametrize("verb", [["save"], ["state", "show"], ["state", "export"]])
def test_without_a_file(host: Host, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _run(capsys, *verb, "--name", host.name)
    assert (status, out) == (1, "") and "there is no state file" in err
    assert not Path(host.path).exists()


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["state"], ["state", "import"], ["state", "show", "x"], ["state", "burn"]):
        assert _run(capsys, *wrong)[0] == 2


def test_reset_reaches_the_file(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limiter = host.limiter(FixedWindow(10, per=DAY))
    assert spend(limiter, "k") == spend(limiter, "other") == 10
    status, out, _ = _run(capsys, "reset", "--name", host.name, "k")
    assert status == 0 and "Reset key 'k' of limiter 'free'" in out
    assert spend(limiter, "k") == 10
    status, out, _ = _run(capsys, "reset", "--name", host.name, "--all")
    assert status == 0 and "Reset limiter 'free'" in out
    host.lose_power()
    limiter = host.limiter(FixedWindow(10, per=DAY))
    assert spend(limiter, "k") == spend(limiter, "other") == 10


def test_inspect_shows_it(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    spend(host.limiter(FixedWindow(1000, per=DAY)), "k", 30)
    _, out, _ = _run(capsys, "inspect", "--json", "--name", host.name)
    found = json.loads(out)["durable"]
    assert found["transactions"] > 1 and found["granted"] >= 30 and found["away"] is None
    _, out, _ = _run(capsys, "inspect", "--name", host.name)
    assert "durable" in out and "transactions" in out


def _in_another_process(host: Host, *args: str) -> subprocess.CompletedProcess[str]:
    """Which knows no plans."""
    command = [sys.executable, "-m", "fast_litellm_shm.cli", *args, "--name", host.name]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_reset_where_the_keys_have_plans(host: Host) -> None:
    """It says what to do, and the other limiters are reset."""
    planned = host.limiter(name="planned", plan_of=lambda _: "9 per day")
    plain = host.limiter(FixedWindow(10, per=DAY), name="plain")
    assert planned.acquire("k") and plain.acquire("k")
    done = _in_another_process(host, "reset", "--all")
    assert done.returncode == 1 and "Reset limiter 'plain'" in done.stdout
    assert "limiter 'planned'" in done.stderr and "call reset() of the limiter" in done.stderr
    assert "`fast-shm rm" not in done.stderr
    assert spend(plain, "k") == 10
    planned.reset("k")
    assert spend(planned, "k") == 9


def test_save_says_what_it_could_not_save(host: Host) -> None:
    planned = host.limiter(name="planned", plan_of=lambda _: "9000 per day")
    plain = host.limiter(FixedWindow(9000, per=DAY), name="plain")
    assert planned.acquire("k") and plain.acquire("k")
    done = _in_another_process(host, "save")
    assert done.returncode == 1 and "of 1 key.\n" in done.stdout
    assert "1 key of limiter 'planned' stay" in done.stderr
    assert link_of(planned).save()[1] == 1
    done = _in_another_process(host, "save")
    assert (done.returncode, done.stderr) == (0, "")


def test_one_limiter_that_cannot_be_saved_keeps_no_other_from_it(
    host: Host,
) -> None:
    plain = host.limiter(FixedWindow(9000, per=DAY), name="plain")
    taken = host.limiter(FixedWindow(9000, per=DAY), name="taken")
    assert plain.acquire("k") and taken.acquire("k")
    Quota(5, max_parallel=2, name="taken", segment=host.segment)
    done = _in_another_process(host, "save")
    assert done.returncode == 1 and "of 1 key.\n" in done.stdout
    assert "limiter 'taken' was not saved" in done.stderr and "Traceback" not in done.stderr
