"""A FastAPI app with SlowAPI: one limit for all workers, without a server.

    uvicorn --workers 4 app:app

Against an app that counts in ``memory://`` or Redis, two lines differ: the import, and storage_uri.
"""

import os

from fastapi import FastAPI, Request
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address

import fast_litellm_shm.integrations.limits  # noqa: F401 - registers shm://

limiter = Limiter(
    key_func=get_remote_address,
    storage_uri=os.environ.get("STORAGE_URI", "shm://slowapi-example"),
    strategy=os.environ.get("STRATEGY", "fixed-window"),
)
app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)


@app.get("/")
@limiter.limit("100/year")
async def index(request: Request) -> int:
    """Which worker answered."""
    return os.getpid()


@app.get("/ready")
async def ready() -> int:
    """Not limited."""
    return os.getpid()
