"""Celery: real workers (prefork, 4 processes) on a real Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.queues import EXAMPLES, check_windows, workers

pytest.importorskip("celery")

from celery import Celery  # noqa: E402

from fast_litellm_shm import RateLimitExceeded, Segment  # noqa: E402
from fast_litellm_shm.integrations.celery import limited_task  # noqa: E402

WORKER = ("worker", "--concurrency", "4", "--loglevel", "INFO", "--without-gossip")
TASKS, LIMIT, PER = 60, 10, 1.0


def test_the_example_keeps_its_rate(segment_name: str, tmp_path: Path) -> None:
    """60 tasks at 10 a second: no window has more, all are done in the end, and each denied task
    comes back about once: not all of them at each window."""
    command = ("celery", "--app", "tasks", *WORKER)
    folder = EXAMPLES / "celery"
    where = (segment_name, tmp_path, "BROKER", "redis+socket")
    with workers(folder, [command], *where) as found:
        found.python("tasks.py")
        started = found.wait_for("started", TASKS)
        asked = found.lines("asked")
        assert sorted(line.what for line in started) == sorted(
            f"started {number}" for number in range(TASKS)
        ), "each once"
        assert len({line.pid for line in started}) > 1, "one process did it all"
        check_windows(started, asked, LIMIT, PER)
        # All at each window would be 60 + 50 + 40 + 30 + 20 + 10 = 210.
        assert len(asked) < 3 * TASKS


def test_tasks_of_all_kinds(segment_name: str, tmp_path: Path) -> None:
    """bind, autoretry_for, chains, chords, headers, shared_task, a helper that is limited."""
    command = ("celery", "--app", "celery_app", *WORKER)
    folder = Path(__file__).parent
    where = (segment_name, tmp_path, "BROKER", "redis+socket")
    with workers(folder, [command], *where) as found:
        found.python("celery_app.py")
        bounds = found.lines("bound")
        assert len(bounds) == 5
        assert all("retries 0" in line.what for line in bounds), "a denial is no retry"
        assert all("kept" in line.what for line in bounds)
        assert len(found.lines("fails 0")) == len(found.lines("fails 1")) == 3
        assert "Retry in" in found.told()
        assert not found.lines("never")


def test_outside_a_worker_a_denial_is_an_error() -> None:
    app = Celery("outside", broker="memory://")

    @app.task
    @limited_task("1 per 24 hours window", key=lambda user: user)
    def plain(user: str) -> str:
        return user

    @app.task(bind=True)
    @limited_task("1 per 24 hours window", key=lambda user: user)
    def bound(self: Any, user: str) -> str:
        assert self.name
        return user

    for task in (plain, bound):
        assert task("ann") == "ann"
        with pytest.raises(
            RateLimitExceeded, match="key 'ann' has used up 1/86400s window"
        ) as info:
            task("ann")
        assert info.value.retry_after is not None
        assert task("bob") == "bob"
        assert task.apply(("carl",)).get() == "carl"
        assert isinstance(task.apply(("carl",)).result, RateLimitExceeded)
    app.conf.task_always_eager = True
    assert plain.delay("dora").get() == "dora"
    assert plain.delay("dora").failed()


def test_no_key_no_limit() -> None:
    @limited_task("1 per 24 hours window", key=lambda user: None)
    def plain(user: str) -> str:
        return user

    assert [plain("ann") for _ in range(3)] == ["ann"] * 3


def test_misuse_is_an_error_when_the_task_is_made() -> None:
    app = Celery("wrong", broker="memory://")

    @app.task
    def task() -> None: ...

    async def coroutine() -> None: ...

    def function() -> None: ...

    for wrong, says in (
        (lambda: limited_task("ten a minute")(function), "must be written as"),
        (lambda: limited_task()(function), "needs a limit"),
        (lambda: limited_task(function), "needs a limit: @limited_task"),  # type: ignore[arg-type]
        (lambda: limited_task("1/s")(task), "write it below the decorator that makes the task"),
        (lambda: limited_task("1/s")(coroutine), "must be a plain function"),
        (lambda: limited_task("1/s", key=1)(function), "key must be a str"),  # type: ignore[arg-type]
        (lambda: limited_task("1/s", longest_delay=0)(function), "must be 1 s or more"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            wrong()


def test_a_damaged_segment_sends_the_task_again() -> None:
    """It is not lost, and does not run uncounted."""
    from support.damage import damage_limits

    from fast_litellm_shm.integrations._tasks import TaskLimit

    limit = TaskLimit(
        "limited_task",
        ("5 per minute",),
        key="k",
        cost=1,
        name="damaged",
        longest_delay=60,
        held=None,
        segment=None,
        cluster=None,
    )
    assert limit.delay("task", "k", 1) is None
    damage_limits(Segment.default(), 0)
    assert limit.delay("task", "k", 1) == 10
