"""A Flask app whose limits hold over all its workers, with no server beside them.

    gunicorn --workers 4 --threads 4 app:app
    curl -i localhost:8000/

The middleware is plain WSGI: it stands before any other framework in the same way.
"""

import os
import time
from collections.abc import Iterator

from flask import Flask, Response

from fast_litellm_shm import Limit, Window
from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Rule, header

app = Flask(__name__)
app.wsgi_app = RateLimitMiddleware(
    app.wsgi_app,
    name="wsgi-example",
    rules=[  # the first that matches is asked
        Rule(path="/ready"),  # no limits: exempt
        Rule(path="/stream", in_flight=3, busy_status=503, key=lambda request: "all"),
        Rule(Window(100, per=3600), Limit(1000, per=1), key=header("X-Api-Key")),
    ],
)


@app.get("/")
def index() -> str:
    """Which worker answered."""
    return str(os.getpid())


@app.get("/ready")
def ready() -> str:
    """Not limited."""
    return str(os.getpid())


@app.get("/stream")
def stream() -> Response:
    """At most three at once, over all workers, until they end or their clients go."""

    def parts() -> Iterator[str]:
        while True:
            yield f"{os.getpid()}\n"
            time.sleep(0.05)

    return Response(parts(), mimetype="text/plain")
