"""LiteLLM's built-in limiter, which counts in the segment instead of in Redis: all limits in
``mode: native``, else those that the plugin does not keep.

All that LiteLLM limits with it then holds over all workers of the host: keys, users, teams,
projects, organisations, tags, agents, end users, MCP servers, batches. Codes, headers and messages
are LiteLLM's own. The limiter's store is not a public interface of LiteLLM: :func:`install` first
looks for what is needed of it, and returns what is missing.

It counts for one host, whatever else is set: the only server that it knows is LiteLLM's Redis.

Not shared: ``dynamic_rate_limiter_v3``, which makes a limiter of its own. Where LiteLLM has a Redis
configured, this limiter does not use it any more: the limits hold for each host.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

from fast_litellm_shm._shared.settings import warn_not_shared
from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.builtin_limiter import HOOK
from fast_litellm_shm.integrations.litellm.builtin_limiter.store import Handle

LIMITER = "litellm.proxy.hooks.parallel_request_limiter_v3"
_STORE = "litellm.redis.stores.rate_limits"
_REPLIES = (
    *("WindowCount", "AtomicApplied", "AtomicOverLimit", "GuardedReply"),
    *("GaugesAcquired", "GaugeOverLimit"),
)
_ARGUMENTS = ("internal_usage_cache", "rate_limit_store", "fail_closed_resolver")
_REFUSED = (
    "The request could not be counted, since the shared memory of the rate limits is not "
    "available, and fail_open is false. The log of the proxy says why."
)


def _arguments(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def missing() -> str | None:
    """What the installed litellm lacks; None where it has everything."""
    try:
        limiter: Any = importlib.import_module(LIMITER)
        store: Any = importlib.import_module(_STORE)
        protocol = importlib.import_module(f"{_STORE}.handle").RateLimitsHandle
        base = limiter.PROXY_MaxParallelRequestsHandler_v3
        importlib.import_module("litellm.redis.stores.connection").connect(None).rate_limits(None)
        store.RateLimitStore.__init__  # noqa: B018
    except (ImportError, AttributeError, TypeError) as error:
        return f"it has no limiter with a store of its own ({error})"
    lacking = [name for name in _ARGUMENTS if name not in _arguments(base.__init__)]
    if lacking:
        return f"its limiter takes no {' and no '.join(lacking)}"
    types = importlib.import_module(f"{_STORE}.types")
    lacking = [name for name in _REPLIES if not hasattr(types, name)]
    if lacking:
        return f"its store has no {' and no '.join(lacking)}"
    for name, wanted in vars(protocol).items():
        if name.startswith("_"):
            continue
        ours = getattr(Handle, name, None)
        if ours is None:
            return f"its store needs {name}(), which this package does not have"
        if inspect.isfunction(wanted) and list(_arguments(ours)) != list(_arguments(wanted)):
            return f"its store's {name}() takes other arguments: {', '.join(_arguments(wanted))}"
    return None


@cache
def make_handler() -> Any:
    """The class: LiteLLM's limiter with our store. Raises where the installed litellm lacks what it
    needs; :func:`install` looks first."""
    limiter: Any = importlib.import_module(LIMITER)
    store: Any = importlib.import_module(_STORE)
    replies = importlib.import_module(f"{_STORE}.types")
    connect = importlib.import_module("litellm.redis.stores.connection").connect
    http_exception = importlib.import_module("fastapi").HTTPException
    base: Any = limiter.PROXY_MaxParallelRequestsHandler_v3
    of_litellm = _arguments(base.__init__)["fail_closed_resolver"].default
    unverifiable: Any = getattr(limiter, "RateLimitUnverifiableError", ())

    def fails_closed() -> bool:
        """By our ``fail_open``, or by LiteLLM's ``fail_closed_rate_limit_enforcement``."""
        return not settings.current().fail_open or bool(of_litellm())

    class SharedMemoryLimiter(base):  # type: ignore[misc]
        """LiteLLM's limiter, with the segment as its store."""

        # The proxy passes arguments by their names here, and calls only hooks that the class itself
        # defines: an inherited async_pre_call_hook would never run.
        def __init__(self, internal_usage_cache: Any) -> None:
            memory = connect(None).rate_limits(
                internal_usage_cache.dual_cache.default_in_memory_ttl
            )
            self.shared_memory = Handle(memory, replies)
            super().__init__(
                internal_usage_cache=internal_usage_cache,
                rate_limit_store=store.RateLimitStore(self.shared_memory),
                fail_closed_resolver=fails_closed,
            )
            self.shared_memory.window_size = int(self.window_size)

        async def async_pre_call_hook(
            self, user_api_key_dict: Any, cache: Any, data: Any, call_type: Any, **more: Any
        ) -> Any:
            error = self.shared_memory.missing()
            if error is not None:
                refused = fails_closed()
                consequence = "it is refused with 503" if refused else "this worker counts alone"
                failures.report("checking a request", error, consequence)
                if refused:
                    raise http_exception(503, detail={"error": _REFUSED})
            try:
                return await super().async_pre_call_hook(
                    user_api_key_dict, cache, data, call_type, **more
                )
            except unverifiable as of_redis:  # whose text speaks of Redis
                raise http_exception(503, detail={"error": _REFUSED}) from of_redis

    return SharedMemoryLimiter


def install(hooks: dict[str, Any]) -> str | None:
    """Put the class into LiteLLM's table of hooks (``litellm.proxy.hooks.PROXY_HOOKS``). The proxy
    makes its limiter from the table when it starts, after it has imported the callbacks.

    Returns None; or one sentence that says why not, and leaves the table as it was. Opens no
    segment.
    """
    lacking = missing()
    if lacking is not None:
        return f"mode native is not available with the installed litellm: {lacking}"
    base = importlib.import_module(LIMITER).PROXY_MaxParallelRequestsHandler_v3
    present = hooks.get(HOOK)
    if not (isinstance(present, type) and issubclass(present, base)):
        return (
            f"mode native is not available: the proxy's {HOOK} is {present!r}, not LiteLLM's "
            "version 3 (LEGACY_MULTI_INSTANCE_RATE_LIMITING chooses an older one)"
        )
    hooks[HOOK] = make_handler()
    warn_not_shared("LiteLLM's built-in limiter (mode native)", settings.current().cluster)
    return None
