"""Django REST framework: throttles whose counts all workers of the host share.

    pip install "fast-litellm-shm[rest-framework]"

They take the place of the framework's own, with its own settings::

    REST_FRAMEWORK = {
        "DEFAULT_THROTTLE_CLASSES": [
            "fast_litellm_shm.integrations.rest_framework.AnonRateThrottle",
            "fast_litellm_shm.integrations.rest_framework.UserRateThrottle",
        ],
        "DEFAULT_THROTTLE_RATES": {"anon": "10/min", "user": "1000/day"},
    }

See docs/django.md.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, ClassVar

try:
    from rest_framework import throttling
    from rest_framework.settings import api_settings
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.rest_framework needs Django REST framework: pip install "
        '"fast-litellm-shm[rest-framework]"'
    ) from error

from django.core.exceptions import ImproperlyConfigured

from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError
from fast_litellm_shm.integrations.django.request import DjangoRequest, site_name
from fast_litellm_shm.integrations.web import client_address, forwarded_for, responses
from fast_litellm_shm.integrations.web.log import Log
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import LimitSpec, SlidingWindow, checked, describe, longest

__all__ = [
    "AnonRateThrottle",
    "ScopedRateThrottle",
    "SimpleRateThrottle",
    "UserRateThrottle",
]

# What the framework itself reads: of the period, the first letter alone.
_OWN = re.compile(r"\s*(\d+)\s*/\s*(s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?)\s*")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_BETWEEN = re.compile("[;,|]")
_LONGEST = 75  # bytes of a name: it fits into the segment, and into the names of a cluster
_BUSY = 1.0  # s until the next attempt, where a rate cannot be checked
_CHARGED = "_fast_litellm_shm_charged"  # of a request: what its throttles have charged
_DENIED = "_fast_litellm_shm_denied"
_log = Log()
_limiters: dict[tuple[str, tuple[LimitSpec, ...], Segment], RateLimiter] = {}


def limits_of(rate: Any) -> tuple[LimitSpec, ...]:
    """The limits that a rate says. As the framework spells it: ``10/min`` is SlidingWindow(10, 60),
    ``1000/day`` is SlidingWindow(1000, 86400). Several: ``10/min; 1000/day``. Else a limit of this
    package, or text that :func:`fast_litellm_shm.limits.parse` reads. Raises ValueError,
    TypeError."""
    found: list[Any] = []
    for given in rate if isinstance(rate, (list, tuple)) else (rate,):
        if not isinstance(given, str):
            found.append(given)
            continue
        for part in _BETWEEN.split(given):
            own = _OWN.fullmatch(part)
            if own is None:
                found += checked([part])
            else:
                found.append(SlidingWindow(int(own[1]), _SECONDS[own[2][0]]))
    return checked(found)


class SimpleRateThrottle(throttling.SimpleRateThrottle):
    """The base of the others, as in the framework: a subclass says ``get_cache_key()``.

    ``rate``, or DEFAULT_THROTTLE_RATES by ``scope``: see ``docs/django.md``; None: not limited. All
    throttles of one scope share their counts; one with a ``rate`` of its own counts apart.
    ``on_error``: ``"deny"`` or ``"allow"`` requests that cannot be checked; ``segment``,
    ``cluster``: as of a RateLimiter.

    A request that is denied consumes nothing; also of the other throttles of its view, if they are
    of this package. ``wait()`` is the time until the request would be admitted.

    A client without a user is known by its address, as in all web integrations of this package: the
    peer's; behind proxies, as NUM_PROXIES or FAST_LITELLM_SHM_TRUSTED_PROXIES says. Without these
    settings, ``X-Forwarded-For``, which a client can write, is not read.
    """

    on_error: ClassVar[str] = "deny"
    segment: ClassVar[Segment | None] = None
    cluster: ClassVar[ClusterArgument] = None
    _decision: Decision | None = None
    _failed = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.on_error not in ("deny", "allow"):
            raise ImproperlyConfigured(
                f"{cls.__qualname__}: on_error must be 'deny' or 'allow', not {cls.on_error!r}"
            )
        if vars(cls).get("rate"):
            cls.check_rate()

    @classmethod
    def check_rate(cls, view: Any = None, given: Any = ()) -> None:
        """Raises ImproperlyConfigured, where the throttle cannot be used; view, given: for a view's
        class, and the arguments of its as_view()."""
        throttle = cls.__new__(cls)
        rate = getattr(throttle, "rate", None) or throttle.get_rate()
        throttle._limits_of(rate)

    def __init__(self) -> None:
        if not getattr(self, "rate", None):
            self.rate = self.get_rate()
        self._use(self.rate)

    def get_rate(self) -> Any:
        """Of the scope. Raises ImproperlyConfigured, which says what scopes there are."""
        scope = getattr(self, "scope", None)
        if not scope:
            raise ImproperlyConfigured(f"{type(self).__qualname__} needs a scope, or a rate")
        try:
            return self.THROTTLE_RATES[scope]
        except KeyError:
            known = ", ".join(map(repr, sorted(self.THROTTLE_RATES))) or "none"
            raise ImproperlyConfigured(
                f"{type(self).__qualname__}: DEFAULT_THROTTLE_RATES has no rate for the scope "
                f"{scope!r}; it has {known}"
            ) from None

    def parse_rate(self, rate: Any) -> tuple[int | None, float | None]:
        """Of the first limit: how many requests, in how many seconds. A subclass that has its own
        is followed."""
        if rate is None:
            return None, None
        first = self._limits_of(rate)[0]
        return first.n, longest(first)

    def _limits_of(self, rate: Any) -> tuple[LimitSpec, ...]:
        if rate is None:
            return ()
        try:
            if type(self).parse_rate is not SimpleRateThrottle.parse_rate:
                number, seconds = self.parse_rate(rate)
                return () if number is None else checked([SlidingWindow(number, seconds or 0)])
            return limits_of(rate)
        except (TypeError, ValueError) as error:
            scope = getattr(self, "scope", None)
            named = f" (scope {scope!r})" if scope else ""
            raise ImproperlyConfigured(
                f"{type(self).__qualname__}{named}: the rate {rate!r} is wrong: {error}"
            ) from None

    def _use(self, rate: Any) -> None:
        self.num_requests, self.duration = self.parse_rate(rate)
        self._limits = self._limits_of(rate)

    def _limiter(self) -> RateLimiter:
        scope = getattr(self, "scope", None) or type(self).__qualname__
        own = self.THROTTLE_RATES is not api_settings.DEFAULT_THROTTLE_RATES
        if own or self.THROTTLE_RATES.get(scope) != self.rate:
            scope = f"{scope} {' + '.join(map(describe, self._limits))}"
        name = f"{site_name()}: throttle {scope}"
        if len(name.encode()) > _LONGEST:
            name = f"throttle {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"
        segment = Segment.default() if self.segment is None else self.segment
        which = name, self._limits, segment
        found = _limiters.get(which)
        if found is None:
            for other in [each for each in _limiters if each[0] == name]:
                del _limiters[other]  # the rate of the scope was changed, by a test for example
            found = _limiters[which] = RateLimiter(
                *self._limits, name=name, segment=segment, cluster=self.cluster
            )
        return found

    def get_ident(self, request: Any) -> str:
        """The client's address; for IPv6 its /64."""
        asked, proxies = DjangoRequest(request), api_settings.NUM_PROXIES
        if proxies:
            return forwarded_for(int(proxies))(asked)
        return client_address(asked)

    def allow_request(self, request: Any, view: Any) -> bool:
        if self.rate is None:
            return True
        key = self.key = self.get_cache_key(request, view)
        if key is None:
            return True
        try:
            limiter = self._limiter()
            denied = getattr(request, _DENIED, False)
            decision = limiter.peek(key) if denied else limiter.acquire(key)
        except FastShmError as error:
            self._failed, allowed = True, self.on_error == "allow"
            shown = "let through, uncounted" if allowed else "refused"
            _log.failure(f"{type(self).__qualname__} cannot check; requests are {shown}", error)
            return allowed or bool(self.throttle_failure())
        self._decision = decision
        self._tell(view, decision)
        if not decision:
            self._give_back(request)
            return bool(self.throttle_failure())
        if not denied:
            vars(request).setdefault(_CHARGED, []).append((limiter, key))
        return bool(self.throttle_success())

    @staticmethod
    def _give_back(request: Any) -> None:
        """What the request's throttles before this one have charged."""
        setattr(request, _DENIED, True)
        for limiter, key in vars(request).pop(_CHARGED, ()):
            limiter.refund(key, 1)

    def _tell(self, view: Any, decision: Decision) -> None:
        """The header fields of the response, whatever the view answers."""
        found = getattr(view, "headers", None)
        if not isinstance(found, dict):
            return
        scope = getattr(self, "scope", None) or type(self).__qualname__
        names = responses.policy_names(ascii(scope)[1:-1], self._limits)
        fields = [("RateLimit-Policy", responses.policy(names, self._limits))]
        if len(names) == 1 or not decision:
            index = min(decision.limit_index, len(names) - 1)
            left = decision.remaining if decision else 0
            fields += responses.rate_limit(names[index], decision, left, decision.reset_after)
        for name, value in fields:
            if name.lower() in responses.LISTS and name in found:
                found[name] += f", {value}"
            elif not decision or name not in found or name.lower() in responses.LISTS:
                found[name] = value

    def throttle_success(self) -> bool:
        return True

    def wait(self) -> float | None:
        """Seconds until the request would be admitted; None: never."""
        if self._failed:
            return _BUSY
        return None if self._decision is None else self._decision.retry_after


class AnonRateThrottle(SimpleRateThrottle, throttling.AnonRateThrottle):
    """Limits requests without a user, by address; the scope is ``anon``."""


class UserRateThrottle(SimpleRateThrottle, throttling.UserRateThrottle):
    """Limits the requests of each user, and those without one by address; the scope is ``user``."""


class ScopedRateThrottle(SimpleRateThrottle, throttling.ScopedRateThrottle):
    """Limits the views that have a ``throttle_scope``, by that scope and by user or address."""

    def __init__(self) -> None:
        pass  # the view names the scope

    @classmethod
    def check_rate(cls, view: Any = None, given: Any = ()) -> None:
        scope = dict(given).get(cls.scope_attr, getattr(view, cls.scope_attr, None))
        if scope:
            throttle = cls.__new__(cls)
            throttle.scope = scope
            throttle._limits_of(throttle.get_rate())

    def allow_request(self, request: Any, view: Any) -> bool:
        self.scope = getattr(view, self.scope_attr, None)
        if not self.scope:
            return True
        self.rate = self.get_rate()
        self._use(self.rate)
        return SimpleRateThrottle.allow_request(self, request, view)
