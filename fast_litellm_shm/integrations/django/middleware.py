"""RateLimitMiddleware of Django: the rules of FAST_LITELLM_SHM_RULES, sync and async."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, MiddlewareNotUsed

from fast_litellm_shm.integrations.django.request import (
    OPTIONS,
    PROXIES,
    DjangoRequest,
    answered,
    mark,
    refused,
    site_name,
    trusted,
)
from fast_litellm_shm.integrations.web import Middleware, Outcome, Rule

RULES = "FAST_LITELLM_SHM_RULES"
_KNOWN = ("name", "segment", "on_error", "on_cost_error", "ambiguous_paths", "cluster")

GetResponse: TypeAlias = Callable[[Any], Any]


class RateLimitMiddleware(Middleware[GetResponse]):
    """Checks each request before the view gets it. Put it below AuthenticationMiddleware if a rule
    asks for ``request.user``.

    Settings: ``FAST_LITELLM_SHM_RULES``, a list of :class:`Rule`; the first that matches applies.
    ``FAST_LITELLM_SHM_OPTIONS``, a dict of the other arguments of the ASGI and WSGI middleware:
    ``name`` (default: the first part of ROOT_URLCONF), ``segment``, ``on_error``,
    ``on_cost_error``, ``ambiguous_paths``, ``cluster``. ``FAST_LITELLM_SHM_TRUSTED_PROXIES``: see
    docs/django.md.

    A refused request is answered with 429 (or 503) and a JSON body, and no view is called. The
    result of a check is in ``request.META["fast_litellm_shm.rate_limit"]``, an :class:`Outcome`.

    Raises ImproperlyConfigured when Django loads it, which is before the first request.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse) -> None:
        rules, options = configured()
        if not rules:
            raise MiddlewareNotUsed(f"{RULES} is empty")
        try:
            super().__init__(get_response, rules, **options)
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"{RULES}: {error}") from error
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        if self._is_async:
            return self._respond(request)
        outcome = self.check(DjangoRequest(request))
        if outcome is None:
            return self.app(request)
        try:
            mark(request, outcome)
            if outcome.refused:
                return refused(request, outcome)
            return answered(self.app(request), outcome)
        except BaseException:
            outcome.release()
            raise

    async def _respond(self, request: Any) -> Any:
        outcome: Outcome | None = await self.check_async(DjangoRequest(request, is_async=True))
        if outcome is None:
            return await self.app(request)
        try:
            mark(request, outcome)
            if outcome.refused:
                return refused(request, outcome)
            return answered(await self.app(request), outcome)
        except BaseException:  # the view failed, or its client has gone
            outcome.release()
            raise


def configured() -> tuple[list[Rule], dict[str, Any]]:
    """The rules and options of the settings. Raises ImproperlyConfigured, which names the setting
    and what is wrong with it."""
    rules = getattr(settings, RULES, None)
    if rules is None:
        raise ImproperlyConfigured(
            f"{RULES} is not set: write {RULES} = [Rule('100 per minute')] in the settings, with "
            "Rule of fast_litellm_shm.integrations.django"
        )
    if not isinstance(rules, (list, tuple)):
        raise ImproperlyConfigured(f"{RULES} must be a list of Rule objects, not {rules!r}")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ImproperlyConfigured(
                f"{RULES} must be a list of Rule objects, and one is {rule!r}; write "
                "Rule('100 per minute')"
            )
    options = getattr(settings, OPTIONS, {})
    if not isinstance(options, dict):
        raise ImproperlyConfigured(f"{OPTIONS} must be a dict, not {options!r}")
    unknown = sorted(set(options) - set(_KNOWN), key=str)
    if unknown:
        raise ImproperlyConfigured(
            f"{OPTIONS} has {unknown[0]!r}, which is unknown; there are {', '.join(_KNOWN)}"
        )
    if getattr(settings, PROXIES, None) is not None:
        trusted(getattr(settings, PROXIES))
    return list(rules), {"name": site_name(), **options}
