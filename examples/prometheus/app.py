"""A FastAPI app with one limit for all workers, and /metrics with the sums of all workers.

    uvicorn --workers 4 app:app
    prometheus --config.file=prometheus.yml

prometheus.yml scrapes it, alerts.yml has alerting rules, dashboard.json is for Grafana.
"""

import asyncio
import os

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, TokenBucket
from fast_litellm_shm.integrations.prometheus import FastShmCollector

segment = Segment(os.environ.get("SEGMENT", "prometheus-example"))
limiter = RateLimiter(TokenBucket(100, per=3600), name="api", segment=segment)
work = ConcurrencyLimiter(8, name="work", segment=segment)

# A registry of its own: prometheus_client's default one also reports the one process that answers.
registry = CollectorRegistry()
FastShmCollector(segment, registry)

app = FastAPI()


@app.get("/")
async def index(request: Request, response: Response) -> int:
    """Which worker answered; 100 an hour for each user."""
    decision = limiter.acquire(request.headers.get("x-user", "anonymous"))
    if not decision:
        response.status_code = 429
        response.headers["Retry-After"] = str(int(decision.retry_after or 0) + 1)
        return os.getpid()
    async with work.slot_async("model", timeout=10):
        await asyncio.sleep(0)  # the slow work
    return os.getpid()


@app.get("/metrics")
def metrics() -> Response:  # not async: in a thread, the event loop goes on
    """What Prometheus scrapes."""
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@app.get("/ready")
async def ready() -> int:
    """Not limited."""
    return os.getpid()
