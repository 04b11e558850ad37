"""A Flask app whose limits hold over all its workers, without a server.

    gunicorn --workers 4 --threads 4 app:app
    curl -i localhost:8000/
    curl -i -H 'X-Api-Key: key-of-ann' localhost:8000/

The middleware is plain WSGI: it wraps any other framework in the same way.
"""

import os
import time
from collections.abc import Iterator

from flask import Flask, Response

from fast_litellm_shm import FixedWindow, TokenBucket
from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Request, Rule, client_address

#: The user of each key. A real program keeps hashes of the keys, in its database.
API_KEYS = {"key-of-ann": "ann", "key-of-bob": "bob"}


def caller(request: Request) -> str:
    """A valid key counts by its user, all other requests by address. If nobody checked the header,
    a client would get a fresh limit for each value that it makes up."""
    user = API_KEYS.get(request.header("X-Api-Key") or "")
    return f"user={user}" if user else client_address(request)


app = Flask(__name__)
app.wsgi_app = RateLimitMiddleware(
    app.wsgi_app,
    name="wsgi-example",
    rules=[  # the first that matches applies
        Rule(path="/ready"),  # no limits: exempt
        Rule(path="/stream", in_flight=3, busy_status=503, key=caller),
        Rule(FixedWindow(100, per=3600), TokenBucket(1000, per=1), key=caller),
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
    """At most three of a caller at once, over all workers, until they end or their clients go."""

    def parts() -> Iterator[str]:
        while True:
            yield f"{os.getpid()}\n"
            time.sleep(0.05)

    return Response(parts(), mimetype="text/plain")
