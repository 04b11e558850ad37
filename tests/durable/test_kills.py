"""Workers that are killed at any instant, hosts that lose their segment with it, and workers that
end as they should."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.names import remove, unique_name
from support.reboots import spend
from support.waiting import wait_until

from fast_litellm_shm import Budget, FixedWindow, RateLimiter, Segment
from fast_litellm_shm.durable import StateFile, link

DAY = 86_400
LEASE = 10  # of 1,000


def _work(name: str, folder: str, noted: int, seed: int, n: int) -> None:
    """Asks until it is killed, and notes each admission: one byte."""
    segment = Segment(name, capacity=1000)
    limiter = RateLimiter(
        FixedWindow(n, per=DAY), name="free", segment=segment,
        durable=StateFile(folder, timeout=30),
    )  # fmt: skip
    chance = random.Random(seed)
    while True:
        if limiter.acquire("k"):
            os.write(noted, b".")
        else:
            time.sleep(0.002)
        if chance.random() < 0.02:
            limiter.charge("k", 0)  # what is leased goes back to the file


def _spend_money(name: str, folder: str, noted: int, seed: int, n: int) -> None:
    """Reserves three cents and spends one, until it is killed, and notes each: one byte."""
    budget, chance = _budget(Segment(name, capacity=1000), folder, n), random.Random(seed)
    while True:
        with budget.reserve("k", "0.03") as reservation:
            if reservation:
                reservation.settle("0.01")
                os.write(noted, b".")
        if not reservation:
            time.sleep(0.002)
        if chance.random() < 0.02:
            budget.refund("k", 0)


def _budget(segment: Segment, folder: str, cents: int) -> Budget:
    file = StateFile(folder, timeout=30)
    return Budget(f"{cents / 100:.2f}", "year", name="team", segment=segment, durable=file)


def _rest_of_money(segment: Segment, folder: str, n: int) -> int:
    budget, count = _budget(segment, folder, n), 0
    wait_until("what the dead had reserved is free", lambda: budget.usage("k").reserved == 0)
    while True:
        with budget.reserve("k", "0.01") as reservation:
            if not reservation:
                return count
            reservation.settle("0.01")
            count += 1


def _forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(1)


def check_kills(
    folder: Path, kills: int, workers: int, seed: int = 1, n: int = 1000, money: bool = False
) -> tuple[int, int]:
    """Returns how many were admitted, and how many reboots there were. money: cents of a budget."""
    name, chance = unique_name("kills"), random.Random(seed)
    (folder / "state").mkdir(parents=True)
    noted = os.open(folder / "noted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    reboots, number, living = 0, 0, list[int]()

    def begin() -> int:
        nonlocal number
        number += 1
        work = _spend_money if money else _work
        return _forked(lambda: work(name, str(folder / "state"), noted, number, n))

    def end(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    try:
        living = [begin() for _ in range(workers)]
        for _ in range(kills):
            time.sleep(chance.uniform(0, 0.02))
            victim = living.pop(chance.randrange(len(living)))
            end(victim)
            if chance.random() < 0.03:  # a reboot: all of them, and the segment
                for pid in living:
                    end(pid)
                remove(name)
                reboots += 1
                living = []
            while len(living) < workers:
                living.append(begin())
        for pid in living:
            end(pid)
        living = []
        segment = Segment(name, capacity=1000)
        if money:
            rest = _rest_of_money(segment, str(folder / "state"), n)
        else:
            limiter = RateLimiter(
                FixedWindow(n, per=DAY), name="free", segment=segment,
                durable=StateFile(str(folder / "state"), timeout=30),
            )  # fmt: skip
            rest = spend(limiter, "k")
        found = link.of(StateFile(str(folder / "state"), timeout=30).of(segment), segment)
        found.store.close()
        found.ending = lambda: None  # type: ignore[method-assign]
        return os.path.getsize(folder / "noted") + rest, reboots
    finally:
        for pid in living:
            end(pid)
        os.close(noted)
        remove(name)


def test_kills(tmp_path: Path) -> None:
    """Never more than the limit. A kill loses what it was just granted, or has not noted; a reboot
    loses a lease."""
    admitted, reboots = check_kills(tmp_path, kills=40, workers=3)
    assert admitted <= 1000
    assert admitted >= 1000 - (40 + reboots) * (LEASE + 1)


def test_kills_of_those_that_spend_money(tmp_path: Path) -> None:
    """The same, in cents; a kill loses what it was just granted, and what it has not noted."""
    spent, reboots = check_kills(tmp_path, kills=40, workers=3, money=True)
    assert spent <= 1000
    assert spent >= 1000 - 40 * 15 - reboots * 30


_ENDS = """
import os, signal, sys, time
from fast_litellm_shm import FixedWindow, RateLimiter
limiter = RateLimiter(FixedWindow(1000, per=86400), name="free", durable=True)
if sys.argv[2] == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(sum(bool(limiter.acquire("k")) for _ in range(int(sys.argv[1]))), flush=True)
if sys.argv[2] == "waits":
    signal.pause()
"""


def _begin(how: str, calls: int = 3) -> subprocess.Popen[str]:
    made = subprocess.Popen(
        [sys.executable, "-c", _ENDS, str(calls), how], stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    with made.stdout as out:
        assert out.readline() == f"{calls}\n"
    return made


def _left(name: str) -> int:
    """After a reboot."""
    remove(name)
    limiter = RateLimiter(FixedWindow(1000, per=DAY), name="free", durable=True)
    return spend(limiter, "k")


def test_the_last_process_gives_back(folder: Path) -> None:
    name = os.environ["FAST_LITELLM_SHM_NAME"]
    first, second = _begin("waits"), _begin("waits")
    first.terminate()
    assert first.wait() == 0
    second.terminate()
    assert second.wait() == 0
    assert _left(name) == 994


def test_processes_that_end_together_give_back(folder: Path) -> None:
    name = os.environ["FAST_LITELLM_SHM_NAME"]
    both = [_begin("waits", calls=1) for _ in range(4)]
    for each in both:
        each.terminate()
    assert [each.wait() for each in both] == [0] * 4
    assert _left(name) == 996


def test_a_process_that_was_killed_does_not_keep_the_last_one_from_it(folder: Path) -> None:
    name = os.environ["FAST_LITELLM_SHM_NAME"]
    first, second = _begin("waits"), _begin("waits")
    first.kill()
    first.wait()
    wait_until("it is seen", lambda: len(Segment(name).processes()) == 1)
    second.terminate()
    assert second.wait() == 0
    assert _left(name) == 994


def test_a_process_that_lives_on_keeps_the_lease(folder: Path) -> None:
    """It would have to ask for the next call."""
    stays = _begin("waits", calls=1)
    ends = _begin("ends", calls=1)
    assert ends.wait() == 0
    inspected = RateLimiter(FixedWindow(1000, per=DAY), name="free", durable=True)
    from support.reboots import leases_of

    assert leases_of(inspected).look(b"k")[0][0] > 0
    stays.terminate()
    assert stays.wait() == 0


if __name__ == "__main__":  # by hand: python test_kills.py FOLDER KILLS WORKERS [money]
    folder_, kills_, workers_, *what_ = sys.argv[1:]
    done = total = 0
    while done < int(kills_):
        part = Path(folder_) / f"{os.getpid()}-{done}"
        admitted_, reboots_ = check_kills(part, 100, int(workers_), done, 10_000, bool(what_))
        assert admitted_ <= 10_000, (admitted_, done)
        done, total = done + 100, total + reboots_
        print(done, admitted_, total, flush=True)
