"""A process that has used a state file forks."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

from support.reboots import Host, books_of
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import Budget
from fast_litellm_shm.durable import StateFile


def _budget(host: Host) -> Budget:
    made = Budget(1000, name="b", segment=host.segment, durable=StateFile(host.folder))
    host.links.append(books_of(made).link)
    return made


def _keys(path: str) -> int:
    db = sqlite3.connect(path)
    try:
        return int(db.execute("SELECT count(*) FROM money").fetchone()[0])
    finally:
        db.close()


def _in_a_child(call: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        assert callable(call)
        call()
        os._exit(0)
    finally:
        os._exit(1)


def _went_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_a_child_writes_stays_when_its_parent_ends(host: Host, tmp_path: Path) -> None:
    """The parent was the last user that SQLite knew of: it deleted the log."""
    begun, over = tmp_path / "begun", tmp_path / "over"

    def parent() -> None:
        budget = _budget(host)
        budget.charge("parent", 1)

        def child() -> None:
            budget.charge("child", 4)
            begun.touch()
            wait_until("the parent has ended", over.exists, seconds=PATIENCE)
            for i in range(20):
                budget.charge(f"child {i}", 4)

        pid = _in_a_child(child)
        wait_until("the child writes", begun.exists, seconds=PATIENCE)
        books_of(budget).link.store.close()
        over.touch()
        assert _went_well(pid)

    assert _went_well(_in_a_child(parent))
    assert _keys(host.path) == 22


def test_a_fork_during_a_write_locks_nobody_out(host: Host) -> None:
    budget = _budget(host)
    budget.charge("k", 1)
    store, inside, go_on = books_of(budget).link.store, threading.Event(), threading.Event()

    def write() -> None:
        with store.transaction():
            inside.set()
            go_on.wait(0.3)

    thread = threading.Thread(target=write)
    thread.start()
    assert inside.wait(PATIENCE)
    pid = _in_a_child(lambda: budget.charge("child", 4))
    thread.join()
    assert _went_well(pid)
    assert _keys(host.path) == 2
