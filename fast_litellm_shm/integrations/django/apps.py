"""The Django app: ``"fast_litellm_shm.integrations.django"`` in INSTALLED_APPS. It is needed for
the checks alone: ``manage.py check`` finds wrong settings, rates and scopes."""

from __future__ import annotations

import sys

from django.apps import AppConfig


class RateLimitConfig(AppConfig):
    name = "fast_litellm_shm.integrations.django"
    label = "fast_litellm_shm"
    verbose_name = "Rate limits that all workers share"

    def ready(self) -> None:
        """Raises ImproperlyConfigured, so that no worker starts, where DEFAULT_THROTTLE_CLASSES of
        Django REST framework has throttles of this package whose rates are wrong."""
        from fast_litellm_shm.integrations.django import checks

        checks.register()
        if "rest_framework" in sys.modules:
            checks.check_default_throttles()
