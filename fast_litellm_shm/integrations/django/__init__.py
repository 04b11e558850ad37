"""Django: limits that all workers of the host share.

    pip install "fast-litellm-shm[django]"

A middleware, for the whole site (``settings.py``)::

    from fast_litellm_shm.integrations.django import Rule, user_or_address

    MIDDLEWARE = [..., "fast_litellm_shm.integrations.django.RateLimitMiddleware"]
    FAST_LITELLM_SHM_RULES = [Rule("100 per minute", key=user_or_address)]

A decorator, for single views::

    @limited("10 per minute", key="user_or_address")
    def search(request): ...

And :class:`RateLimitCache`, a cache backend that counts for django-ratelimit. For Django REST
framework: :mod:`fast_litellm_shm.integrations.rest_framework`. See docs/django.md.
"""

from __future__ import annotations

try:
    import django  # noqa: F401
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.django needs Django: pip install "fast-litellm-shm[django]"'
    ) from error

from fast_litellm_shm.integrations.django.cache import RateLimitCache
from fast_litellm_shm.integrations.django.decorator import limited
from fast_litellm_shm.integrations.django.middleware import RateLimitMiddleware
from fast_litellm_shm.integrations.django.users import user_or, user_or_address
from fast_litellm_shm.integrations.web import (
    MARK,
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)

__all__ = [
    "MARK",
    "Outcome",
    "RateLimitCache",
    "RateLimitMiddleware",
    "Request",
    "Rule",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
    "limited",
    "user_or",
    "user_or_address",
]
