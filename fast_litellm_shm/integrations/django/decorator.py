"""@limited for Django's views."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeVar, cast

from asgiref.sync import iscoroutinefunction

from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.django.request import (
    DjangoRequest,
    answered,
    mark,
    refused,
    site_name,
)
from fast_litellm_shm.integrations.django.users import user_or_address
from fast_litellm_shm.integrations.web import Outcome, Request, Rule, client_address
from fast_litellm_shm.integrations.web.gate import Gate
from fast_litellm_shm.integrations.web.keys import Key, KeyFunction
from fast_litellm_shm.integrations.web.rules import Cost, CostFunction
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limits import Spelled, checked, describe

_View = TypeVar("_View", bound=Callable[..., Any])
_LONGEST = (
    75  # characters of a limiter's name: it fits into the segment, and into the names of a cluster
)
_KEYS: dict[str, KeyFunction] = {
    "user_or_address": user_or_address,
    "address": client_address,
    "user_or_ip": user_or_address,  # as django-ratelimit has it
    "ip": client_address,
}


def limited(
    *limits: Spelled,
    key: str | KeyFunction = "user_or_address",
    methods: Iterable[str] | None = None,
    cost: Cost | CostFunction = 1,
    name: str | None = None,
    in_flight: int | None = None,
    busy_status: int = 429,
    wait: float = 0,
    exempt: Collection[str | bytes] = (),
    dry_run: bool = False,
    segment: Segment | None = None,
    on_error: str = "deny",
    on_cost_error: str = "deny",
    cluster: ClusterArgument = None,
) -> Callable[[_View], _View]:
    """Limit a view, sync or async::

        @limited("10 per minute", key="user_or_address")
        def search(request): ...

        @method_decorator(limited("5 per minute", methods=["POST"]), name="dispatch")
        class Login(LoginView): ...

    limits: 1 to 4, as of a :class:`Rule`. key: ``"user_or_address"`` (or ``"user_or_ip"``),
    ``"address"`` (or ``"ip"``), or a function of a
    :class:`~fast_litellm_shm.integrations.web.Request`, whose ``raw`` is Django's. If the
    function returns None, the request is not limited. methods: the methods that are limited;
    default: all. name: views with the same name share their counts; by default each view has counts
    of its own. The other arguments: as of a rule, and of the middleware.

    A denied request is answered with 429, ``Retry-After`` and a JSON body; where the limit cannot
    be checked, with 503. The view is not called.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment.
    """
    if not limits and in_flight is None:
        raise ValueError('limited needs a limit, such as @limited("10 per minute")')
    if callable(limits[0] if limits else None):
        raise TypeError('limited needs a limit: write @limited("10 per minute"), not @limited')
    if isinstance(key, str):
        if key not in _KEYS:
            raise ValueError(
                f"limited: key must be {', '.join(map(repr, _KEYS))}, or a function of a request, "
                f"not {key!r}"
            )
        key = _KEYS[key]
    site, each_view, exempted = site_name(), name is None, frozenset(map(key_bytes, exempt))
    if name is None:  # in the segment: the limits, since decorators with others count apart
        shown = [*map(describe, checked(limits) if limits else ())]
        name = " + ".join(["each view", *shown, *([f"{in_flight} in flight"] * bool(in_flight))])
        if len(f"{site}: {name}") > _LONGEST:
            name = f"each view {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"

    rule = Rule(
        *limits,
        key=_key_of(key, each_view, exempted),
        methods=methods,
        cost=cost,
        name=name,
        in_flight=in_flight,
        busy_status=busy_status,
        wait=wait,
        dry_run=dry_run,
    )
    if each_view:
        rule.public_name = "default"
    gate: Gate[None] = Gate(
        None,
        [rule],
        name=site,
        segment=segment,
        on_error=on_error,
        on_cost_error=on_cost_error,
        cluster=cluster,
    )

    def decorate(view: _View) -> _View:
        """method_decorator calls it anew for each request."""
        if isinstance(view, type):
            raise TypeError(
                f"limited: {view.__name__} is a class: write @method_decorator(limited(...), "
                'name="dispatch")'
            )
        shown, instance = _name(view), _instance(view)

        if iscoroutinefunction(view) or getattr(instance, "view_is_async", False):

            @functools.wraps(view)
            async def wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
                called = _Called(_checked(request, shown), shown, is_async=True)
                outcome = await gate.check_async(called)
                response = None if outcome is None else _begin(request, outcome)
                if response is not None:
                    return response
                try:
                    response = view(request, *args, **kwargs)
                    if inspect.isawaitable(response):
                        response = await response
                    return response if outcome is None else answered(response, outcome)
                except BaseException:
                    if outcome is not None:
                        outcome.release()
                    raise
        else:

            @functools.wraps(view)
            def wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
                outcome = gate.check(_Called(_checked(request, shown), shown))
                response = None if outcome is None else _begin(request, outcome)
                if response is not None:
                    return response
                try:
                    response = view(request, *args, **kwargs)
                    return response if outcome is None else answered(response, outcome)
                except BaseException:
                    if outcome is not None:
                        outcome.release()
                    raise

        return cast(_View, wrapper)

    return decorate


def _key_of(asks: KeyFunction, each_view: bool, exempted: Collection[bytes]) -> KeyFunction:
    """The key function of a rule: with the name of the view, if each view counts apart."""

    def of_view(request: Request, found: Key) -> Key:
        if not isinstance(found, (str, bytes)):
            return found
        raw = key_bytes(found)
        if raw in exempted:
            return None
        return b"%b %b" % (key_bytes(cast(_Called, request).view), raw) if each_view else raw

    async def awaited(request: Request, found: Awaitable[Key]) -> Key:
        return of_view(request, await found)

    def key(request: Request) -> Key | Awaitable[Key]:
        found = asks(request)
        return awaited(request, found) if inspect.isawaitable(found) else of_view(request, found)

    return key


class _Called(DjangoRequest):
    """A request, and the view that it is for."""

    __slots__ = ("view",)

    def __init__(self, request: Any, view: str, is_async: bool = False) -> None:
        super().__init__(request, is_async)
        self.view = view


def _begin(request: Any, outcome: Outcome) -> Any:
    """The response, if the request is refused."""
    mark(request, outcome)
    return refused(request, outcome) if outcome.refused else None


def _checked(request: Any, view: str) -> Any:
    if not hasattr(request, "META"):
        raise TypeError(
            f"limited: {view} was called with {type(request).__name__}, which is no request; on a "
            "method, write @method_decorator(limited(...))"
        )
    return request


def _instance(view: Any) -> Any:
    """The object whose method it is, behind method_decorator; None: it is a function."""
    return getattr(getattr(view, "func", view), "__self__", None)


def _name(view: Any) -> str:
    """Of a function: its own; of a method: with the class of the object, which may inherit it."""
    instance = _instance(view)
    if instance is not None and not isinstance(instance, type):
        owner = type(instance)
        method = getattr(view, "__name__", "")
        return f"{owner.__module__}.{owner.__qualname__}.{method}"
    while isinstance(view, functools.partial):
        view = view.func
    named = getattr(view, "view_class", view)  # of MyView.as_view()
    return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"
