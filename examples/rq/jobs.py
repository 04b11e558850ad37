"""RQ jobs that start 5 times in 2 seconds at most, over all workers of the host.

    rq worker --with-scheduler &
    rq worker &
    python jobs.py          # enqueues 15 jobs; the workers' logs show when each starts

REDIS: the server; default: a Redis on this machine.
"""

import os
import time

from fast_litellm_shm.integrations.rq import limited_job


def when(number: int) -> str:
    """One key for all: the rate is that of the mail server. (It could be a customer's.)"""
    tell(f"asked {number}")
    return "mails"


@limited_job("5 per 2 s window", key=when)
def send(number: int) -> int:
    tell(f"started {number}")
    return number


def tell(what: str) -> None:
    """To the file that $STARTS names, or to the worker's log."""
    line = f"{time.monotonic():.6f} {os.getpid()} {what}\n"
    with open(os.environ.get("STARTS", "/dev/stdout"), "a", encoding="utf-8") as file:
        file.write(line)


def main() -> None:
    from redis import Redis
    from rq import Queue

    with Redis.from_url(os.environ.get("REDIS", "redis://localhost:6379/0")) as connection:
        queue = Queue(connection=connection)
        for one in range(15):
            queue.enqueue("jobs.send", one)  # by the name that workers know


if __name__ == "__main__":
    main()
