"""Celery: a rate for a task, over all workers of the host.

    pip install "fast-litellm-shm[celery]"

::

    from fast_litellm_shm.integrations.celery import limited_task

    @app.task
    @limited_task("100 per minute")
    def send(address): ...

A task beyond the rate goes back to its queue, and comes again when there is room. See
docs/celery.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

try:
    from celery import current_task
    from celery.exceptions import Reject, Retry
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.celery needs Celery: pip install "fast-litellm-shm[celery]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations._tasks import Key, TaskLimit, name_of
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost
from fast_litellm_shm.limits import Spelled

__all__ = ["limited_task"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def limited_task(
    *limits: Spelled,
    key: Key | Callable[..., Key | None] = "default",
    cost: Cost | Callable[..., Cost] = 1,
    name: str | None = None,
    longest_delay: float = 600,
    segment: Segment | None = None,
    cluster: ClusterArgument = None,
) -> Callable[[_Function], _Function]:
    """Limit how often a task starts. Write it below the decorator that makes the task.

    limits: 1 to 4 of TokenBucket, FixedWindow, SlidingWindow, or text. key: a key, or a function of
    the task's arguments (without ``self`` of a bound task) that gives one; where it gives None, the
    task is not limited. cost: what a task consumes, or a function of its arguments. name: tasks
    with the same name share their limit; default: the function's own. longest_delay: seconds after
    which a denied task comes back at the latest, to be denied again perhaps. It must be shorter
    than the ``visibility_timeout`` of Redis, or the ``consumer_timeout`` of RabbitMQ. segment,
    cluster: as of a RateLimiter.

    A denied task is sent again, with a countdown, under its own id, and its state is RETRY. That is
    no retry of the task's: ``request.retries`` stays, so ``max_retries`` and ``autoretry_for``
    count failures alone. Callbacks, chains, groups, chords and headers stay too. Where no worker
    calls the function (a plain call, ``apply()``, ``task_always_eager``), a denial raises
    RateLimitExceeded; so does a cost that never fits.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment.
    """
    _checked("limited_task", limits)

    def decorate(function: _Function) -> _Function:
        called = name_of("limited_task", function)
        limit = TaskLimit(
            "limited_task",
            limits,
            key=key,
            cost=cost,
            name=f"celery {called}" if name is None else name,
            longest_delay=longest_delay,
            held=None,
            segment=segment,
            cluster=cluster,
        )

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            task = current_task._get_current_object() if current_task else None
            bound = task is not None and bool(args) and args[0] is task
            found, charged = limit.asked(args[1:] if bound else args, kwargs)
            if found is not None:
                if not _by_worker(task, wrapper):
                    limit.take(called, found, charged)
                elif (seconds := limit.delay(called, found, charged)) is not None:
                    _send_again(task, seconds)
            return function(*args, **kwargs)

        return cast(_Function, wrapper)

    return decorate


def _checked(owner: str, limits: tuple[Any, ...]) -> None:
    if not limits or callable(limits[0]):
        raise TypeError(f'{owner} needs a limit: @{owner}("100 per minute")')


def _by_worker(task: Any, wrapper: Any) -> bool:
    """Does a worker run this task, and is the function its own? Another function that the task
    calls is limited too, but the task is not to come back for it."""
    if task is None or task.request.called_directly or task.request.is_eager:
        return False
    run: Any = getattr(task, "_orig_run", None) or task.run  # below autoretry_for
    run = getattr(run, "__func__", run)
    while run is not None and run is not wrapper:
        run = getattr(run, "__wrapped__", None)
    return run is wrapper


def _send_again(task: Any, seconds: float) -> None:
    """As Task.retry() does it, but ``retries`` stays as it is."""
    request = task.request
    signature = task.signature_from_request(
        request, countdown=seconds, eta=None, retries=request.retries
    )
    try:
        signature.apply_async()
    except Exception as error:  # the broker is away: as Task.retry() does
        raise Reject(error, requeue=False) from error
    raise Retry("its rate limit is used up", when=seconds, is_eager=False, sig=signature)
