"""A Celery application whose task starts 10 times a second at most, over all workers of the host.

    celery --app tasks worker --concurrency 4
    python tasks.py          # sends 60 tasks; the worker's log shows when each starts

BROKER: the broker; default: a Redis on this machine.
"""

import os
import time

from celery import Celery

from fast_litellm_shm.integrations.celery import limited_task

app = Celery("tasks", broker=os.environ.get("BROKER", "redis://localhost:6379/0"))


def when(number: int) -> str:
    """One key for all: the rate is that of the mail server. (It could be a customer's.)"""
    tell(f"asked {number}")
    return "mails"


@app.task
@limited_task("10 per 1 s window", key=when)
def send(number: int) -> None:
    tell(f"started {number}")


def tell(what: str) -> None:
    """To the file that $STARTS names, or to the worker's log."""
    line = f"{time.monotonic():.6f} {os.getpid()} {what}\n"
    with open(os.environ.get("STARTS", "/dev/stdout"), "a", encoding="utf-8") as file:
        file.write(line)


if __name__ == "__main__":
    for one in range(60):
        send.delay(one)
