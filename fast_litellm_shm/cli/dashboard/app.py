"""The page's server: its files, and what there is to be seen as JSON. It changes nothing."""

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
_MOST_HELD = 200  # rows of permits and of pools: a browser cannot paint 20,000 each second
_MOST_FILTER = 200  # characters
# Nothing but what this server sends is run, shown or asked, whatever a key is called.
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


class Looker:
    """Looks at the segment in a thread of its own, every so many seconds; the last look is what all
    browsers are shown."""

    def __init__(self, sampler: Sampler, every: float, stop: threading.Event) -> None:
        self._sampler, self.every, self._stop = sampler, every, stop
        self.snapshot = Snapshot(sampler.name, 0.0, problem="Looking ...")
        self.sorting = threading.Lock()  # of the names that are kept; one browser after the other

    def look_on(self) -> None:
        """Until ``stop`` is set. The second look comes soon: from then on there are rates."""
        pause = min(0.3, self.every)
        while True:
            with self.sorting:
                self.snapshot = self._sampler.sample()
            if self._stop.wait(pause):
                return
            pause = self.every


class SafeHosts:
    """Answers only who asked for this host by an address, as localhost, or by a name that was
    allowed: a page of another site, whose name was made to lead here (DNS rebinding), is refused.
    An address cannot be made to lead elsewhere."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = {"localhost", *(name.lower() for name in allowed)}

    def is_safe(self, header: str) -> bool:
        """Of a Host header, with or without a port."""
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
        said = hosts[0] if hosts else ""
        refusal = PlainTextResponse(
            f"Refused: {said!r} is not a name of this host that is allowed. Open it as localhost "
            "or by its address, or start it with `fast-shm dashboard --allow-host NAME`.\n",
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
        "remaining": row.remaining,
        "limit": row.limit,
        "retry_after": row.retry_after,
        "reset_after": row.reset_after,
        "admitted_history": key.admitted_history,
        "denied_history": key.denied_history,
    }


def _escaped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Permits and pools, with names as they are shown."""
    return [
        {name: render.escaped(v) if isinstance(v, str) else v for name, v in row.items()}
        for row in rows
    ]


def snapshot_json(
    snapshot: Snapshot, sort: str, reverse: bool, match: str, top: int
) -> dict[str, Any]:
    """What the page shows of a look: the first ``top`` keys of this order that fit."""
    keys, total, fitting = [], 0, 0
    if snapshot.keys is not None:
        cells, fitting = snapshot.keys.order(sort, reverse=reverse, match=match)
        keys = [_key_json(key) for key in snapshot.keys.rows(cells[:top]) if key is not None]
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
        "deployments": [asdict(deployment) for deployment in snapshot.deployments],
        "keys": keys,
        "keys_fitting": fitting,
        "keys_total": total,
    }


def make_app(looker: Looker, allowed_hosts: Iterable[str]) -> ASGIApp:
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
            with looker.sorting:
                found = snapshot_json(
                    looker.snapshot, sort, query.get("reverse") == "1", match, int(top)
                )
            return found | {"every": looker.every}

        return JSONResponse(await run_in_threadpool(read))

    routes = [Route(path, file) for path in _FILES] + [Route("/api/snapshot", snapshot)]
    return SafeHosts(Starlette(routes=routes), allowed_hosts)
