"""Rate limits that all worker processes of a host share, in shared memory, with no server.

The limits, RateLimiter, Segment and the exceptions are loaded at import, all other names at their
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"  # the one place; pyproject.toml reads it

from fast_litellm_shm import exceptions, fast_litellm
from fast_litellm_shm._shared.later import loader
from fast_litellm_shm._shared.native import Decision, Permit
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import *  # noqa: F403
from fast_litellm_shm.fast_litellm import import_hook
from fast_litellm_shm.limiters.rate import Batch, RateLimiter
from fast_litellm_shm.limits import FixedWindow, Limit, SlidingWindow, TokenBucket, Window

if TYPE_CHECKING:
    from fast_litellm_shm.fast_litellm import *  # noqa: F403
    from fast_litellm_shm.limiters.adaptive import AdaptiveCall, AdaptiveConcurrency
    from fast_litellm_shm.limiters.budget import Budget, Reservation
    from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
    from fast_litellm_shm.limiters.decorators import limited
    from fast_litellm_shm.limiters.hierarchy import HierarchyLimiter
    from fast_litellm_shm.limiters.quota import Admission, Quota

__all__ = [
    # limits
    "TokenBucket",
    "FixedWindow",
    "SlidingWindow",
    "Limit",  # of TokenBucket
    "Window",  # of FixedWindow
    # limiters
    "RateLimiter",
    "HierarchyLimiter",
    "ConcurrencyLimiter",
    "AdaptiveConcurrency",
    "Quota",
    "Budget",
    "limited",
    "Segment",
    # their answers
    "Decision",
    "Permit",
    "AdaptiveCall",
    "Admission",
    "Reservation",
    "Batch",
]
__all__ += exceptions.__all__
__all__ += fast_litellm.__all__  # tokens, pools and routing among them

if not TYPE_CHECKING:  # with it, a type checker would accept every name
    _load = loader(
        __name__,
        {
            "limiters.adaptive": "AdaptiveCall AdaptiveConcurrency",
            "limiters.budget": "Budget Reservation",
            "limiters.concurrency": "ConcurrencyLimiter",
            "limiters.decorators": "limited",
            "limiters.hierarchy": "HierarchyLimiter",
            "limiters.quota": "Admission Quota",
            **fast_litellm.MODULES,
        },
    )

    def __getattr__(name: str) -> Any:
        if name in ("_rust", "enhanced_monkeypatch", "feature_flags"):  # as fast-litellm has them
            return importlib.import_module(f"{__name__}.{name}")
        return _load(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _accelerate() -> None:
    fast_litellm.apply_acceleration()  # loaded now, and not when this module is


import_hook.on_import(_accelerate)
