"""Key functions: the user of Django's request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import sync_to_async
from django.utils.functional import SimpleLazyObject

from fast_litellm_shm._shared import settings
from fast_litellm_shm.integrations.web import Request, client_address
from fast_litellm_shm.integrations.web.keys import Key, KeyFunction

NEEDS_USER = "needs_user"  # an attribute of key functions; the system check looks for it


def user_or(other: KeyFunction) -> Callable[[Request], Key | Awaitable[Key]]:
    """A key function: ``user=`` and the primary key of ``request.user`` where the user has logged
    in; else what ``other`` gives, such as ``forwarded_for([...])``.

    It needs ``AuthenticationMiddleware`` (or another that sets ``request.user``) before it. Without
    a ``request.user``, all requests count by ``other``, and a warning is logged.
    """
    if not callable(other):
        raise TypeError(f"user_or: other must be a function of a request, not {other!r}")

    def key(request: Request) -> Key | Awaitable[Key]:
        user = getattr(request.raw, "user", None)
        if user is None:
            settings.warn_once(
                "rate limits by user: the request has no user, so it counts by its address; put "
                "django.contrib.auth.middleware.AuthenticationMiddleware before the limits"
            )
            return other(request)
        # A user that is not loaded yet is asked of the database, which the event loop may not do.
        if getattr(request, "is_async", False) and type(user) is SimpleLazyObject:
            return _loaded(request)
        return _key(user) or other(request)

    async def _loaded(request: Request) -> Key:
        found: Key | Awaitable[Key] = await sync_to_async(_key)(request.raw.user)
        if found is None:
            found = other(request)
        return found if found is None or isinstance(found, (str, bytes)) else await found

    setattr(key, NEEDS_USER, True)
    return key


def _key(user: Any) -> str | None:
    return f"user={user.pk}" if user.is_authenticated else None


#: The user where one has logged in, else the client's address.
user_or_address = user_or(client_address)
