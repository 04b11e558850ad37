"""A FastAPI app with one limit for all workers, whose metrics OpenTelemetry exports.

    uvicorn --workers 4 app:app

Each worker is instrumented, and one at a time reports the sums of all: here as JSON, on the
terminal or in files of METRICS_FOLDER. In production, use the OTLP exporter instead.
"""

import os
import sys
from pathlib import Path

from fastapi import FastAPI, Request, Response
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

from fast_litellm_shm import RateLimiter, Segment, TokenBucket
from fast_litellm_shm.integrations import opentelemetry

segment = Segment(os.environ.get("SEGMENT", "otel-example"))
limiter = RateLimiter(TokenBucket(100, per=3600), name="api", segment=segment)

out = sys.stdout
if folder := os.environ.get("METRICS_FOLDER"):
    out = Path(folder, f"{os.getpid()}.jsonl").open("a", encoding="utf-8")  # noqa: SIM115 - it stays open
exporter = ConsoleMetricExporter(out, formatter=lambda data: data.to_json(indent=None) + "\n")
# every minute, or as many milliseconds as OTEL_METRIC_EXPORT_INTERVAL says
provider = MeterProvider([PeriodicExportingMetricReader(exporter)])
opentelemetry.instrument(provider.get_meter("fast_shm"), segment)

app = FastAPI()


@app.get("/")
async def index(request: Request, response: Response) -> int:
    """Which worker answered; 100 an hour for each user."""
    decision = limiter.acquire(request.headers.get("x-user", "anonymous"))
    if not decision:
        response.status_code = 429
        response.headers["Retry-After"] = str(int(decision.retry_after or 0) + 1)
    return os.getpid()


@app.get("/ready")
async def ready() -> int:
    """Not limited."""
    return os.getpid()
