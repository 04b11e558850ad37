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

LIMIT, LEASE = 1000, 10
# What a worker does. A mark is written when the caller knows what was decided.
_WORK = """
import os, sys
from fast_litellm_shm import FixedWindow, RateLimiter, TokenBucket
from fast_litellm_shm.durable import StateFile
folder, rounds = sys.argv[1], int(sys.argv[2])
mark = os.open(folder + "/mark", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
file = StateFile(folder, timeout=30)
limiter = RateLimiter(FixedWindow(1000, per=86400), name="free", durable=file)
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


def _record(tmp_path: Path, rounds: int) -> Path:
    folder, log = tmp_path / "state", tmp_path / "log"
    folder.mkdir()
    name = unique_name("cuts")
    env = os.environ | {
        "LD_PRELOAD": power_cuts.recorder(tmp_path), "CUT_LOG": str(log),
        "CUT_FOLDER": str(folder), "FAST_LITELLM_SHM_NAME": name,
    }  # fmt: skip
    try:
        subprocess.run([sys.executable, "-c", _WORK, str(folder), str(rounds)], env=env, check=True)
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
        )  # fmt: skip


def check_cuts(tmp_path: Path, rounds: int, some: int, most: int = 2**31) -> int:
    """most: disks for each cut. Returns how many disks were looked at."""
    log, disk_folder = _record(tmp_path, rounds), tmp_path / "disk"
    disk_folder.mkdir()
    admitted: Counter[str] = Counter()
    refunding, looked, ended = 0, 0, False
    for number, each, disk in power_cuts.played(log):
        if each.name == "mark":
            if each.kind == "w":
                what, *name, count = each.data.decode().split()
                key = " ".join(name)
                admitted[key] += int(count) if what == "admitted" else 0
                refunding += int(count) if what == "refunding" else 0
                if what == "refunded":
                    admitted[key] -= int(count)
                    refunding -= int(count)
                ended = ended or what == "ended"
            continue
        cuts = list(disk.cuts(number, some))
        for files in cuts if len(cuts) <= most else random.Random(number).sample(cuts, most):
            (database,) = [name for name in files if name.endswith(".db")] or [""]
            power_cuts.put(files, disk_folder)
            used = _used(disk_folder / (database or "none.db"))
            looked += 1
            for key in admitted.keys() | used.keys():
                least = admitted[key] - (refunding if key == "a" else 0)
                assert least <= used[key] <= admitted[key] + LEASE + 1, (number, key, each.name)
    assert ended
    assert looked > 100
    final = _used(next((tmp_path / "state").glob("*.db")))
    assert final == admitted, "a clean end gives back what was not used"
    return looked


def test_power_cuts(tmp_path: Path) -> None:
    check_cuts(tmp_path, rounds=10, some=1, most=4)


if __name__ == "__main__":  # a longer one: python test_power_cuts.py FOLDER ROUNDS SOME
    print(check_cuts(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), "disks")
