"""RQ: real workers on a real Redis, with RQ's scheduler and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.queues import EXAMPLES, check_windows, workers

pytest.importorskip("rq")

from fast_litellm_shm import RateLimitExceeded  # noqa: E402
from fast_litellm_shm.integrations.rq import limited_job  # noqa: E402

WORKER = ("rq.cli", "worker", "--url", "{}", "--logging_level", "INFO")
JOBS, LIMIT, PER = 15, 5, 2.0


def test_the_example_keeps_its_rate(segment_name: str, tmp_path: Path) -> None:
    commands = [(*WORKER, "--with-scheduler"), WORKER, WORKER]
    where = (segment_name, tmp_path, "REDIS", "unix")
    with workers(EXAMPLES / "rq", commands, *where) as found:
        found.python("jobs.py")
        started = found.wait_for("started", JOBS)
        assert sorted(line.what for line in started) == sorted(
            f"started {number}" for number in range(JOBS)
        ), "each once"
        check_windows(started, found.lines("asked"), LIMIT, PER)
        assert "no scheduler of RQ" not in found.told()


def test_without_a_scheduler_jobs_go_to_the_end_of_the_queue(
    segment_name: str, tmp_path: Path
) -> None:
    """And the log says what is missing."""
    where = (segment_name, tmp_path, "REDIS", "unix")
    with workers(Path(__file__).parent, [WORKER, WORKER], *where) as found:
        found.python("rq_jobs.py", "slow")
        assert len(found.lines("slow")) == 3
        check_windows(found.lines("slow"), found.lines("asks"), 1, 3.0)
        assert "no scheduler of RQ serves the queue 'default'" in found.told()


def test_jobs_of_all_kinds(segment_name: str, tmp_path: Path) -> None:
    """Dependents wait, retries are for failures alone, a helper that is limited is an error."""
    commands = [(*WORKER, "--with-scheduler"), WORKER]
    where = (segment_name, tmp_path, "REDIS", "unix")
    with workers(Path(__file__).parent, commands, *where) as found:
        found.python("rq_jobs.py")
        assert len(found.lines("job")) == 6
        assert [line.what for line in found.lines("job")][-1] == "job 9"
        for number in (0, 1):
            assert len(found.lines(f"fails {number}")) == 2
            assert len(found.lines(f"returns {number}")) == 2
        assert not found.lines("never")


def test_outside_a_worker_a_denial_is_an_error() -> None:
    @limited_job("1 per 24 hours window", key=lambda user: user)
    def plain(user: str) -> str:
        return user

    assert plain("ann") == "ann"
    with pytest.raises(RateLimitExceeded, match="key 'ann' has used up 1/86400s window"):
        plain("ann")
    assert plain("bob") == "bob"


def test_misuse_is_an_error_when_the_job_is_made() -> None:
    def function() -> None: ...

    with pytest.raises(ValueError, match="must be written as"):
        limited_job("ten a minute")(function)
    with pytest.raises(TypeError, match="needs a limit: @limited_job"):
        limited_job(function)  # type: ignore[arg-type]
