"""A file that cannot be used: each fault is a clear error and a policy, and none gives a token
twice."""

from __future__ import annotations

import glob
import logging
import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from support.reboots import Host, leases_of, link_of, spend
from support.waiting import wait_until

from fast_litellm_shm import FixedWindow, RateLimiter, TokenBucket, exceptions, health_check
from fast_litellm_shm.cluster.state import outage_state
from fast_litellm_shm.durable import StateFile, clock, filesystem, store
from fast_litellm_shm.durable.filesystem import Kind

DAY = 86_400


def _full(limiter: RateLimiter) -> None:
    """No page more fits on the disk, for this process."""
    db = link_of(limiter).store._open
    assert db is not None
    pages = db.db.execute("PRAGMA page_count").fetchone()[0]
    db.db.execute(f"PRAGMA max_page_count={pages}")


def _fill(limiter: RateLimiter, most: int = 10_000) -> int:
    """Keys until the file is full."""
    for count in range(most):
        limiter.acquire(f"{count}" + "x" * 500)
        if link_of(limiter).outage is not None:
            return count
    raise AssertionError("the file did not fill")


def test_a_full_disk(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert spend(limiter, "k", 100) == 100
    _full(limiter)
    _fill(limiter)
    assert "the disk is full: free some space" in caplog.text
    assert "on_outage='local'" in caplog.text
    # by what the segment knows, and what can be read of the file: exact
    assert spend(limiter, "k") == 900
    with pytest.raises(exceptions.StateFileError, match="the disk is full"):
        limiter.reset("k")
    found = outage_state(host.segment)
    assert found is not None
    assert (found["file"], found["server"], found["on_outage"]) == (True, False, ["local"])
    opened = link_of(limiter).store._open
    assert opened is not None
    opened.db.execute("PRAGMA max_page_count=1000000")
    wait_until("the outage ends", lambda: link_of(limiter).outage is None)
    assert outage_state(host.segment) is None
    # what was admitted meanwhile is in the file by now
    host.lose_power()
    assert not host.limiter(FixedWindow(1000, per=DAY)).acquire("k")


@pytest.mark.parametrize(("policy", "admitted"), [("deny", False), ("allow", True)])
def test_the_other_policies(host: Host, policy: str, admitted: bool) -> None:
    file = StateFile(host.folder, on_outage=policy)
    limiter = host.limiter(FixedWindow(10, per=DAY), durable=file)
    assert limiter.acquire("k")
    _full(limiter)
    _fill(limiter)
    found = [limiter.acquire("new").allowed for _ in range(30)]
    assert found == [admitted] * 30


def test_a_key_of_which_nothing_is_known_is_denied(host: Host, folder: Path) -> None:
    folder.write_text("no folder")
    limiter = host.limiter(FixedWindow(10, per=DAY))
    found = limiter.acquire("k")
    assert not found.allowed
    assert found.retry_after is not None and found.retry_after < 5


def test_a_folder_that_cannot_be_written(
    host: Host, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.chmod(0o500)
    try:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        host.limiter(FixedWindow(10, per=DAY)).acquire("k")
        assert "cannot be written" in caplog.text
    finally:
        folder.parent.chmod(0o700)


def test_a_file_that_cannot_be_written(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert spend(limiter, "k", 5) == 5
    opened = link_of(limiter).store._open
    assert opened is not None
    opened.db.execute("PRAGMA query_only=ON")
    assert spend(limiter, "k") == 995
    assert "cannot be written" in caplog.text
    opened.db.execute("PRAGMA query_only=OFF")
    wait_until("the outage ends", lambda: link_of(limiter).outage is None)
    assert not limiter.acquire("k")


def test_a_process_that_keeps_it_locked(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    limiter = host.limiter(FixedWindow(50, per=DAY), durable=StateFile(host.folder, timeout=0.05))
    assert limiter.acquire("k")
    with sqlite3.connect(host.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert spend(limiter, "k") == 49
        assert time.monotonic() - began < 10  # one wait, and not one for each call
        assert "another process has kept it locked for 0.05 s" in caplog.text
        other.execute("ROLLBACK")
    other.close()
    wait_until("the outage ends", lambda: link_of(limiter).outage is None)
    host.lose_power()
    assert not host.limiter(FixedWindow(50, per=DAY)).acquire("k")


def test_calls_wait_for_a_short_lock(host: Host) -> None:
    """Busy is never denied."""
    limiter = host.limiter(FixedWindow(50, per=DAY), durable=StateFile(host.folder, timeout=20))
    assert limiter.acquire("a")
    other = sqlite3.connect(host.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.2, lambda: other.execute("ROLLBACK")).start()
    assert limiter.acquire("b")
    assert link_of(limiter).outage is None
    other.close()


def _damage(host: Host, at: int, junk: bytes) -> None:
    with open(host.path, "r+b") as file:
        file.seek(at)
        file.write(junk)


@pytest.mark.parametrize("damage", ["head", "pages", "cut", "another"])
def test_a_damaged_file_is_put_aside(
    host: Host, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    limit = FixedWindow(100, per=3600)
    limiter = host.limiter(limit, TokenBucket(100, per=3600))
    for i in range(200):
        limiter.acquire(f"k{i}")
    host.reboot(down=0)
    size = os.path.getsize(host.path)
    if damage == "head":
        _damage(host, 0, b"\0" * 50)
    elif damage == "pages":
        for page in range(1, size // 4096):
            _damage(host, page * 4096, os.urandom(200))
    elif damage == "cut":
        os.truncate(host.path, size // 2)
    else:
        os.unlink(host.path)
        with sqlite3.connect(host.path) as db:
            db.execute("CREATE TABLE mine (x)")
        db.close()
    limiter = host.limiter(limit, TokenBucket(100, per=3600))
    assert not limiter.acquire("k1"), "what was spent is not known"
    wait_until(
        "the outage ends", lambda: not limiter.acquire("new") and link_of(limiter).outage is None
    )
    (aside,) = glob.glob(f"{host.path}.damaged-*[0-9]")
    assert os.path.getsize(aside) > 0
    assert "is damaged" in caplog.text
    assert aside in caplog.text
    assert not limiter.acquire("k1")
    # it ends by itself, when all that anybody may have spent counts no more
    host.reboot(down=1800)
    found = host.limiter(limit, TokenBucket(100, per=3600)).peek("k1", (0, 50))
    assert found.allowed
    host.reboot(down=1800)
    assert spend(host.limiter(limit, TokenBucket(100, per=3600)), "k1") == 100


def test_a_damaged_file_begins_anew_where_outages_allow(host: Host) -> None:
    file = StateFile(host.folder, on_outage="allow")
    assert spend(host.limiter(FixedWindow(10, per=DAY), durable=file), "k") == 10
    host.reboot()
    _damage(host, 0, b"junk" * 10)
    assert spend(host.limiter(FixedWindow(10, per=DAY), durable=file), "k") == 10
    assert len(glob.glob(f"{host.path}.damaged-*[0-9]")) == 1


def test_damage_that_is_met_later(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    limiter = host.limiter(FixedWindow(100, per=DAY))
    for i in range(300):
        limiter.acquire(f"k{i}")
    opened = link_of(limiter).store._open
    assert opened is not None
    opened.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for page in range(2, os.path.getsize(host.path) // 4096):
        _damage(host, page * 4096, b"\xff" * 4096)
    opened.db.execute("PRAGMA shrink_memory")
    for i in range(300):
        limiter.acquire(f"k{i}", 60)
    wait_until("the outage ends", lambda: link_of(limiter).outage is None)
    assert len(glob.glob(f"{host.path}.damaged-*[0-9]")) == 1
    assert not limiter.acquire("k7", 60)


def test_a_removed_file_begins_anew(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """As a server that restarts empty: the person who removes it decides that."""
    limiter = host.limiter(FixedWindow(10, per=DAY))
    assert spend(limiter, "k") == 10
    for path in glob.glob(f"{host.path}*"):
        os.unlink(path)
    leases_of(limiter).unrefuse(b"k")
    assert spend(limiter, "k") == 10
    assert "was removed or replaced" in caplog.text


def _on_shared_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "kind_of", lambda _: Kind("nfs4", shared=True, in_memory=False))


def test_two_hosts_on_one_file(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _on_shared_disk(monkeypatch)
    monkeypatch.setattr(clock, "host", lambda: "first")
    limit = FixedWindow(100, per=DAY)
    assert spend(host.limiter(limit), "k", 50) == 50
    host.lose_power()
    monkeypatch.setattr(clock, "host", lambda: "second")
    limiter = host.limiter(limit)
    assert not limiter.acquire("k")
    assert "belongs to host 'first'" in caplog.text
    assert "FAST_LITELLM_SHM_CLUSTER" in caplog.text
    # the first host reboots: it is its file
    monkeypatch.setattr(clock, "host", lambda: "first")
    host.lose_power()
    assert spend(host.limiter(limit), "k", 10) == 10
    # and ends cleanly: any host may go on
    host.reboot()
    monkeypatch.setattr(clock, "host", lambda: "second")
    assert 38 <= spend(host.limiter(limit), "k") <= 40


def test_a_second_host_while_the_first_one_runs(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_shared_disk(monkeypatch)
    limiter = host.limiter(FixedWindow(100, per=DAY))
    assert limiter.acquire("k")
    with sqlite3.connect(host.path) as db:
        db.execute("UPDATE meta SET value = '[\"other\", 1, 2, 3, 3]' WHERE name = 'clock'")
    db.close()
    limiter.acquire("k", 50)
    outage = link_of(limiter).outage
    assert outage is not None and "belongs to host" in outage


def test_local_disks_are_known() -> None:
    proc, tmpfs = filesystem.kind_of("/proc"), filesystem.kind_of("/dev/shm")
    assert proc.name == "proc" and proc.shared
    assert tmpfs == ("tmpfs", False, True)


def test_another_version_of_the_file(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.limiter(FixedWindow(100, per=DAY)).acquire("k")
    host.reboot()
    with sqlite3.connect(host.path) as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    assert not host.limiter(FixedWindow(100, per=DAY)).acquire("k")
    assert "has version 9, this release knows version 1" in caplog.text
    assert not glob.glob(f"{host.path}.damaged-*")


def test_the_health_check_tells(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.write_text("no folder")
    limiter = RateLimiter(FixedWindow(10, per=DAY), name="told", durable=True)
    assert not limiter.acquire("k")
    found = health_check()
    assert "the state file of the durable limits has not answered 1 of 1 processes" in str(
        found["status"]
    )
    assert found["durable"]["lost"] == 1 and found["durable"]["failed"] >= 1
    link_of(limiter).store.close()


def test_a_log_line_for_each_outage_only(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    limiter.acquire("k")
    _full(limiter)
    _fill(limiter)
    for i in range(50):
        limiter.acquire(f"other {i}")
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len([line for line in lines if host.path in line]) == 1


@pytest.mark.parametrize("junk", ["", "[", "[[0,77,1,1,1,1]]", "[[0,1,-3,1,1,1]]", '[["x"]]', "7"])
def test_a_row_that_is_no_state(host: Host, junk: str, caplog: pytest.LogCaptureFixture) -> None:
    """It counts as used up, and other keys as they are."""
    limit = FixedWindow(100, per=3600)
    limiter = host.limiter(limit)
    assert spend(limiter, "k", 3) == spend(limiter, "other", 3) == 3
    link_of(limiter).save()
    with sqlite3.connect(host.path) as db:
        db.execute("UPDATE key SET states = ? WHERE name = ?", (junk, b"k"))
    db.close()
    assert not limiter.acquire("k")
    assert spend(limiter, "other") == 97
    assert "is no state" in caplog.text
    host.reboot(down=3601)
    assert spend(host.limiter(limit), "k") == 100


def test_a_thread_that_is_stuck_in_the_file(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that answers nobody: the others go by the policy."""
    file = StateFile(host.folder, timeout=0.05)
    limiter = host.limiter(FixedWindow(100, per=DAY), durable=file)
    assert spend(limiter, "k", 10) == 10
    stuck, ends = threading.Event(), threading.Event()

    def hold() -> None:
        with link_of(limiter).store.lock:
            stuck.set()
            ends.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    stuck.wait(60)
    assert spend(limiter, "k") == 90
    assert not limiter.acquire("new"), "it cannot be read"
    assert "a write of this process does not end" in caplog.text
    assert not link_of(limiter)._asked
    ends.set()
    thread.join()
    wait_until("the outage ends", lambda: link_of(limiter).outage is None)
    assert limiter.acquire("new")
    host.lose_power()
    assert not host.limiter(FixedWindow(100, per=DAY)).acquire("k")
