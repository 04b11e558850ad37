"""A Quota whose requests and tokens a minute outlive a reboot."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
from support.names import remove
from support.reboots import Host, of_quota
from support.waiting import wait_until

from fast_litellm_shm import Quota
from fast_litellm_shm.cluster import settlement
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.durable import StateFile


def quota(host: Host, rpm: int | None = 50, tpm: int | None = 10_000, n: int | None = 2) -> Quota:
    made = Quota(
        rpm, tpm, n, name="team", segment=host.segment, durable=StateFile(host.folder)
    )  # fmt: skip
    host.links.append(of_quota(made))
    return made


@pytest.mark.parametrize(
    ("stop", "lost"), [(Host.reboot, 0), (Host.lose_power, 1)], ids=["clean", "power-cut"]
)
def test_rates_outlive_a_reboot_and_permits_do_not(
    host: Host, stop: Callable[..., None], lost: int
) -> None:
    first = quota(host)
    held = [first.admit("k", tokens=1000) for _ in range(2)]
    third = first.admit("k", tokens=1000)
    assert all(held) and not third
    assert third.reason == "max_parallel"
    assert first.in_flight("k") == 2
    for each in held:
        each.settle(tokens=1500)
        each.release()
    stop(host, down=1)
    again = quota(host)
    assert again.in_flight("k") == 0
    left = again.remaining("k")
    assert 48 - lost <= left["rpm"] <= 48
    assert 7000 - 100 * lost <= left["tpm"] <= 7000
    assert left["max_parallel"] == 2
    denied = again.admit("k", tokens=7001)
    assert (denied.allowed, denied.reason) == (False, "tpm")
    stop(host, down=60)
    assert quota(host).remaining("k") == {"rpm": 50, "tpm": 10_000, "max_parallel": 2}


def test_unused_tokens_come_back(host: Host) -> None:
    first = quota(host)
    with first.admit("k", tokens=9000) as admission:
        admission.settle(tokens=100)
    cancelled = first.admit("k", tokens=9000)
    cancelled.cancel()
    host.reboot(down=1)
    assert quota(host).remaining("k")["tpm"] == 9900


def test_on_an_event_loop(host: Host) -> None:
    async def main() -> None:
        made = quota(host)
        async with await made.admit_async("k", tokens=1000) as admission:
            assert admission
            admission.settle(tokens=2000)
        waited = await made.wait_async("k", tokens=1000, timeout=5)
        assert waited
        waited.release()

    asyncio.run(main())
    link = host.links[-1]
    settlement.report(link, settlement.taken(link))
    with link.ensure(Background).reporting:
        pass  # a thread has it
    host.reboot(down=1)
    assert quota(host).remaining("k")["tpm"] == 7000


def test_permits_alone_need_no_file(host: Host) -> None:
    made = Quota(max_parallel=2, name="parallel", segment=host.segment, durable=True)
    with made.admit("k") as admission:
        assert admission
    assert not os.path.exists(host.path)


def test_a_copy_is_durable_too(host: Host) -> None:
    first = quota(host, rpm=10, tpm=None, n=None)
    copy: Quota = pickle.loads(pickle.dumps(first))
    assert of_quota(copy) is of_quota(first)
    assert sum(bool(copy.admit("k")) + bool(first.admit("k")) for _ in range(20)) == 10


def test_a_name_that_is_too_long(host: Host) -> None:
    with pytest.raises(ValueError, match="name must be at most"):
        Quota(1, None, 1, name="n" * 300, segment=host.segment, durable=True)


_KILLED = """
import os, signal
from fast_litellm_shm import Quota
admission = Quota(rpm=1000, max_parallel=1, name="team", durable=True).admit("k")
print(bool(admission), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_gives_its_permit_back_and_its_request_stays(segment_name: str) -> None:
    for number in range(3):
        run = [sys.executable, "-c", _KILLED]
        said = subprocess.run(run, check=False, capture_output=True, text=True).stdout
        assert said == "True\n", number
        made = Quota(rpm=1000, max_parallel=1, name="team", durable=True)
        wait_until("the permit is back", lambda: made.in_flight("k") == 0)  # noqa: B023
    remove(os.environ["FAST_LITELLM_SHM_NAME"])
    left = Quota(rpm=1000, max_parallel=1, name="team", durable=True).remaining("k")["rpm"]
    assert 1000 - 3 - 10 <= left <= 997
