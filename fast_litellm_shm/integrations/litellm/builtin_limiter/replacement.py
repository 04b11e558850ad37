"""What the proxy makes in place of LiteLLM's built-in limiter.

The built-in limiter counts in each worker, in windows of its own, and it also counts requests that
the plugin denies. Kept for the same limits, it would admit less than is configured. So in ``mode:
hooks`` it keeps only the limits that the plugin does not keep (:func:`.limiter.found_for`): of
tags, agents, MCP servers, projects, batches, keys of the type ``dynamic``. In ``mode: native`` it
keeps all limits, and the plugin keeps none. In either it counts in the segment, where this LiteLLM
lets it, and has no Redis.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

from fast_litellm_shm._shared import log
from fast_litellm_shm.integrations.litellm import settings
from fast_litellm_shm.integrations.litellm.builtin_limiter import HOOK
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subjects

FoundFor: TypeAlias = Callable[[Any, Mapping[str, Any]], Subjects]

# The call type of a turn of such a connection. LiteLLM calls none of our hooks for it.
_TURN = "_aresponses_websocket"
# Whether our hook could check the request of this context. Where it could not, the built-in limiter
# keeps all limits of it, in each worker: so no request is unlimited. (Its hook runs after ours.)
checked: ContextVar[bool] = ContextVar("fast_litellm_shm_checked", default=True)
_MINUTE = 60
_OURS = frozenset(
    (*("api_key", "user", "team", "team_member", "end_user", "organization"),
     *("model_per_key", "model_per_team", "model_per_organization"))
)  # fmt: skip
_THEIRS = ("requests_per_unit", "tokens_per_unit", "max_parallel_requests")  # in our order


@functools.lru_cache(maxsize=1024)
def _not_ours(kept: Limits) -> tuple[str, ...]:
    """What the plugin does not limit, in LiteLLM's words."""
    return tuple(theirs for theirs, n in zip(_THEIRS, kept, strict=True) if n is None)


def without(descriptors: list[Any], ours: Mapping[tuple[str, str], Limits]) -> list[Any]:
    """LiteLLM's descriptors without the limits that the plugin keeps. ours: those, by kind and
    value."""
    out = []
    for descriptor in descriptors:
        kept = ours.get((descriptor["key"], descriptor["value"]))
        limited = descriptor.get("rate_limit")
        if kept is None or not limited:
            out.append(descriptor)
            continue
        left = [theirs for theirs in _not_ours(kept) if limited.get(theirs) is not None]
        if left:
            mine = {theirs: None for theirs in _THEIRS if theirs in limited and theirs not in left}
            out.append({**descriptor, "rate_limit": {**limited, **mine}})
    return out


def _reduced(base: Any, found_for: FoundFor) -> Any:
    """The class of ``mode: hooks``."""

    class SharedParallelRequestLimiter(base):  # type: ignore[misc]
        """The built-in limiter, for the limits that the plugin does not keep."""

        # LiteLLM calls only hooks that the class itself defines.
        async def async_pre_call_hook(self, *args: Any, **kwargs: Any) -> Any:
            return await super().async_pre_call_hook(*args, **kwargs)

        async def _build_request_rate_limit_descriptors(
            self, user_api_key_dict: Any, data: Any, call_type: Any
        ) -> Any:
            found = await super()._build_request_rate_limit_descriptors(
                user_api_key_dict, data, call_type
            )
            if not found or call_type is None or call_type == _TURN or not checked.get():
                return found  # call_type is None where LiteLLM calls it outside of our hook
            try:
                ours = found_for(user_api_key_dict, data).limits_of
            except Exception:  # our own hook reports it
                return found
            return without(found, ours)

        def _build_reservation_aware_tpm_ops(
            self, targets: Any, reserved_scopes: Any, **more: Any
        ) -> Any:
            # It charges tokens to whatever could have a limit. What the plugin keeps, nobody reads.
            return super()._build_reservation_aware_tpm_ops(
                targets=[
                    target
                    for target in targets
                    if target[0] not in _OURS or tuple(target) in reserved_scopes
                ],
                reserved_scopes=reserved_scopes,
                **more,
            )

    if not hasattr(base, "_build_reservation_aware_tpm_ops"):
        del SharedParallelRequestLimiter._build_reservation_aware_tpm_ops
    return SharedParallelRequestLimiter


# Whether the built-in limiter counts in the segment (``mode: native``), and the plugin not.
builtin_serves = False


def _counting(base: Any, internal_usage_cache: Any) -> Any:
    """The built-in limiter that counts in the segment; LiteLLM's own where it has a Redis, which
    all hosts count in, or where this LiteLLM offers no way."""
    from fast_litellm_shm.integrations.litellm.builtin_limiter import segment_limiter

    theirs = getattr(sys.modules.get(segment_limiter.LIMITER), base.__name__, None)
    cache = getattr(internal_usage_cache, "dual_cache", None)
    if base is not theirs or getattr(cache, "redis_cache", None) is not None:
        return base
    return base if segment_limiter.missing() is not None else segment_limiter.make_handler()


def _maker(base: Any, found_for: FoundFor) -> Callable[[Any], Any]:
    def make(internal_usage_cache: Any) -> Any:  # the proxy passes it by this name
        global builtin_serves
        builtin_serves = False
        if settings.current().mode == "native":
            from fast_litellm_shm.integrations.litellm.builtin_limiter import segment_limiter

            table: dict[str, Any] = {HOOK: base}
            lacking = segment_limiter.install(table)
            if lacking is None:
                builtin_serves = True
                return table[HOOK](internal_usage_cache=internal_usage_cache)
            log.warning("%s; mode hooks applies", lacking)
        made = _reduced(_counting(base, internal_usage_cache), found_for)(
            internal_usage_cache=internal_usage_cache
        )
        seconds = getattr(made, "window_size", _MINUTE)
        if seconds != _MINUTE:
            log.warning(
                "LITELLM_RATE_LIMIT_WINDOW_SIZE is %s, which only LiteLLM's built-in limiter "
                "obeys: the plugin limits requests and tokens by %s seconds. With mode native the "
                "variable applies to all limits",
                seconds,
                _MINUTE,
            )
        return made

    return make


def install(found_for: FoundFor) -> None:
    """Replace the built-in limiter in LiteLLM's table of hooks. The proxy makes its hooks after it
    has read its whole configuration, so after the plugin was imported. Outside of the proxy this
    does nothing. Where this LiteLLM has no such table, one log line says so.
    """
    if "litellm.proxy.proxy_server" not in sys.modules:
        return
    try:
        from litellm.proxy import hooks
        from litellm.proxy.hooks import parallel_request_limiter_v3 as v3

        base = v3._PROXY_MaxParallelRequestsHandler_v3
        inspect.signature(base._build_request_rate_limit_descriptors).bind(None, None, None, None)
        current = hooks.PROXY_HOOKS[HOOK]
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        log.warning(
            "the built-in limiter of this litellm cannot be replaced (%s): it counts besides the "
            "plugin, in each worker, and may deny what all workers together have room for; mode "
            "native is not available. See docs/litellm.md for the versions that are supported",
            error,
        )
        return
    if isinstance(current, type) and issubclass(current, base):
        hooks.PROXY_HOOKS[HOOK] = _maker(base, found_for)
