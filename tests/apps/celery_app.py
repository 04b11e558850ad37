"""Tasks of all kinds, for tests/apps/test_celery.py."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from celery import Celery, chain, chord, shared_task

from fast_litellm_shm.integrations.celery import limited_task

app = Celery("celery_app", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.result_expires = 60
app.conf.task_acks_late = True


def tell(what: str) -> None:
    line = f"{time.monotonic():.6f} {os.getpid()} {what}\n"
    with open(os.environ["STARTS"], "a", encoding="utf-8") as file:
        file.write(line)


@app.task
@limited_task("3 per 1 s window", key=lambda user, number: user)
def add(user: str, number: int) -> int:
    tell(f"add {user} {number}")
    return number


@app.task(bind=True, max_retries=1)
@limited_task("1 per 300 ms".replace("300 ms", "0.3 s"), key=lambda number: "bound")
def bound(self: Any, number: int) -> int:
    """Denied more often than it may be retried."""
    tell(f"bound {number} retries {self.request.retries} {self.request.headers}")
    return number


@app.task(autoretry_for=(ValueError,), retry_kwargs={"max_retries": 2, "countdown": 0})
@limited_task("1 per 0.3 s", key="fails")
def fails(number: int) -> None:
    """All its retries are for its failures."""
    tell(f"fails {number}")
    raise ValueError("as ever")


@shared_task
@limited_task("2 per 0.5 s window", name="together")
def shared(number: int) -> int:
    tell(f"shared {number}")
    return number


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
@limited_task("5 per minute", cost=9)
def never() -> None:
    tell("never")


@limited_task("1 per 24 hours window", name="helper")
def helper() -> str:
    return "helped"


@app.task
def outer() -> str:
    """Its helper is denied the second time: the task is not sent again for that."""
    return helper()


def run() -> None:
    """What the test sends, and what comes of it."""
    bounds = [bound.apply_async((i,), headers={"mine": "kept"}) for i in range(5)]
    failed = [fails.delay(i) for i in range(2)]
    chained = chain(add.s("ann", 1), total_of.s(2), add_bob.s()).apply_async()
    united = chord([shared.s(i) for i in range(6)], total.s()).apply_async()
    assert sorted(each.get(timeout=60) for each in bounds) == [0, 1, 2, 3, 4]
    for each in failed:
        assert "as ever" in str(each.get(timeout=60, propagate=False))
    assert chained.get(timeout=60) == 3
    assert united.get(timeout=60) == 15
    assert outer.delay().get(timeout=60) == "helped"
    for task in (outer, never):
        error = task.delay().get(timeout=60, propagate=False)
        assert type(error).__name__ == "RateLimitExceeded", error
    app.close()


@app.task
def total_of(one: int, two: int) -> int:
    return one + two


@app.task
@limited_task("3 per 1 s window", name="bob")
def add_bob(number: int) -> int:
    return number


if __name__ == "__main__":
    importlib.import_module("celery_app").run()  # by the name that the workers know
