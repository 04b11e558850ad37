"""A Flask app with Flask-Limiter: one limit for all workers, without a server.

    gunicorn --workers 4 app:app

Against an app that counts in ``memory://`` or Redis, two lines differ: the import, and storage_uri.
"""

import os

from flask import Flask
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address

import fast_litellm_shm.integrations.limits  # noqa: F401 - registers shm://

app = Flask(__name__)
limiter = Limiter(
    get_remote_address,
    app=app,
    storage_uri=os.environ.get("STORAGE_URI", "shm://flask-limiter-example"),
    strategy=os.environ.get("STRATEGY", "fixed-window"),
    headers_enabled=True,
)


@app.get("/")
@limiter.limit("100/year")
def index() -> str:
    """Which worker answered."""
    return str(os.getpid())


@app.get("/ready")
def ready() -> str:
    """Not limited."""
    return str(os.getpid())
