"""The ASGI application: the files of the page, and samples as JSON. It changes nothing."""

from __future__ import annotations

import importlib.resources
import ipaddress
import threading
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fast_litellm_shm import __version__
from fast_litellm_shm._shared.spending import SpendingRow
from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import SORTS, LiveKey
from fast_litellm_shm.cli.sampler import Sampler, Snapshot

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_TOP, _MOST_TOP = 50, 500
_MOST_HELD = (
    200  # rows of permits, pools and waiting callers: a browser cannot paint 20,000 each second
)
_MOST_FILTER = 200  # characters
# The browser runs, shows and requests only what this server sends, whatever a key is called.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Poller:
    """Samples the segment every so many seconds, in a thread of its own. All browsers are shown the
    last sample."""

    def __init__(self, sampler: Sampler, every: float, stop: threading.Event) -> None:
        self._sampler, self.every, self._stop = sampler, every, stop
        self.snapshot = Snapshot(sampler.name, 0.0, problem="Reading ...")
        self.lock = threading.Lock()  # of the sampler's cached names, which sorting uses

    def run(self) -> None:
        """Sample until ``stop`` is set. The second sample comes soon: it has the first rates."""
        pause = min(0.3, self.every)
        while True:
            with self.lock:
                self.snapshot = self._sampler.sample()
            if self._stop.wait(pause):
                return
            pause = self.every


class SafeHosts:
    """Refuses requests for names of other sites. An attacker can make such a name lead to this host
    (DNS rebinding), and a page of that name could read the answers. Accepted are addresses,
    localhost, and the allowed names."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = {"localhost", *(name.lower() for name in allowed)}

    def is_safe(self, header: str) -> bool:
        """Whether a Host header is accepted, with or without a port."""
        name, _, port = header.rpartition(":")
        if not name or not port.isdigit():
            name = header
        if name.lower() in self._allowed:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and self.is_safe(hosts[0]):
            await self._app(scope, receive, with_headers)
            return
        said = hosts[0] if hosts else "no Host"
        refusal = PlainTextResponse(
            f"Refused: {said!r} is not an allowed name of this host. Open the page as localhost or "
            "by its address, or start it with `fast-shm dashboard --allow-host NAME`.\n",
            421,
        )
        await refusal(scope, receive, with_headers)


def _key_json(key: LiveKey) -> dict[str, Any]:
    row = key.row
    return {
        "id": key.ident,
        "key": key.name,
        "limiter": render.escaped(row.limiter),
        "rate": key.rate,
        "denied_rate": key.denied_rate,
        "admitted": row.admitted,
        "denied": row.denied,
        "remaining": float(row.remaining or 0) if row.usd else row.remaining,
        "limit": float(row.limit or 0) if row.usd else row.limit,
        "usd": row.usd,
        "retry_after": row.retry_after,
        "reset_after": row.reset_after,
        "admitted_history": key.admitted_history,
        "denied_history": key.denied_history,
    }


def _spending_json(row: SpendingRow) -> dict[str, Any]:
    return row.as_dict() | {
        "key": render.shown_name(row.key, row.raw),
        "budget": render.escaped(row.budget),
        "share": row.share,
        "shown": {name: render.usd(getattr(row, name)) for name in ("spent", "reserved", "limit")},
    }


def _escaped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Permits, pools and waiting callers, with escaped names."""
    return [
        {name: render.escaped(v) if isinstance(v, str) else v for name, v in row.items()}
        for row in rows
    ]


def snapshot_json(
    snapshot: Snapshot, sort: str, reverse: bool, match: str, top: int
) -> dict[str, Any]:
    """What the page shows of a sample; of its keys, the first ``top`` that match."""
    keys, total, fitting = [], 0, 0
    if snapshot.keys is not None:
        slots, fitting = snapshot.keys.order(sort, reverse=reverse, match=match)
        keys = [_key_json(key) for key in snapshot.keys.rows(slots[:top]) if key is not None]
        total = snapshot.keys.total
    return {
        "version": __version__,
        "name": snapshot.name,
        "taken": snapshot.taken,
        "problem": snapshot.problem,
        "notice": snapshot.notice,
        "warnings": snapshot.warnings,
        "segment": snapshot.stats,
        "admitted": asdict(snapshot.admitted),
        "denied": asdict(snapshot.denied),
        "memo": asdict(snapshot.memo) if snapshot.memo else None,
        "in_flight": snapshot.in_flight,
        "workers": [asdict(worker) for worker in snapshot.workers],
        "limiters": [asdict(limiter) for limiter in snapshot.limiters],
        "pooled": sum(row["active"] + row["idle"] for row in snapshot.pools),
        "permits": _escaped(snapshot.permits[:_MOST_HELD]),
        "permits_total": len(snapshot.permits),
        "pools": _escaped(snapshot.pools[:_MOST_HELD]),
        "pools_total": len(snapshot.pools),
        "callers": snapshot.waiting,
        "waiting": _escaped(snapshot.waits[:_MOST_HELD]),
        "waiting_total": len(snapshot.waits),
        "budgets": [_spending_json(row) for row in snapshot.spending[:_MOST_HELD]],
        "budgets_total": snapshot.spending_total,
        "deployments": [asdict(deployment) for deployment in snapshot.deployments],
        "keys": keys,
        "keys_fitting": fitting,
        "keys_total": total,
    }


def make_app(poller: Poller, allowed_hosts: Iterable[str]) -> ASGIApp:
    """``/`` and its files, and ``/api/snapshot?sort=&reverse=&match=&top=``."""
    folder = importlib.resources.files(__package__)
    contents = {path: folder.joinpath(name).read_bytes() for path, (name, _) in _FILES.items()}

    async def file(request: Request) -> Response:
        path = request.url.path
        return Response(contents[path], media_type=_FILES[path][1])

    async def snapshot(request: Request) -> Response:
        query = request.query_params
        sort, top = query.get("sort", "rate"), query.get("top", str(_TOP))
        if sort not in SORTS:
            return PlainTextResponse(f"sort must be one of {', '.join(SORTS)}\n", 400)
        if not (top.isascii() and top.isdigit() and len(top) < 6 and int(top) <= _MOST_TOP):
            return PlainTextResponse(f"top must be a number of keys, 0 to {_MOST_TOP}\n", 400)
        match = query.get("match", "")[:_MOST_FILTER]

        def read() -> dict[str, Any]:
            with poller.lock:
                found = snapshot_json(
                    poller.snapshot, sort, query.get("reverse") == "1", match, int(top)
                )
            return found | {"every": poller.every}

        return JSONResponse(await run_in_threadpool(read))

    routes = [Route(path, file) for path in _FILES] + [Route("/api/snapshot", snapshot)]
    return SafeHosts(Starlette(routes=routes), allowed_hosts)
