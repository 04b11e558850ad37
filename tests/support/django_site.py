"""A Django project for tests: its settings, and views that tests make as they need them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import django
from django.conf import settings
from django.test import override_settings

AUTHENTICATION = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
LIMITS = "fast_litellm_shm.integrations.django.RateLimitMiddleware"


def configure() -> None:
    """Once for each process, whatever test file comes first."""
    if settings.configured:
        return
    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="support.django_site",
        SECRET_KEY="of a test",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{_folder()}/db"}},
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        INSTALLED_APPS=[
            "django.contrib.contenttypes",
            "django.contrib.auth",
            "rest_framework",
            "fast_litellm_shm.integrations.django",
        ],
        TEMPLATES=[
            {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
        ],
        REST_FRAMEWORK={"DEFAULT_THROTTLE_RATES": {"user": "3/min", "anon": "2/min", "free": None}},
    )
    django.setup()


def _folder() -> str:
    """Removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="fast-shm-django-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


urlpatterns: list[Any] = []


@contextmanager
def site(patterns: list[Any], **changed: Any) -> Iterator[None]:
    """The project with these URLs and settings."""
    urls = types.ModuleType("support.django_site_urls")
    vars(urls)["urlpatterns"] = patterns
    with override_settings(ROOT_URLCONF=urls, **changed):
        yield
