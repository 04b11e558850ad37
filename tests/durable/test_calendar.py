"""Windows of the calendar outlive a reboot: their end is a time of day, and the file names their
zone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from support.reboots import Host, link_of, spend

from fast_litellm_shm import FixedWindow, TokenBucket
from fast_litellm_shm.cli import main
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.durable import records

BERLIN = "Europe/Berlin"
DAILY = FixedWindow(1000, per="day", timezone=BERLIN)
HOUR = 3600


def at(*wall: int, zone: str = BERLIN) -> int:
    """A time of day, in ns since 1970."""
    year, month, day, hour, minute = (*wall, 0, 0)[:5]
    local = datetime(year, month, day, hour, minute, tzinfo=ZoneInfo(zone))
    return round(local.timestamp()) * 10**9


def begun(host: Host, *wall: int, zone: str = BERLIN) -> None:
    """The host is started at this time of day."""
    host.lose_power(down=(at(*wall, zone=zone) - host.time_of_day) / 1e9)


@pytest.mark.parametrize(
    ("stop", "least"), [(Host.reboot, 600), (Host.lose_power, 590)], ids=["clean", "power-cut"]
)
def test_a_daily_limit_of_which_400_were_used(
    host: Host, stop: Callable[..., None], least: int
) -> None:
    begun(host, 2027, 5, 3, 9, 0)
    assert spend(host.limiter(DAILY), "k", 400) == 400
    stop(host, down=60)
    assert least <= spend(host.limiter(DAILY), "k") <= 600
    stop(host, down=14 * HOUR + 57 * 60)  # 23:58
    assert not host.limiter(DAILY).acquire("k")
    stop(host, down=120)
    assert spend(host.limiter(DAILY), "k") == 1000


@pytest.mark.parametrize(
    ("begin", "hours"), [((2027, 3, 28), 23), ((2027, 10, 31), 25)], ids=["spring", "autumn"]
)
def test_over_a_change_of_summer_time(host: Host, begin: tuple[int, ...], hours: int) -> None:
    begun(host, *begin, 0, 1)
    assert spend(host.limiter(DAILY), "k", 700) == 700
    host.reboot(down=hours * HOUR - 120)  # a minute before midnight
    assert spend(host.limiter(DAILY), "k") == 300
    host.reboot(down=61)
    assert spend(host.limiter(DAILY), "k", 5) == 5


def test_each_limit_has_its_own_zone_whatever_their_order(host: Host) -> None:
    """A zone's index in a segment does not outlive it."""
    begun(host, 2027, 5, 3, 23, 0)
    tokyo = FixedWindow(50, per="day", timezone="Asia/Tokyo")  # 06:00 there
    assert spend(host.limiter(DAILY, name="berlin"), "k") == 1000
    assert spend(host.limiter(tokyo, name="tokyo"), "k") == 50
    host.reboot(down=2 * HOUR)
    assert not host.limiter(tokyo, name="tokyo").acquire("k")
    assert host.limiter(DAILY, name="berlin").acquire("k")
    host.reboot(down=17 * HOUR)  # 01:00 of the next day in Tokyo
    assert host.limiter(tokyo, name="tokyo").acquire("k")


def test_a_clock_that_is_set_back_begins_no_window_twice(host: Host) -> None:
    begun(host, 2027, 5, 3, 23, 30)
    assert spend(host.limiter(DAILY), "used") == 1000
    host.reboot(down=HOUR)  # 00:30
    assert spend(host.limiter(DAILY), "other") == 1000
    host.set_clock(host.time_of_day - 2 * HOUR * 10**9)  # 22:30
    assert spend(host.limiter(DAILY), "used") == 1000  # of the day that had begun
    for _ in range(3):
        host.reboot(down=60)
        assert not host.limiter(DAILY).acquire("other")
        assert not host.limiter(DAILY).acquire("used")
    begun(host, 2027, 5, 4, 23, 59)
    assert not host.limiter(DAILY).acquire("used")
    begun(host, 2027, 5, 5, 0, 1)
    assert spend(host.limiter(DAILY), "used", 9) == 9


def test_a_row_stays_while_the_time_of_day_stands_still(host: Host) -> None:
    """It is cleared when its window is over by the time of day, not by the file's clock."""
    begun(host, 2027, 5, 3, 22, 0)
    assert spend(host.limiter(DAILY), "k") == 1000
    host.set_clock(host.time_of_day - 10 * HOUR * 10**9)
    for _ in range(6):
        host.reboot(down=HOUR)
        limiter = host.limiter(DAILY)
        for i in range(3):
            limiter.acquire(f"other {i}")
            host.pass_time(2)
        assert b"k" in host.rows()
        assert not limiter.acquire("k")
    begun(host, 2027, 5, 4, 0, 5)
    limiter = host.limiter(DAILY)
    for i in range(3):
        limiter.acquire(f"other {i}")
        host.pass_time(2)
    assert b"k" not in host.rows()


def test_a_clock_that_was_wrong_by_more_than_a_day(host: Host) -> None:
    begun(host, 2028, 5, 3, 12, 0)  # a year ahead
    assert spend(host.limiter(DAILY), "k") == 1000
    host.reboot(down=60)
    host.set_clock(at(2027, 5, 3, 12, 0))
    assert spend(host.limiter(DAILY), "new") == 1000
    host.reboot(down=13 * HOUR)
    assert spend(host.limiter(DAILY), "new", 9) == 9


def test_limits_that_change_to_the_calendar_and_back(host: Host) -> None:
    begun(host, 2027, 5, 3, 20, 0)
    plain, weekly = FixedWindow(1000, per=HOUR), FixedWindow(2000, per="week")
    assert spend(host.limiter(plain), "k", 700) == 700
    host.reboot()
    assert spend(host.limiter(DAILY), "k", 200) == 200
    host.reboot()
    assert spend(host.limiter(weekly), "k") == 1100  # in the hour that had begun
    host.reboot()
    assert not host.limiter(TokenBucket(1000, per=HOUR)).acquire("k")
    host.reboot(down=2 * HOUR)
    assert host.limiter(DAILY).acquire("k")


def test_a_refund_does_not_go_to_the_next_window(host: Host) -> None:
    begun(host, 2027, 5, 3, 20, 0)
    limiter = host.limiter(DAILY)
    assert spend(limiter, "k", 500) == 500
    limiter.refund("k", 100)
    host.reboot()
    assert host.limiter(DAILY).peek("k").remaining == 600


def test_damage_denies_until_the_window_is_over(host: Host) -> None:
    begun(host, 2027, 5, 3, 20, 0)
    assert spend(host.limiter(DAILY), "k", 500) == 500
    host.reboot()
    Path(host.path).write_bytes(b"junk" * 1000)
    assert not host.limiter(DAILY).acquire("k")
    assert not host.limiter(DAILY).acquire("new")
    begun(host, 2027, 5, 4, 0, 1)
    assert spend(host.limiter(DAILY), "new", 9) == 9


def test_show_and_copies(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Background, "refill", lambda *_: None)  # none after save()
    begun(host, 2027, 5, 3, 20, 0)
    assert spend(host.limiter(DAILY), "k", 400) == 400
    link_of(host.limiter(DAILY)).save()
    copy, args = str(tmp_path / "copy.json"), ("--name", host.name)
    with records.opened(host.path) as db:
        (key,) = records.keys(db)
    assert key.states[0][:3] == (DAILY, 400, 600)
    assert main(["state", "show", "--json", *args]) == 0
    assert '"1000/day Europe/Berlin window"' in capsys.readouterr().out
    assert main(["state", "check", *args]) == 0
    assert main(["state", "export", copy, *args]) == 0
    host.lose_power(down=HOUR)
    Path(host.path).unlink()
    assert main(["state", "import", copy, *args]) == 0
    assert spend(host.limiter(DAILY), "k") == 600
    host.reboot(down=4 * HOUR)
    assert main(["state", "compact", *args]) == 0
    assert host.limiter(DAILY).acquire("k")
