"""An API in Django REST framework, in one file: 10 requests a minute, over all its workers.

    gunicorn --workers 4 app:application
    for i in $(seq 60); do curl -so /dev/null -w '%{http_code} ' localhost:8000/; done

60 requests: 10 are admitted. With THROTTLES=rest_framework.throttling, the framework's own
throttles, each worker admits 10 of those that it gets: 40 in all.
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path

THROTTLES = os.environ.get("THROTTLES", "fast_litellm_shm.integrations.rest_framework")

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of an example",
    INSTALLED_APPS=[
        "django.contrib.contenttypes",
        "django.contrib.auth",
        "rest_framework",
        "fast_litellm_shm.integrations.django",  # manage.py check finds wrong rates
    ],
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": [],
        "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
        "DEFAULT_THROTTLE_CLASSES": [f"{THROTTLES}.UserRateThrottle"],
        "DEFAULT_THROTTLE_RATES": {"user": "10/minute"},
    },
)
application = get_wsgi_application()

from rest_framework.decorators import api_view, throttle_classes  # noqa: E402
from rest_framework.request import Request  # noqa: E402
from rest_framework.response import Response  # noqa: E402


@api_view(["GET"])
def index(request: Request) -> Response:
    """Which worker answered."""
    return Response(os.getpid())


@api_view(["GET"])
@throttle_classes([])
def ready(request: Request) -> Response:
    return Response(os.getpid())


urlpatterns = [path("", index), path("ready", ready)]
