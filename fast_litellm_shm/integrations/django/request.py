"""DjangoRequest: Django's request, as rules, keys and costs see it; and how a response is answered.

It is made of Django's own path, by which Django routes, under WSGI and ASGI alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse

from fast_litellm_shm.integrations.web import MARK, Outcome, Request, forwarded_for
from fast_litellm_shm.integrations.web.keys import NOBODY
from fast_litellm_shm.integrations.web.request import verb
from fast_litellm_shm.integrations.web.responses import LISTS

PROXIES = "FAST_LITELLM_SHM_TRUSTED_PROXIES"
OPTIONS = "FAST_LITELLM_SHM_OPTIONS"


class DjangoRequest(Request):
    """raw: Django's HttpRequest, or the Request of Django REST framework. client: the address of
    the peer; where FAST_LITELLM_SHM_TRUSTED_PROXIES is set, the address that these proxies saw.
    is_async: the key function may return an awaitable."""

    __slots__ = ("is_async",)

    def __init__(self, request: Any, is_async: bool = False) -> None:
        mount = request.META.get("SCRIPT_NAME") or ""
        super().__init__(
            verb(request.method or "GET"),
            request.path,
            request.META.get("REMOTE_ADDR") or None,
            request,
            mount=mount,
            within=request.path_info,
        )
        self.is_async = is_async
        proxies = getattr(settings, PROXIES, None)
        if proxies is not None:
            found = trusted(proxies)(self).partition("/")[0]
            self.client = None if found == NOBODY else found

    def header(self, name: str) -> str | None:
        value = self.raw.headers.get(name)  # Django joins several lines
        return None if value is None else str(value)


def site_name() -> str:
    """The name of this site: sites with other names count apart, in one segment too."""
    try:
        given = getattr(settings, OPTIONS, None)
        urls = getattr(settings, "ROOT_URLCONF", None) or ""
    except ImproperlyConfigured:  # there are no settings (yet)
        return "django"
    project = str(getattr(urls, "__name__", urls)).partition(".")[0]
    named = given.get("name") if isinstance(given, dict) else None
    return named if isinstance(named, str) and named else project or "django"


def trusted(proxies: int | str | Iterable[str]) -> Callable[[Request], str]:
    """What finds the client's address behind these proxies. Raises ImproperlyConfigured."""
    try:
        return _trusted(proxies if isinstance(proxies, (int, str)) else tuple(proxies))
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"{PROXIES}: {error}") from None


@functools.lru_cache(16)
def _trusted(proxies: int | str | tuple[str, ...]) -> Callable[[Request], str]:
    return forwarded_for(proxies, ipv6_prefix=128)  # keys take less of it


def refused(request: Any, outcome: Outcome) -> Any:
    """The response to a request that is refused."""
    status, fields, body = outcome.refusal()
    headers = {name: value for name, value in fields if name != "Content-Length"}
    content = b"" if request.method == "HEAD" else body
    return HttpResponse(content, status=status, headers=headers)


def mark(request: Any, outcome: Outcome) -> None:
    """For views: ``request.META["fast_litellm_shm.rate_limit"]``."""
    request.META[MARK] = outcome


def answered(response: Any, outcome: Outcome) -> Any:
    """The view's response, with the headers. What is held, is held until the response is closed,
    which Django does also when the client has gone."""
    for name, value in outcome.headers_beside(name for name, _ in response.items()):
        present = response.get(name) if name.lower() in LISTS else None
        response[name] = value if present is None else f"{present}, {value}"
    if outcome.holds:
        close = response.close

        def close_and_release() -> None:
            try:
                close()
            finally:
                outcome.release()

        response.close = close_and_release
    return response
