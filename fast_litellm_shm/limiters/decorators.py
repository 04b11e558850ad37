"""@limited: a limit around a function, shared by all processes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm.exceptions import RateLimitExceeded
from fast_litellm_shm.limiters.grantors import Cost
from fast_litellm_shm.limiters.rate import RateLimiter, deadline_ns
from fast_litellm_shm.limits import LimitSpec, Spelled
from fast_litellm_shm.limits import checked as checked_limits

Function = TypeVar("Function", bound=Callable[..., Any])
Key = str | bytes


def limited(
    limiter: RateLimiter | Spelled,
    *,
    name: str | None = None,
    key: Key | Callable[..., Key | None] = "default",
    cost: Cost | Callable[..., Cost] = 1,
    wait: float | None = 0,
) -> Callable[[Function], Function]:
    """Ask ``limiter`` before each call of a function, sync or async::

        @limited(limiter, key=lambda user, text: user, wait=5)
        async def translate(user: str, text: str) -> str: ...

        @limited("10 per minute")
        def report() -> None: ...

    limiter: or a limit, as an object or as text: then the function has a limiter of its own. name:
    of that limiter; default: module and name of the function.

    key: the key, or a function of the call's arguments that gives it; where that gives None, the
    call is not limited. cost: what a call charges, or a function of its arguments. wait: how many
    seconds a call may wait for its turn; 0: not at all, None: for ever.

    The function is called only when admitted. Otherwise the call raises RateLimitExceeded and
    consumes nothing. Exceptions of key and cost pass through. A generator function is limited when
    it is called, not while its values are read.
    """
    if not isinstance(limiter, (RateLimiter, *get_args(LimitSpec), str)):
        raise TypeError(
            f"limited: limiter must be a RateLimiter, or a limit such as '10 per minute', not "
            f"{limiter!r}"
        )
    found_limits = () if isinstance(limiter, RateLimiter) else checked_limits((limiter,))
    if name is not None and not found_limits:
        raise ValueError(
            f"limited: name={name!r} is for a limit; the limiter {limiter!r} has a name already"
        )
    if not callable(key) and not isinstance(key, (str, bytes)):
        raise TypeError(f"limited: key must be a str, bytes or a function, not {key!r}")
    given = limiter
    deadline_ns(wait)  # of a wrong type: TypeError now, and not at the first call

    def decorate(function: Function) -> Function:
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"limited: {_name(function)} is an async generator, which cannot wait where "
                "it is made; limit the function that reads it"
            )
        limiter = given if isinstance(given, RateLimiter) else _own(function, found_limits, name)

        def asks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key | None, Cost]:
            found = key(*args, **kwargs) if callable(key) else key
            charged = cost(*args, **kwargs) if callable(cost) else cost
            return found, charged

        def checked(decision: Decision, found: Key) -> None:
            if not decision:
                raise RateLimitExceeded(
                    _why(function, limiter, found, decision), decision.retry_after
                )

        called = type(function).__call__  # an object may be a function, and async
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                found, charged = asks(args, kwargs)
                if found is not None:
                    checked(await limiter.wait_async(found, charged, wait), found)
                return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                found, charged = asks(args, kwargs)
                if found is not None:
                    checked(limiter.wait(found, charged, wait), found)
                return function(*args, **kwargs)

        return cast(Function, wrapper)

    return decorate


def _own(
    function: Callable[..., Any], found: tuple[LimitSpec, ...], name: str | None
) -> RateLimiter:
    if name is None:
        module = getattr(function, "__module__", None) or type(function).__module__
        name = f"{module}.{_name(function)}"
    return RateLimiter(*found, name=name)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)  # a partial has none


def _why(function: Callable[..., Any], limiter: RateLimiter, key: Key, decision: Decision) -> str:
    retry = decision.retry_after
    when = "its cost never fits; raise the limit"
    if retry is not None:
        when = f"try again in {retry:.3g} s"
    return (
        f"{_name(function)}: key {key!r} has used up limiter {limiter.name!r} "
        f"({decision.limit!r}); {when}"
    )
