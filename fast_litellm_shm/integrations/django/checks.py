"""What ``manage.py check`` finds, where the app is in INSTALLED_APPS."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

from fast_litellm_shm.integrations.django.middleware import RULES, configured
from fast_litellm_shm.integrations.django.users import NEEDS_USER

_TAG = "fast_litellm_shm"
_OURS = "fast_litellm_shm.integrations.django.RateLimitMiddleware"
_AUTHENTICATION = "AuthenticationMiddleware"  # of Django, or a subclass with such a name


def register() -> None:
    checks.register(check_rules, _TAG)
    checks.register(check_throttles, _TAG)


def check_rules(app_configs: Any = None, **_: Any) -> list[Any]:
    """The settings of the middleware."""
    if _OURS not in settings.MIDDLEWARE and not hasattr(settings, RULES):
        return []
    try:
        rules, _options = configured()
    except ImproperlyConfigured as error:
        return [checks.Error(str(error), id=f"{_TAG}.E001")]
    if _OURS not in settings.MIDDLEWARE:
        hint = f"Add {_OURS!r}, or leave out {RULES}."
        what = f"{RULES} is set, and MIDDLEWARE has no middleware that reads it."
        return [checks.Warning(what, hint=hint, id=f"{_TAG}.W001")]
    before = settings.MIDDLEWARE[: settings.MIDDLEWARE.index(_OURS)]
    known = any(each.rpartition(".")[2].endswith(_AUTHENTICATION) for each in before)
    return [
        checks.Warning(
            f"{RULES}: rule {rule.name!r} counts by user, and RateLimitMiddleware is not below "
            "AuthenticationMiddleware: all requests count by address.",
            hint="Put RateLimitMiddleware below AuthenticationMiddleware in MIDDLEWARE.",
            id=f"{_TAG}.W002",
        )
        for rule in rules
        if getattr(rule.key, NEEDS_USER, False) and not known
    ]


def check_default_throttles() -> None:
    """Raises ImproperlyConfigured."""
    from rest_framework.settings import api_settings

    for throttle in api_settings.DEFAULT_THROTTLE_CLASSES:
        if hasattr(throttle, "check_rate"):
            throttle.check_rate()


def check_throttles(app_configs: Any = None, **_: Any) -> list[Any]:
    """The rates and scopes of all views of Django REST framework."""
    if "rest_framework" not in sys.modules:
        return []
    from django.urls import get_resolver

    found: dict[str, Any] = {}
    for view, given in _views(get_resolver().url_patterns):
        classes = given.get("throttle_classes", getattr(view, "throttle_classes", ()))
        for throttle in classes:
            if not hasattr(throttle, "check_rate"):
                continue
            try:
                throttle.check_rate(view, given)
            except ImproperlyConfigured as error:
                what = f"{view.__module__}.{view.__qualname__}: {error}"
                found[what] = checks.Error(what, id=f"{_TAG}.E002")
    return list(found.values())


def _views(patterns: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The classes of all views, each with the arguments of its as_view()."""
    for each in patterns:
        if hasattr(each, "url_patterns"):
            yield from _views(each.url_patterns)
            continue
        callback = each.callback
        view = getattr(callback, "cls", None) or getattr(callback, "view_class", None)
        if view is not None:
            given = getattr(callback, "initkwargs", None)
            yield view, given or getattr(callback, "view_initkwargs", None) or {}
