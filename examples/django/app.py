"""A Django project, in one file, whose limits hold over all its workers.

    gunicorn --workers 4 app:application          # or: uvicorn --workers 4 app:asgi
    curl -i localhost:8000/
    curl -i -H 'X-Api-Key: key-of-ann' localhost:8000/search

In a project of your own, MIDDLEWARE and FAST_LITELLM_SHM_RULES are two lines of settings.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.utils.decorators import sync_and_async_middleware

from fast_litellm_shm.integrations.django import Rule, limited, user_or_address


@dataclass(frozen=True)
class User:
    """Of an API key. Most projects have django.contrib.auth instead, whose AuthenticationMiddleware
    sets ``request.user``."""

    pk: str
    is_authenticated: bool = True


#: A real program keeps hashes of the keys, in its database.
USERS = {"key-of-ann": User("ann"), "key-of-bob": User("bob")}
NOBODY = User("", is_authenticated=False)


@sync_and_async_middleware
def authenticate(get_response: Callable[[HttpRequest], HttpResponse]) -> object:
    """A valid key says who the user is. All other requests count by address: if nobody checked the
    header, a client would get a fresh limit for each value that it makes up."""
    from asgiref.sync import iscoroutinefunction

    def known(request: HttpRequest) -> HttpRequest:
        request.user = USERS.get(request.headers.get("X-Api-Key", ""), NOBODY)
        return request

    if iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> HttpResponse:
            return await get_response(known(request))

        return answer_async
    return lambda request: get_response(known(request))


settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of an example",
    INSTALLED_APPS=["fast_litellm_shm.integrations.django"],
    MIDDLEWARE=[
        f"{__name__}.authenticate",
        "fast_litellm_shm.integrations.django.RateLimitMiddleware",
    ],
    FAST_LITELLM_SHM_RULES=[
        Rule(path="/ready"),
        Rule("100 per 60 minutes window", key=user_or_address),
    ],
    FAST_LITELLM_SHM_OPTIONS={"name": "django-example"},
)


def index(request: HttpRequest) -> HttpResponse:
    """Which worker answered."""
    return HttpResponse(str(os.getpid()))


@limited("5 per minute", key="user_or_address")
def search(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()))


@limited("5 per minute", key="user_or_address")
async def search_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()))


urlpatterns = [
    path("", index),
    path("ready", index),
    path("search", search),
    path("search-async", search_async),
]
application = get_wsgi_application()
asgi = get_asgi_application()
