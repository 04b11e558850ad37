"""Middleware: what the ASGI and the WSGI middleware have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.web.gate import Gate
from fast_litellm_shm.integrations.web.rules import Rule
from fast_litellm_shm.limiters.grantors import ClusterArgument

_App = TypeVar("_App")


class Middleware(Generic[_App]):
    def __init__(
        self,
        app: _App,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: ClusterArgument = None,
    ) -> None:
        """Limits the requests to ``app``.

        rules: a request is checked against the first rule that matches it; a request that no rule
        matches is not limited.
        name: of the application. Middlewares of the same name in the same segment share their
        counts.
        segment: default ``Segment.default()``.
        on_error: ``"deny"`` or ``"allow"`` requests that cannot be checked, because the segment is
        full (429) or cannot be used (503).
        on_cost_error: ``"deny"`` requests whose cost function fails, with 503, or ``"count"`` them
        as 1, for the client's address.
        ambiguous_paths: ``"count"`` a request under each rule that its path may mean, or
        ``"refuse"`` it with 400; see "How a path is read" in ``docs/web.md``.
        cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`:
        the limits hold over all hosts that name the same server; False: over this host alone;
        default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``.

        Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
        ImportError where a cluster is named and the library for it is missing.
        """
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
