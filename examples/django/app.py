"""A Django project, in one file, whose limits hold over all its workers.

    gunicorn --workers 4 app:application
    curl -i localhost:8000/
    curl -i -H 'X-Api-Key: key-of-ann' localhost:8000/

In a project of your own it is the last line of wsgi.py that changes.
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

from fast_litellm_shm import FixedWindow
from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Request, Rule, client_address

#: The user of each key. A real program keeps hashes of the keys, in its database.
API_KEYS = {"key-of-ann": "ann", "key-of-bob": "bob"}


def caller(request: Request) -> str:
    """A valid key counts by its user, all other requests by address. If nobody checked the header,
    a client would get a fresh limit for each value that it makes up."""
    user = API_KEYS.get(request.header("X-Api-Key") or "")
    return f"user={user}" if user else client_address(request)


settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of an example")


def index(request: HttpRequest) -> HttpResponse:
    """Which worker answered."""
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("", index), path("ready", index)]
application = RateLimitMiddleware(
    get_wsgi_application(),
    name="django-example",
    rules=[Rule(path="/ready"), Rule(FixedWindow(100, per=3600), key=caller)],
)
