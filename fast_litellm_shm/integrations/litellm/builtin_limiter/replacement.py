"""LiteLLM's own limiter beside ours: it keeps what we do not, and leaves to us what we keep.

It counts in each worker, in windows of its own, and charges what we deny: in front of ours it would
let less pass than is configured. So each limit is kept by one of the two. Which one, LiteLLM's
limiter asks :func:`limiter.found_for`, as ours has found it.
"""

from __future__ import annotations

import inspect
import logging
import sys
from contextvars import ContextVar
from typing import Any

from fast_litellm_shm.integrations.litellm import settings

# Each turn of such a connection is judged by LiteLLM's limiter alone: it passes no hook of ours.
_TURN = "_aresponses_websocket"
# Whether our hook has judged the request of this context. Where it could not, LiteLLM's limiter
# does, which comes later: as many workers, as many times the limit, but no request is unlimited.
judged: ContextVar[bool] = ContextVar("fast_litellm_shm_judged", default=True)
_MINUTE = 60
_HOOK = "parallel_request_limiter"
_CLASS = "_PROXY_MaxParallelRequestsHandler_v3"
_FIELDS = (
    ("requests_per_unit", "rpm"),
    ("tokens_per_unit", "tpm"),
    ("max_parallel_requests", "max_parallel"),
)


def without(descriptors: list[Any], ours: dict[tuple[str, str], Any]) -> list[Any]:
    """Their descriptors without the limits that we keep. ours: our limits by kind and value."""
    out = []
    for descriptor in descriptors:
        kept = ours.get((descriptor["key"], descriptor["value"]))
        limited = descriptor.get("rate_limit")
        if kept is None or not limited:
            out.append(descriptor)
            continue
        left = dict(limited)
        some = False
        for theirs, field in _FIELDS:
            if left.get(theirs) is not None:
                if getattr(kept, field) is None:
                    some = True
                else:
                    left[theirs] = None
        if some:
            out.append({**descriptor, "rate_limit": left})
    return out


def _quieter(base: Any, found_for: Any) -> Any:
    class SharedParallelRequestLimiter(base):  # type: ignore[misc]
        """LiteLLM's limiter, for what the shared one does not keep."""

        async def async_pre_call_hook(self, *args: Any, **kwargs: Any) -> Any:
            return await super().async_pre_call_hook(*args, **kwargs)

        async def _build_request_rate_limit_descriptors(
            self, user_api_key_dict: Any, data: Any, call_type: Any
        ) -> Any:
            found = await super()._build_request_rate_limit_descriptors(
                user_api_key_dict, data, call_type
            )
            if not found or call_type is None or call_type == _TURN or not judged.get():
                return found  # also asked for by what passes no hook of ours
            try:
                ours = {(s.kind, s.value): s.limits for s in found_for(user_api_key_dict, data)}
            except Exception:  # our own hook says it; theirs keeps what it can
                return found
            return without(found, ours)

    return SharedParallelRequestLimiter


_native = False


def native_serves() -> bool:
    """Whether LiteLLM's own limiter counts in the segment (``mode: native``), and ours not."""
    return _native


def _maker(base: Any, found_for: Any) -> Any:
    quieter = _quieter(base, found_for)

    def make(internal_usage_cache: Any) -> Any:  # the proxy gives it by that name
        global _native
        if settings.current().mode == "native":
            from fast_litellm_shm.integrations.litellm.builtin_limiter import (
                segment_limiter,
            )

            table: dict[str, Any] = {_HOOK: base}
            lacking = segment_limiter.install(table)
            if lacking is None:
                _native = True
                return table[_HOOK](internal_usage_cache=internal_usage_cache)
            logging.getLogger("fast_litellm_shm").warning("%s; mode hooks applies", lacking)
        _native = False
        made = quieter(internal_usage_cache=internal_usage_cache)
        seconds = getattr(made, "window_size", _MINUTE)
        if seconds != _MINUTE:
            logging.getLogger("fast_litellm_shm").warning(
                "LITELLM_RATE_LIMIT_WINDOW_SIZE is %s: requests and tokens are limited by %s "
                "seconds all the same, except for what LiteLLM's own limiter keeps; with mode "
                "native it holds for all",
                seconds,
                _MINUTE,
            )
        return made

    return make


def install(found_for: Any) -> None:
    """Before the proxy makes its hooks, which it does after it has read its whole configuration.
    Outside of the proxy there is nothing to do. Where this LiteLLM offers no way, the log says so.
    """
    if "litellm.proxy.proxy_server" not in sys.modules:
        return
    log = logging.getLogger("fast_litellm_shm")
    try:
        from litellm.proxy import hooks
        from litellm.proxy.hooks import parallel_request_limiter_v3 as v3

        base = getattr(v3, _CLASS)
        inspect.signature(base._build_request_rate_limit_descriptors).bind(None, None, None, None)
        current = hooks.PROXY_HOOKS[_HOOK]
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        log.warning(
            "this LiteLLM's own limiter cannot be told what is kept for it (%s): it counts "
            "besides, in each worker, and can deny what all workers together have room for; "
            "there is no mode native",
            error,
        )
        return
    if isinstance(current, type) and issubclass(current, base):
        hooks.PROXY_HOOKS[_HOOK] = _maker(base, found_for)
