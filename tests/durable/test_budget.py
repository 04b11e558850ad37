"""Budgets whose money outlives a reboot: never more than the budget, a hundredth lost at most."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal as D
from pathlib import Path
from typing import Any

import pytest
from support.names import remove
from support.reboots import Host, books_of
from support.waiting import wait_until

from fast_litellm_shm import Budget, Quota, Segment, exceptions
from fast_litellm_shm.cli import main
from fast_litellm_shm.durable import StateFile
from fast_litellm_shm.limiters.budget import Reservation

HOUR = 3600


def budget(host: Host, usd: object = 50, per: str | None = "day", **given: Any) -> Budget:
    given.setdefault("durable", StateFile(host.folder))
    made = Budget(usd, per, name="team", segment=host.segment, **given)  # type: ignore[arg-type]
    host.links.append(books_of(made).link)
    return made


def call(of: Budget, usd: str, cost: str | None = None, key: str = "k") -> bool:
    with of.reserve(key, usd) as reservation:
        if reservation:
            reservation.settle(usd if cost is None else cost)
        return bool(reservation)


def calls(of: Budget, usd: str, most: int = 10_000, key: str = "k") -> int:
    for count in range(most):
        if not call(of, usd, key=key):
            return count
    return most


def transactions(host: Host) -> int:
    from fast_litellm_shm._shared import performance
    from fast_litellm_shm.durable.link import COMPONENT

    stats = performance.segment_stats(host.segment, COMPONENT).get(COMPONENT)
    return 0 if stats is None else int(stats["total_calls"])


@pytest.mark.parametrize(
    ("stop", "lost"), [(Host.reboot, "0"), (Host.lose_power, "0.5")], ids=["clean", "power-cut"]
)
def test_over_a_reboot(host: Host, stop: Callable[..., None], lost: str) -> None:
    first = budget(host)
    assert calls(first, "0.1", 200) == 200
    assert first.spent("k") == 20
    stop(host)
    again = budget(host)
    assert D(20) <= again.spent("k") <= 20 + D(lost)
    assert D(30) - D(lost) <= again.remaining("k") <= 30
    assert 295 <= calls(again, "0.1") <= 300
    assert not call(again, "0.1")
    stop(host)
    assert not call(budget(host), "0.1")
    stop(host, down=24 * HOUR)
    fresh = budget(host)
    assert fresh.spent("k") == 0
    assert calls(fresh, "1") == 50


def test_many_power_cuts_never_spend_more(host: Host) -> None:
    spent = D(0)
    for _ in range(30):
        spent += calls(budget(host, 10), "0.01", 20) * D("0.01")
        host.lose_power(down=1)
    spent += calls(budget(host, 10), "0.01") * D("0.01")
    assert 10 - 31 * D("0.1") <= spent <= 10


def test_calls_within_a_lease_write_nothing(host: Host) -> None:
    made = budget(host, 1000)
    assert call(made, "0.01")
    before = transactions(host)
    assert calls(made, "0.01", 400) == 400
    assert transactions(host) == before
    assert calls(made, "0.01", 4000) == 4000
    assert transactions(host) - before <= 12


def test_a_lease_is_a_hundredth_at_most(host: Host) -> None:
    made = budget(host, 10)
    for i in range(300):
        assert call(made, "0.03", f"0.0{i % 3}1")
        found = made._look(b"k")
        assert found.granted - found.spent <= 10**8


def test_what_is_reserved_at_a_cut_counts_as_spent(host: Host) -> None:
    made = budget(host)
    held = made.reserve("k", 7)
    assert held
    host.lose_power()
    again = budget(host)
    assert 7 <= again.spent("k") <= D("7.5")
    assert not again.reserve("k", 43)


def test_what_was_settled_beyond_is_not_forgotten(host: Host) -> None:
    made = budget(host)
    assert call(made, "0.01", "60")
    host.lose_power()
    again = budget(host)
    assert again.spent("k") == 60
    assert not again.reserve("k", "0.01")


def test_charges_refunds_and_additions(host: Host) -> None:
    made = budget(host)
    made.charge("k", 49)
    made.add("k", 20)
    host.lose_power()
    made = budget(host)
    assert (made.usage("k").limit, made.remaining("k")) == (D(70), D(21) - (made.spent("k") - 49))
    assert made.reserve("k", "20.5")
    made = budget(host)
    made.refund("k", 30)
    made.add("k", -5)
    host.lose_power()
    made = budget(host)
    usage = made.usage("k")
    assert usage.limit == 65
    assert 19 <= usage.spent <= 20
    host.lose_power()
    made = budget(host)
    made.refund("k", 10)  # the first call: what was spent is in the file alone
    assert 9 <= made.spent("k") <= 10


def test_an_amount_that_only_an_addition_has_room_for(host: Host) -> None:
    budget(host, 10).add("k", 50)
    host.lose_power()
    assert budget(host, 10).reserve("k", 55)


def test_reset(host: Host) -> None:
    made = budget(host)
    for key in ("a", "b"):
        assert call(made, "40", key=key)
    made.reset("a")
    host.lose_power()
    made = budget(host)
    assert made.spent("a") == 0
    assert 40 <= made.spent("b") <= D("40.5")
    made.reset()
    host.lose_power()
    made = budget(host)
    assert made.spent("b") == 0
    assert call(made, "50", key="b")


def test_unused_money_comes_back(host: Host) -> None:
    made = budget(host)
    books = books_of(made)
    for _ in range(20):  # each leaves 9 of 10 dollars over
        assert call(made, "10", "1")
        books.give_back(made, b"k")
        found = made._look(b"k")
        assert found.granted - found.spent <= 10**9 // 2
    host.lose_power()
    assert 20 <= budget(host).spent("k") <= D("20.25")


def test_a_thread_takes_back_what_is_left(host: Host) -> None:
    made = budget(host)
    held = [made.reserve("k", 5) for _ in range(8)]
    for each in held:
        each.settle("0.01")
    found = made._look(b"k")
    wait_until("it is taken back", lambda: made._look(b"k").granted < 6 * 10**9)
    assert found.spent == 8 * 10**7


def test_forever_and_other_windows(host: Host) -> None:
    forever = budget(host, 5, None)
    assert calls(forever, "1") == 5
    host.reboot(down=500 * 24 * HOUR)
    assert not call(budget(host, 5, None), "1")
    assert books_of(budget(host, 5, None)).history(b"k") == [(2**28 - 1, 5 * 10**9)]


def test_history(host: Host) -> None:
    for spent in (3, 4, 5):
        assert call(budget(host), str(spent))
        host.reboot(down=24 * HOUR)
    made = budget(host)
    assert call(made, "0.5")
    found = made.history("k")
    assert [each.usd for each in found] == [D("0.5"), 5, 4, 3]
    assert [str(each.ends) for each in found[:2]] == [
        "2027-01-19 00:00:00+00:00", "2027-01-18 00:00:00+00:00",
    ]  # fmt: skip
    plain = Budget(5, None, name="plain", segment=host.segment)
    assert call(plain, "1")
    assert [(each.ends, each.usd) for each in plain.history("k")] == [(None, D(1))]


def test_a_window_that_is_over_while_it_is_open(host: Host) -> None:
    made = budget(host)
    held = made.reserve("k", 20)
    assert call(made, "5")
    host.pass_time(24 * HOUR)  # midnight, in the middle of a call
    assert made.spent("k") == 0
    assert made.remaining("k") == 30
    held.settle(21)
    assert made.spent("k") == 21
    host.lose_power(down=1)
    assert 21 <= budget(host).spent("k") <= D("21.5")


def test_the_clock_set_back_begins_no_window_twice(host: Host) -> None:
    assert calls(budget(host), "1") == 50
    host.reboot(down=24 * HOUR)
    assert calls(budget(host), "1") == 50
    host.set_clock(host.time_of_day - 23 * HOUR * 10**9)
    host.lose_power(down=0)
    assert not call(budget(host), "1")
    host.lose_power(down=24 * HOUR)
    assert not call(budget(host), "1")


def test_threads_never_pass_it(host: Host) -> None:
    made = budget(host, 10)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: calls(made, "0.01"), range(8)))
    assert sum(found) <= 1000
    assert sum(found) >= 990
    assert made.spent("k") <= 10


_SPENDS = """
from fast_litellm_shm import Budget
from fast_litellm_shm.durable import StateFile
budget, count = Budget(20, "year", name="team", durable=StateFile(timeout=60)), 0
while True:
    with budget.reserve("k", "0.01") as reservation:
        if not reservation:
            break
        reservation.settle("0.01" if count % 2 else "0.003")
        count += 1
print(count)
"""


def test_processes_never_pass_it(folder: Path) -> None:
    all_of_them = [
        subprocess.Popen([sys.executable, "-c", _SPENDS], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert 2000 <= sum(int(each.communicate()[0]) for each in all_of_them) <= 20_000 / 3
    remove(os.environ["FAST_LITELLM_SHM_NAME"])
    spent = Budget(20, "year", name="team", durable=True).spent("k")
    assert D("19.95") <= spent <= 20


def test_two_segments_of_one_name(host: Host) -> None:
    """Processes that have not noticed that it was removed."""
    spent, others = 0, []
    for _ in range(20):
        others.append(budget(host, 10))
        for each in others[-3:]:
            spent += calls(each, "0.01", 10)
        host.remove_segment()
    spent += sum(calls(each, "0.01") for each in others)
    assert spent <= 1000


def test_on_an_event_loop(host: Host) -> None:
    made = budget(host, durable=StateFile(host.folder, timeout=30))
    assert call(made, "1", key="first")
    other = sqlite3.connect(host.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def main() -> None:
        asked = asyncio.create_task(made.reserve_async("k", 1))
        for _ in range(20):  # the loop runs, while a thread waits for the file
            await asyncio.sleep(0.001)
        assert not asked.done()
        other.execute("ROLLBACK")
        reservation = await asked
        assert reservation
        reservation.settle(1)
        both = await made.reserve_async("k", 1, also=[(made, "org")])
        assert both
        both.release()

    asyncio.run(main())
    other.close()
    assert made.spent("k") == 1


def test_a_quota_with_a_durable_budget(host: Host) -> None:
    quota = Quota(10, name="q", segment=host.segment, budget=budget(host, 1))
    with quota.admit("k", usd="0.9") as admission:
        admission.settle(0, usd="0.8")
    host.reboot()
    again = Quota(10, name="q", segment=host.segment, budget=budget(host, 1))
    assert again.admit("k", usd="0.3").reason == "budget"

    async def main() -> None:
        async with await again.admit_async("k", usd="0.1") as admission:
            assert admission

    asyncio.run(main())


def test_a_copy_is_durable_too(host: Host) -> None:
    first = budget(host, 10)
    copy: Budget = pickle.loads(pickle.dumps(first))
    assert books_of(copy).link is books_of(first).link
    assert call(first, "6")
    assert not call(copy, "6")


def test_a_fork(host: Host) -> None:
    made = budget(host, 10)
    assert call(made, "2")
    pid = os.fork()
    if not pid:
        os._exit(not call(made, "3"))
    assert os.waitpid(pid, 0)[1] == 0
    assert made.spent("k") == 5
    assert calls(made, "1") == 5


# faults


@pytest.mark.parametrize(
    ("how", "seen", "unseen"),
    [("local", True, False), ("deny", False, False), ("allow", True, True)],
)
def test_an_outage(host: Host, how: str, seen: bool, unseen: bool) -> None:
    made = budget(host, 10, durable=StateFile(host.folder, on_outage=how, timeout=0.05))
    assert call(made, "0.5")
    other = sqlite3.connect(host.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert call(made, "3") is seen
    assert call(made, "3", key="new") is unseen
    denied = made.reserve("another", "3")
    if not unseen:  # its window ends hours later, which has nothing to do with it
        said = "Budget not granted (team): its state file or server cannot be used"
        assert denied.reason == said and 0 < (denied.retry_after or 0) < 10
    denied.release()
    assert not call(made, "9")
    assert made.reserve("k", "11").reason == "Budget exceeded (team)"
    with pytest.raises(exceptions.StateFileError, match="nothing was changed"):
        made.add("k", 5)
    other.execute("ROLLBACK")
    other.close()
    link = books_of(made).link
    wait_until("the file is back", lambda: link.outage is None)
    assert call(made, "0.2")
    books_of(made).give_back(made, b"k")
    host.lose_power(down=1)
    spent = budget(host, 10).spent("k")
    assert spent >= (D("3.7") if seen else D("0.7"))


def test_a_signal_between_a_commit_and_its_grant(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler reserves too, in the same thread: neither has the other's grant."""
    made = budget(host, 100)
    store, handler = books_of(made).link.store, [lambda: call(made, "7", key="handler")]
    whole = store.transaction

    @contextmanager
    def interrupted(write: bool = True) -> Iterator[Any]:
        with whole(write) as t:
            yield t
        while handler:
            handler.pop()()

    monkeypatch.setattr(store, "transaction", interrupted)
    assert call(made, "3")
    for key, least in (("k", "3"), ("handler", "7")):
        granted = D(made._look(key.encode()).granted) / 10**9
        assert D(least) <= granted <= D(least) + 1
        with closing(sqlite3.connect(host.path)) as db:
            asked = "SELECT granted FROM money WHERE name = ?"
            [[in_file]] = db.execute(asked, (key.encode(),)).fetchall()
        assert D(in_file) / 10**9 == granted


def test_damage_counts_as_spent(host: Host) -> None:
    assert call(budget(host), "1")
    host.reboot()
    Path(host.path).write_bytes(b"junk" * 1000)
    made = budget(host)
    assert not call(made, "1")
    assert not call(made, "1", key="new")
    made.reset("k")
    assert call(made, "1")
    host.reboot(down=24 * HOUR)
    assert call(budget(host), "1", key="new")


def test_a_row_that_is_no_state(host: Host) -> None:
    assert call(budget(host), "1")
    host.reboot()
    with sqlite3.connect(host.path) as db:
        db.execute("UPDATE money SET granted = -5")
    db.close()
    assert not call(budget(host), "1")
    assert call(budget(host), "1", key="other")


def test_dropped_within_a_transaction(host: Host) -> None:
    """The collector ends a call while its thread writes."""
    made = budget(host)
    held: list[Reservation] = [made.reserve("k", 20)]
    books = books_of(made)

    def drop(_: object) -> bool:
        held.pop()  # 20 dollars are left over
        return True

    assert books._in_file(drop)
    assert made._look(b"k").reserved == 0
    wait_until("it is taken back", lambda: made._look(b"k").granted < 10**9)


def test_the_command_line(host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(budget(host), "2", key="team-a")
    budget(host).add("team-a", 5)
    copy, args = str(tmp_path / "copy.json"), ("--name", host.name)
    assert main(["save", *args]) == 0
    assert capsys.readouterr().out == "Gave back 0.25 dollars of 1 key.\n"
    assert main(["save", *args]) == 0
    assert "Nothing to give back" in capsys.readouterr().out
    assert main(["state", "show", *args]) == 0
    assert "team-a" in capsys.readouterr().out
    assert main(["state", "show", "--json", *args]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["budgets"]
    assert (shown["budget"], shown["granted_usd"], shown["added_usd"]) == ("team", "2", "5")
    assert main(["state", "export", copy, *args]) == 0
    host.lose_power()
    Path(host.path).unlink()
    assert main(["state", "import", copy, *args]) == 0
    usage = budget(host).usage("team-a")
    assert (usage.spent, usage.limit) == (D(2), D(55))
    assert main(["state", "check", *args]) == 0
    host.lose_power()
    with sqlite3.connect(host.path) as db:
        db.execute("UPDATE money SET granted = 'x'")
    db.close()
    capsys.readouterr()
    assert main(["state", "check", *args]) == 1
    assert "money that is none" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["hashed", "off"])
def test_where_the_segment_keeps_no_names(
    host: Host, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host.remove_segment()
    remove(host.name)
    host.segment = Segment(host.name, capacity=1000, names=names)
    assert call(budget(host), "2", key="secret-key")
    assert main(["save", "--name", host.name]) == 0
    host.lose_power()
    assert budget(host).spent("secret-key") == 2
    assert b"secret-key" not in Path(host.path).read_bytes()


def test_no_file_without_durable(host: Host) -> None:
    made = Budget(5, name="plain", segment=host.segment)
    assert call(made, "1")
    assert not os.path.exists(host.path)


def test_an_import_forgets_no_budget_of_a_file_without_limiters(host: Host, tmp_path: Path) -> None:
    budget(host).charge("k", 10)
    copy = tmp_path / "copy.json"
    args = ("--name", host.name)
    assert main(["state", "export", str(copy), *args]) == 0
    exported = json.loads(copy.read_text())
    copy.write_text(json.dumps({**exported, "budgets": [], "secret": "ab" * 32}))
    assert main(["state", "import", str(copy), *args]) == 0
    copy.write_text(json.dumps({**exported, "budgets": [], "secret": "ab"}))
    assert main(["state", "import", str(copy), *args]) == 1
    host.reboot()
    assert budget(host).spent("k") >= 10


def test_a_refund_after_a_save_comes_back_at_a_stop(host: Host) -> None:
    made = budget(host)
    made.charge("k", "0.01")  # less than what may stay granted
    books_of(made).link.save()
    made.refund("k", "0.01")
    host.reboot()
    assert budget(host).spent("k") == 0
