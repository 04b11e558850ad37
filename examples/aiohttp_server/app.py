"""An application of aiohttp's server whose limits hold over all its workers.

gunicorn --workers 4 --worker-class aiohttp.GunicornWebWorker app:app
curl -i localhost:8000/
"""

import asyncio
import os

from aiohttp import web

from fast_litellm_shm import FixedWindow, RateLimiter, limited
from fast_litellm_shm.integrations.aiohttp_server import RateLimitMiddleware, Rule
from fast_litellm_shm.integrations.web import answer_429

limit = RateLimitMiddleware(
    [  # the first that matches applies
        Rule(path="/ready"),  # no limits: exempt
        Rule(path="/report"),  # has a limit of its own
        Rule(path="/stream", in_flight=3, busy_status=503),
        Rule(FixedWindow(100, per=3600)),
    ],
    name="aiohttp-example",
)


async def index(request: web.Request) -> web.Response:
    """Which worker answered."""
    return web.Response(text=str(os.getpid()))


@limited(RateLimiter(FixedWindow(5, per=3600), name="aiohttp-example reports"))
async def report(request: web.Request) -> web.Response:
    """Limited by a decorator; answer_429() answers where it raises."""
    return web.Response(text=str(os.getpid()))


async def stream(request: web.Request) -> web.StreamResponse:
    """At most three of a client at once, over all workers, until they end or their clients go."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(f"{os.getpid()}\n".encode())
        await asyncio.sleep(0.05)


app = answer_429(web.Application(middlewares=[limit]))
app.on_response_prepare.append(limit.on_response_prepare)  # for the headers of /stream
app.add_routes(
    [
        web.get("/", index),
        web.get("/ready", index),
        web.get("/report", report),
        web.get("/stream", stream),
    ]
)
