"""WSGI middleware: limits for Flask, Django, Pyramid, Bottle, whatever is WSGI.

Needs no extra package. All workers of the host count together::

    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Rule

    rules = [Rule(TokenBucket(100, per=60))]
    app.wsgi_app = RateLimitMiddleware(app.wsgi_app, rules, name="shop")  # Flask
    application = RateLimitMiddleware(application, rules, name="shop")  # any other

See docs/web.md, and :class:`Rule` for what a rule can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http.client import responses
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.web import (
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.answers import LISTS
from fast_litellm_shm.integrations.web.gate import MARK, Gate
from fast_litellm_shm.integrations.web.request import WsgiRequest

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster

__all__ = [
    "MARK",
    "Outcome",
    "RateLimitMiddleware",
    "Request",
    "Rule",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
]

Environ: TypeAlias = dict[str, Any]
ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None
)
StartResponse: TypeAlias = Callable[..., Any]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class RateLimitMiddleware:
    """Stands before ``app``. rules: the first that matches a request is asked; a request that none
    matches is not limited. name: of the application; whatever has the same name in the same segment
    shares its counts. segment: default ``Segment.default()``. on_error: ``"deny"`` or ``"allow"``
    what cannot be checked, because the segment is full or cannot be used. on_cost_error: ``"deny"``
    requests whose cost function fails, with 503, or ``"count"`` them as 1, for the client's
    address. ambiguous_paths: ``"count"`` a request under each rule that its path may mean, or
    ``"refuse"`` it with 400; see "How a path is read" in ``docs/web.md``.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limits hold over all hosts that name the same server; False: this host alone; default: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``. A request may wait
    for the server, as long as its timeout says.

    A refused request is answered with 429 (or 503) and a JSON body. What became of a request is in
    ``environ["fast_litellm_shm.rate_limit"]``, an :class:`Outcome`. A permit is held until the
    server closes the answer, which it does also when the client has gone. Safe before and after a
    fork.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
    ImportError where a cluster is named and the library for it is missing.
    """

    def __init__(
        self,
        app: App,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: Cluster | str | Literal[False] | None = None,
    ) -> None:
        self.app = app
        self._gate = Gate(
            rules,
            name=name,
            segment=segment,
            on_error=on_error,
            on_cost_error=on_cost_error,
            ambiguous_paths=ambiguous_paths,
            cluster=cluster,
        )

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        outcome = self._gate.check(WsgiRequest(environ))
        if outcome is None:
            return self.app(environ, start_response)

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: ExcInfo = None
        ) -> Callable[[bytes], object]:
            more = [*headers, *_missing(outcome, headers)]
            write: Callable[[bytes], object]
            write = (
                start_response(status, more, exc_info) if exc_info else start_response(status, more)
            )
            return write

        try:
            environ[MARK] = outcome
            if outcome.refused:
                refused, fields, body = outcome.refusal()
                start_response(f"{refused} {responses[refused]}", fields)
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
            answer = self.app(environ, start)
            return _Body(answer, outcome) if outcome.holds else answer
        except BaseException:
            outcome.release()
            raise


class _Body:
    """The app's answer, which lets go of the permit when the server closes it."""

    def __init__(self, body: Iterable[bytes], outcome: Outcome) -> None:
        self._body, self._outcome = body, outcome

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._outcome.release()


def _missing(outcome: Outcome, present: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers to add. Those that are a list may come twice, from a limit further in; of the
    others the inner one's stands, and so does what the app says itself."""
    there = {name.lower() for name, _ in present}
    return [
        (name, value)
        for name, value in outcome.headers()
        if name.lower() in LISTS or name.lower() not in there
    ]
