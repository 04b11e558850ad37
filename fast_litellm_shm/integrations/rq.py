"""RQ: a rate for a job, over all workers of the host.

    pip install "fast-litellm-shm[rq]"

::

    from fast_litellm_shm.integrations.rq import limited_job

    @limited_job("100 per minute")
    def send(address): ...

    queue.enqueue(send, "ann@example.com")

A job beyond the rate is scheduled again, for when there is room: give one worker
``--with-scheduler``. See docs/celery.md.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

try:
    from rq import Retry, get_current_job
    from rq.scheduler import RQScheduler
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.rq needs RQ: pip install "fast-litellm-shm[rq]"'
    ) from error

from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations._tasks import Key, TaskLimit, name_of
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost
from fast_litellm_shm.limits import Spelled

__all__ = ["limited_job"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_HELD = 1.0  # s that a job waits in its worker: the scheduler's clock has whole seconds
_UNSCHEDULED = 5.0  # s that it waits there at most, where there is no scheduler
_NO_END = 2**31  # retries
_KEPT = "fast_litellm_shm_retries"  # in a job's meta, while it waits


def limited_job(
    *limits: Spelled,
    key: Key | Callable[..., Key | None] = "default",
    cost: Cost | Callable[..., Cost] = 1,
    name: str | None = None,
    longest_delay: float = 600,
    segment: Segment | None = None,
    cluster: ClusterArgument = None,
) -> Callable[[_Function], _Function]:
    """Limit how often a job starts. Write it below ``@job``, where there is one.

    limits, key, cost, name, longest_delay, segment, cluster: as of
    :func:`fast_litellm_shm.integrations.celery.limited_task`.

    A job that has to wait for up to a second waits in its worker. Else it is scheduled again, under
    its own id: that is no retry of the job's (``Retry(max=3)`` counts failures alone), and the jobs
    that depend on it wait. RQ moves scheduled jobs only where a worker runs ``--with-scheduler``.
    If none does, the log says so, and a denied job waits up to 5 s in its worker, then goes to the
    end of its queue. Where no worker calls the function (a plain call, ``is_async=False``), a
    denial raises RateLimitExceeded; so does a cost that never fits.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment.
    """
    if not limits or callable(limits[0]):
        raise TypeError('limited_job needs a limit: @limited_job("100 per minute")')

    def decorate(function: _Function) -> _Function:
        called = name_of("limited_job", function)
        limit = TaskLimit(
            "limited_job",
            limits,
            key=key,
            cost=cost,
            name=f"rq {called}" if name is None else name,
            longest_delay=longest_delay,
            held=_HELD,
            segment=segment,
            cluster=cluster,
        )

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found, charged = limit.asked(args, kwargs)
            if found is not None:
                job = get_current_job()
                if not _by_worker(job, function):
                    limit.take(called, found, charged)
                    return function(*args, **kwargs)
                _restore(job)
                if (seconds := limit.delay(called, found, charged)) is not None:
                    return _later(job, seconds)
            return function(*args, **kwargs)

        return cast(_Function, wrapper)

    return decorate


def _by_worker(job: Any, function: Any) -> bool:
    """Does a worker run this job, and is the function its own? Another function that the job calls
    is limited too, but the job is not to come back for it."""
    if job is None or job.worker_name in (None, "", "sync"):
        return False
    name: str = function.__name__
    return str(job.func_name).rpartition(".")[2] == name


def _restore(job: Any) -> None:
    """RQ counts how often a job has returned a Retry, in some releases only where it has no
    interval. What we return is none of the job's own."""
    if _KEPT in job.meta:
        job.number_of_retries = job.meta.pop(_KEPT)
        job.save_meta()


def _later(job: Any, seconds: float) -> Retry:
    """What a job returns to be run again."""
    job.meta[_KEPT] = job.number_of_retries
    job.save_meta()
    if job.connection.exists(RQScheduler.get_locking_key(job.origin)):
        return Retry(max=_NO_END, interval=math.ceil(seconds))
    settings.warn_once(
        f"no scheduler of RQ serves the queue {job.origin!r}: jobs that a rate limit denied wait "
        f"in their worker, up to {_UNSCHEDULED:g} s each time; start a worker with --with-scheduler"
    )
    time.sleep(min(seconds, _UNSCHEDULED))
    return Retry(max=_NO_END)
