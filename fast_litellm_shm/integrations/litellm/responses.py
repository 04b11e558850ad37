"""What clients receive, in LiteLLM's own form: the 429 of a denial and its headers, the headers of
an answer, and the 503 where nothing could be checked."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

import httpx
import litellm

from fast_litellm_shm.integrations.litellm import queue
from fast_litellm_shm.integrations.litellm.admission import NAMES, Denial
from fast_litellm_shm.integrations.litellm.queue import Waited
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject


@functools.cache  # ten kinds and "", of three each
def _headers_of_kind(kind: str, name: str) -> tuple[str, str]:
    what, of = NAMES[name], f"x-ratelimit-{kind}-" if kind else "x-ratelimit-"
    return f"{of}remaining-{what}", f"{of}limit-{what}"


@functools.lru_cache(maxsize=1024)  # the limits of a key come with each of its requests
def _headers_of_limits(kind: str, limits: Limits) -> tuple[tuple[str, str, str, str], ...]:
    """Of requests and tokens: name, its two headers, and the value of the second."""
    return tuple(
        (name, *_headers_of_kind(kind, name), str(limit))
        for name, limit in (("rpm", limits.rpm), ("tpm", limits.tpm))
        if limit is not None
    )


def headers_of(remaining: Iterable[tuple[Subject, tuple[int, ...]]]) -> dict[str, str]:
    """For each subject ``x-ratelimit-api_key-remaining-requests``, ``-tokens`` and the limits, as
    LiteLLM names them; and ``x-ratelimit-remaining-requests`` and so on, of the subject that has
    least left."""
    out: dict[str, str] = {}
    least: dict[str, tuple[int, str, str]] = {}
    for (kind, _, limits, _), left in remaining:
        # strict= would take a third of the time
        for (name, of_rest, of_limit, limit), n in zip(_headers_of_limits(kind, limits), left):  # noqa: B905
            out[of_rest] = rest = str(n)
            out[of_limit] = limit
            known = least.get(name)
            if known is None or n < known[0]:
                least[name] = n, rest, limit
    for name, (_, rest, limit) in least.items():
        of_rest, of_limit = _headers_of_kind("", name)
        out[of_rest], out[of_limit] = rest, limit
    return out


def _message(denial: Denial) -> tuple[str, dict[str, str]]:
    """Text and headers."""
    then = time.gmtime(time.time() + denial.retry_after)
    resets = time.strftime("%Y-%m-%d %H:%M:%S UTC", then)
    headers = {
        "retry-after": str(denial.retry_after),
        "rate_limit_type": denial.type,
        "reset_at": resets,
    }
    name = next(name for name, what in NAMES.items() if what == denial.type)
    for of_rest, of_limit in (_headers_of_kind(kind, name) for kind in (denial.subject.kind, "")):
        headers[of_rest], headers[of_limit] = str(denial.remaining), str(denial.limit)
    return (
        f"Rate limit exceeded for {denial.subject.kind}: {denial.subject.value}. "
        f"Limit type: {denial.type}. Current limit: {denial.limit}, "
        f"Remaining: {denial.remaining}. Limit resets at: {resets}"
    ), headers


def _rate_limit_error(detail: str, headers: dict[str, str], model: str, **more: Any) -> Exception:
    request = httpx.Request("POST", "https://github.com/BerriAI/litellm")
    error: Exception = litellm.RateLimitError(
        message=detail,
        llm_provider="",
        model=model,
        response=httpx.Response(429, headers=headers, content=detail, request=request),
        **more,
    )
    return error


def too_many(denial: Denial, model: str | None, waited: Waited | None = None) -> Exception:
    """The 429 of a request to the proxy."""
    detail, headers = _message(denial)
    headers.update(queue.headers_of(waited))
    try:
        from litellm.proxy.common_utils import proxy_rate_limit_error as theirs
    except ImportError:  # a release that has none, or no proxy
        return _rate_limit_error(detail, headers, model or "")
    error: Exception = theirs.ProxyRateLimitError(
        detail=detail,
        headers=headers,
        rate_limit_type=theirs.map_v3_rate_limit_type(denial.type),
        model=model,
        descriptor_key=denial.subject.kind,
    )
    return error


def too_many_for(model: str, denial: Denial) -> Exception:
    """The 429 of one attempt at a deployment. LiteLLM does not try again where the minute is used
    up, as with its own check; where slots are used up, another deployment may have a free one."""
    detail, headers = _message(denial)
    more: dict[str, Any] = {} if denial.type == "max_parallel_requests" else {"num_retries": 0}
    return _rate_limit_error(f"Model rate limit exceeded. {detail}", headers, model, **more)


def unchecked(error: BaseException) -> Exception:
    """The 503 of a request to the proxy, where ``fail_open`` is false."""
    from fastapi import HTTPException

    found: Exception = HTTPException(
        503,
        f"the rate limits of this request could not be checked ({type(error).__name__}); "
        "try again later",
        {"retry-after": "1"},
    )
    return found


def unchecked_for(model: str, error: BaseException) -> Exception:
    """The 503 of one attempt at a deployment, where ``fail_open`` is false."""
    found: Exception = litellm.ServiceUnavailableError(
        message=f"the limits of this deployment could not be checked ({type(error).__name__})",
        llm_provider="",
        model=model,
    )
    return found
