"""Jobs of all kinds, for tests/apps/test_rq.py."""

from __future__ import annotations

import importlib
import os
import sys
import time

from redis import Redis
from rq import Queue, Retry
from rq.job import Job

from fast_litellm_shm.integrations.rq import limited_job


def tell(what: str) -> None:
    line = f"{time.monotonic():.6f} {os.getpid()} {what}\n"
    with open(os.environ["STARTS"], "a", encoding="utf-8") as file:
        file.write(line)


@limited_job("2 per 2 s window", name="rq tests")
def job(number: int) -> int:
    tell(f"job {number}")
    return number


def asks(number: int) -> str:
    tell(f"asks {number}")
    return "slow"


@limited_job("1 per 3 s window", name="rq slow", key=asks)
def slow(number: int) -> int:
    tell(f"slow {number}")
    return number


@limited_job("1 per 2 s window", name="rq failing")
def fails(number: int) -> None:
    tell(f"fails {number}")
    raise ValueError("as ever")


@limited_job("1 per 2 s window", name="rq returning")
def returns(number: int) -> object:
    """Its own Retry: of these it may have one."""
    tell(f"returns {number}")
    return Retry(max=1)


@limited_job("1 per 24 hours window", name="rq helper")
def helper() -> str:
    return "helped"


def outer() -> str:
    return helper()


@limited_job("5 per minute", cost=9)
def never() -> None:
    tell("never")


def queued() -> Queue:
    return Queue(connection=Redis.from_url(os.environ["REDIS"]))


def ended(jobs: list[Job]) -> list[str]:
    """Their states, when all have ended."""
    end = time.monotonic() + 60
    while True:
        states = [job.get_status().value for job in jobs]
        if time.monotonic() > end or all(each in ("finished", "failed") for each in states):
            return states
        time.sleep(0.05)


def send() -> None:
    """What the test enqueues."""
    rq_jobs = importlib.import_module("rq_jobs")  # by the name that workers know

    queue = queued()
    jobs = [queue.enqueue(rq_jobs.job, number) for number in range(5)]
    jobs.append(queue.enqueue(rq_jobs.job, 9, depends_on=list(jobs)))
    jobs.append(queue.enqueue(rq_jobs.outer))
    failed = [queue.enqueue(rq_jobs.fails, i, retry=Retry(max=1)) for i in range(2)]
    failed += [queue.enqueue(rq_jobs.returns, i) for i in range(2)]
    failed.append(queue.enqueue(rq_jobs.never))
    assert ended(jobs) == ["finished"] * 7
    assert [each.return_value() for each in jobs] == [0, 1, 2, 3, 4, 9, "helped"]
    assert ended(failed) == ["failed"] * 5
    queue.connection.close()


def send_slow() -> None:
    rq_jobs = importlib.import_module("rq_jobs")  # by the name that workers know

    queue = queued()
    assert ended([queue.enqueue(rq_jobs.slow, i) for i in range(3)]) == ["finished"] * 3
    queue.connection.close()


if __name__ == "__main__":
    (send_slow if sys.argv[1:] == ["slow"] else send)()
