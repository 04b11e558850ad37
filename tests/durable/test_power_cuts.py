"""The power is cut at each write and each sync of the file: never more than the limit is admitted,
and a key loses one lease at most."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import power_cuts
from support.names import remove, unique_name

from fast_litellm_shm.durable import records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc")

# What a key may lose: a lease, and what was just admitted. Of money: a hundredth of 10 dollars, and
# what one call has reserved.
LOST = {"window": 11, "calendar": 11, "money": 150_000_000}
# What a worker does. A mark is written when the caller knows what was decided.
_WORK = """
import os, sys
from fast_litellm_shm import FixedWindow, RateLimiter
from fast_litellm_shm.durable import StateFile
folder, rounds = sys.argv[1], int(sys.argv[2])
mark = os.open(folder + "/mark", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
file = StateFile(folder, timeout=30)
per = 86400 if sys.argv[3] == "window" else "year"
limiter = RateLimiter(FixedWindow(1000, per=per), name="free", durable=file)
link = limiter._grantor.leases.connection
def told(what, key, count=1):
    os.write(mark, f"{what} {key} {count}\\n".encode())
for number in range(rounds):
    for key in ("a", "b", f"new {number}"):
        for _ in range(5 if key == "a" else 2):
            if limiter.acquire(key):
                told("admitted", key)
    if number == 1:
        link.store._open.db.execute("PRAGMA wal_autocheckpoint=12")
    if number % 5 == 4:
        told("refunding", "a", 3)
        limiter.refund("a", 3)
        told("refunded", "a", 3)
    if number % 7 == 6:
        link.save()
told("ended", "-")
"""


_SPENDS = """
import os, sys
from fast_litellm_shm import Budget
from fast_litellm_shm.durable import StateFile
folder, rounds = sys.argv[1], int(sys.argv[2])
mark = os.open(folder + "/mark", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
budget = Budget(10, "year", name="team", durable=StateFile(folder, timeout=30))
link = budget._books.link
def told(what, key, count=1):
    os.write(mark, f"{what} {key} {count}\\n".encode())
for number in range(rounds):
    for key in ("a", "b", f"new {number}"):
        for _ in range(5 if key == "a" else 2):
            with budget.reserve(key, "0.05") as reservation:
                if reservation:
                    reservation.settle("0.03")
                    told("admitted", key, 30_000_000)
    if number == 1:
        link.store._open.db.execute("PRAGMA wal_autocheckpoint=12")
    if number % 5 == 4:
        told("refunding", "a", 100_000_000)
        budget.refund("a", "0.1")
        told("refunded", "a", 100_000_000)
    if number % 7 == 6:
        link.save()
told("ended", "-")
"""


def _record(tmp_path: Path, rounds: int, what: str) -> Path:
    folder, log = tmp_path / "state", tmp_path / "log"
    folder.mkdir()
    name = unique_name("cuts")
    env = os.environ | {
        "LD_PRELOAD": power_cuts.recorder(tmp_path), "CUT_LOG": str(log),
        "CUT_FOLDER": str(folder), "FAST_LITELLM_SHM_NAME": name,
    }  # fmt: skip
    try:
        script = _SPENDS if what == "money" else _WORK
        work = [sys.executable, "-c", script, str(folder), str(rounds), what]
        subprocess.run(work, env=env, check=True)
    finally:
        remove(name)
    return log


def _used(path: Path) -> Counter[str]:
    if not path.exists():
        return Counter()
    with records.opened(str(path)) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return Counter()  # it was just made
        assert db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        return Counter(
            {
                each.name.decode(): sum(state.used for state in each.states)
                for each in records.keys(db) if each.name is not None
            }
        ) + Counter(
            {each.name.decode(): each.granted for each in records.money(db) if each.name}
        )  # fmt: skip


def check_cuts(
    tmp_path: Path, rounds: int, some: int, most: int = 2**31, what: str = "window"
) -> int:
    """most: disks for each cut. Returns how many disks were looked at."""
    log, disk_folder = _record(tmp_path, rounds, what), tmp_path / "disk"
    disk_folder.mkdir()
    admitted: Counter[str] = Counter()
    refunding, looked, ended = 0, 0, False
    for number, each, disk in power_cuts.played(log):
        if each.name == "mark":
            if each.kind == "w":
                mark, *name, count = each.data.decode().split()
                key = " ".join(name)
                admitted[key] += int(count) if mark == "admitted" else 0
                refunding += int(count) if mark == "refunding" else 0
                if mark == "refunded":
                    admitted[key] -= int(count)
                    refunding -= int(count)
                ended = ended or mark == "ended"
            continue
        cuts = list(disk.cuts(number, some))
        for files in cuts if len(cuts) <= most else random.Random(number).sample(cuts, most):
            (database,) = [name for name in files if name.endswith(".db")] or [""]
            power_cuts.put(files, disk_folder)
            used = _used(disk_folder / (database or "none.db"))
            looked += 1
            for key in admitted.keys() | used.keys():
                least = admitted[key] - (refunding if key == "a" else 0)
                assert least <= used[key] <= admitted[key] + LOST[what], (number, key, each.name)
    assert ended
    assert looked > 100
    final = _used(next((tmp_path / "state").glob("*.db")))
    assert final == admitted, "a clean end gives back what was not used"
    return looked


@pytest.mark.parametrize("what", list(LOST))
def test_power_cuts(tmp_path: Path, what: str) -> None:
    check_cuts(tmp_path, rounds=10, some=1, most=4, what=what)


if __name__ == "__main__":  # a longer one: python test_power_cuts.py FOLDER ROUNDS SOME WHAT
    folder_, rounds_, some_, what_ = sys.argv[1:]
    print(check_cuts(Path(folder_), int(rounds_), int(some_), what=what_), "disks")
