"""The callback itself: which of LiteLLM's hooks does what.

===========================================  =====================================================
``async_pre_call_hook``                      admits the request for its key, user, team, ..., or 429
``async_post_call_success_hook``             it is answered: slots back, true tokens booked
``async_post_call_streaming_iterator_hook``  the stream has ended or its client has left: slots back
``async_log_success_event``                  an attempt was answered; true tokens, of streams too
``async_log_failure_event``                  an attempt failed, and may be tried again
``async_post_call_failure_hook``             the request failed: slots and unused tokens back
``async_post_call_response_headers_hook``    ``x-ratelimit-*``
``async_pre_call_check``                     admits one attempt at one deployment, or 429
===========================================  =====================================================

LiteLLM calls ``async_pre_call_hook`` only where the class itself has it. What a hook of ours cannot
do is told by :mod:`.failures`, and ``fail_open`` decides about the request.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

from litellm.integrations.custom_logger import CustomLogger

from fast_litellm_shm.integrations.litellm import (
    attempts,
    calls,
    failures,
    responses,
    settings,
    usage,
)
from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
from fast_litellm_shm.integrations.litellm.calls import Attempt, Call, Held
from fast_litellm_shm.integrations.litellm.router.sharing import routers
from fast_litellm_shm.integrations.litellm.subjects import Subject, of_calls, subjects
from fast_litellm_shm.tokens import counter as tokens

_TOOL_CALL = "call_mcp_tool"
# With these in its body, or their headers, a client asks for more tries than the router makes.
_TRIES = (
    *("num_retries", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks"),
    "model_group_retry_policy",
)
# Its body may have them in here too; what a key's or team's own router settings say stands there.
_OVERRIDE = "router_settings_override"
_ABOUT_TRIES = frozenset((*_TRIES, _OVERRIDE))
_OURS_NOT = frozenset({"acreate_batch", "create_batch"})  # LiteLLM counts the requests in its file

# The call of a request; False where it was denied: its hooks must not find another call of its id.
_call: ContextVar[Call | Literal[False] | None] = ContextVar("fast_litellm_shm_call", default=None)
# The attempt of a context, until it is in the kwargs of its log events. It is taken out of the list
# then: contexts live as long as whatever was begun in them, and one of an attempt that is cancelled
# without any event, or of a stream that nobody reads to its end, must not hold its slot.
_attempt: ContextVar[list[Attempt]] = ContextVar("fast_litellm_shm_attempt")
_ATTEMPT = "fast_litellm_shm_attempt"  # in the kwargs of log events: streams end in another context


def router_of_proxy() -> Any:
    """The proxy's router; None where there is none."""
    return getattr(sys.modules.get("litellm.proxy.proxy_server"), "llm_router", None)


def _group(model: str) -> str | None:
    """What a model's name is an alias of, in the proxy's router."""
    router = router_of_proxy()
    if router is None:
        return None
    found = router.registry().aliases().get(model)
    if isinstance(found, Mapping):
        found = found.get("model")
    return found if isinstance(found, str) else None


def subjects_of(
    auth: Any, data: Mapping[str, Any], models: Mapping[str, int] | None = None
) -> list[Subject]:
    """Whom a request to the proxy counts for. models: those of its calls; None: as it says."""
    found = data.get("model")
    model = found if isinstance(found, str) else None
    if models and models.get(model or "") != 1:
        return of_calls(auth, models, _group)
    return subjects(auth, model, _group)


def _retries() -> int:
    """How often the proxy's router tries again."""
    found = getattr(router_of_proxy(), "num_retries", None)
    return found if isinstance(found, int) else 0


def _count_tries(call: Call, data: dict[str, Any]) -> None:
    """Where the client has a say in how often each call is tried: tries that the router would not
    make by itself count as requests, and it may ask for as many as it has left. (LiteLLM waits
    between tries: one that is denied would not end the request.)"""
    if _ABOUT_TRIES.isdisjoint(data):
        return
    override = data.get(_OVERRIDE)
    asked = [data, dict(override)] if isinstance(override, Mapping) else [data]
    if not any(name in each for each in asked for name in _TRIES):
        return
    free = _retries()
    call.free = call.guess.made.calls * (1 + free)
    left = call.held.requests_left()
    if left is None:
        return
    for each in asked:
        for name in ("num_retries", "model_group_retry_policy"):
            if name in each:
                each[name] = _at_most(each[name], max(free, left))
    if len(asked) > 1:
        data[_OVERRIDE] = asked[1]


def _at_most(tries: Any, most: int, depth: int = 2) -> Any:
    """A number of tries; of a retry policy, those of each group and error."""
    if isinstance(tries, Mapping) and depth:
        return {name: _at_most(n, most, depth - 1) for name, n in tries.items()}
    return min(tries, most) if isinstance(tries, int) else tries


def _tenant(auth: Any) -> str | None:
    """Whose texts are counted: those of a key, and of an end user of it."""
    key, end_user = getattr(auth, "api_key", None), getattr(auth, "end_user_id", None)
    return None if key is None else f"{key}\0{end_user}"


def _who(auth: Any, found: Sequence[Subject]) -> Hashable:
    """Whose answers a guess learns from."""
    return auth.api_key or tuple(subject[:2] for subject in found)


def _least_tokens(found: Sequence[Subject]) -> int:
    """The smallest limit of tokens among them; 0: there is none."""
    least = 0
    for subject in found:
        limit = subject.limits.tpm
        if limit and (not least or limit < least):
            least = limit
    return least


def found_for(auth: Any, data: Mapping[str, Any]) -> Sequence[Subject]:
    """subjects_of() a request that is being made: those that our hook has found, where it was asked
    about the same in this context."""
    call = _call.get()
    if call and call.by is auth and call.guess.model == data.get("model"):
        return call.held.subjects
    return subjects_of(auth, data)


def _deployment_of(kwargs: Mapping[str, Any]) -> str:
    """Of a log event: the id of the deployment it is about."""
    params = kwargs.get("litellm_params") or {}
    info = params.get("model_info") or (params.get("metadata") or {}).get("model_info") or {}
    return str(info.get("id"))


def _has_ended(response: Any) -> bool:
    """False of an answer that is still being made, in the background: its tokens are to come."""
    return getattr(response, "status", None) not in ("queued", "in_progress")


def _id_of(of: Mapping[str, Any]) -> Any:
    """The call id that log events will have. Of a pass-through, the data is the client's body, and
    what it says of an id is the client's."""
    logging = of.get("litellm_logging_obj")
    return getattr(logging, "litellm_call_id", None) or of.get("litellm_call_id")


class SharedLimiter(CustomLogger):  # type: ignore[misc]
    """Keeps LiteLLM's limits over all workers of the host, or of many hosts. One of it,
    ``limiter``, is enough."""

    # requests -------------------------------------------------------------------------------------

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        chosen = settings.current()
        tokens.tenant_of_context.set(_tenant(user_api_key_dict))
        if chosen.router_state:
            router = router_of_proxy()
            if router is not None:
                routers.attach(router)
        if replacement.native_serves() or call_type in _OURS_NOT or user_api_key_dict is None:
            return
        try:
            denial = await self._admit(user_api_key_dict, data, call_type)
        except Exception as error:
            if chosen.fail_open:
                replacement.judged.set(False)
                failures.failed("judging a request", error, "it passes (fail_open)")
                return
            failures.failed("judging a request", error, "it is refused (fail_open is false)")
            raise responses.not_judged(error) from error
        if denial is not None:
            raise responses.too_many(denial, data.get("model"))

    async def _admit(self, auth: Any, data: dict[str, Any], call_type: str) -> calls.Denial | None:
        within = _call.get() or None
        if within is not None and within.finished:
            within = None
        if within is not None:
            if call_type == _TOOL_CALL:
                return None  # it is part of a request that is admitted
            again = auth is within.by and call_type == within.guess.call_type
            if again and not within.attempts and not within.held.settled:
                # another callback has denied it: LiteLLM asks again, for a fallback of its model
                within.cancel()
                within = None
        _call.set(False)
        replacement.judged.set(True)
        made = usage.made(data, call_type)
        found = subjects_of(auth, data, made.models)
        id = _id_of(data)
        if id is None:
            id = data["litellm_call_id"] = str(uuid.uuid4())
        guess = usage.Guess(data, call_type, usage.kind(), made, _who(auth, found))
        least = _least_tokens(found)
        wanted = guess.within(least) if least else 0
        admitted = calls.admit_here(found, wanted)
        if admitted is None:
            admitted = await calls.admit_async(found, wanted)
        if found:
            failures.judged()
        if isinstance(admitted, calls.Denial):
            return admitted
        call = Call(str(id), Held(found, admitted), guess, auth, within)
        _call.set(call)
        _count_tries(call, data)
        task = asyncio.current_task()
        if task is not None:  # for whatever ends without any of the hooks below
            task.add_done_callback(lambda _: self._abandoned(call))
        return None

    def _abandoned(self, call: Call) -> None:
        call.left = True
        self._end_if_left(call)

    def _end_if_left(self, call: Call) -> None:
        """End it where no hook of the request will: its task has gone, and so have its attempts.
        An attempt's success alone ends nothing: the request may be making others."""
        if call.left and not call.finished and all(attempt.ended for attempt in call.attempts):
            self._guarded("ending a request", call.finish)

    def _guarded(self, doing: str, do: Any, *args: Any) -> Any:
        """What gives back must not fail the request that it is for."""
        try:
            return do(*args)
        except Exception as error:
            failures.failed(doing, error, "what it held may count until this worker ends")
            return None

    def _find(self, of: Mapping[str, Any]) -> Call | None:
        """The call of a hook's data: its context's, and never any other that has the same id, which
        the client may have chosen. A guardrail's own call has another id."""
        id, found = _id_of(of), _call.get() or None
        while found is not None and id is not None and found.id != str(id):
            found = found.outer
        return found

    def _settle(self, call: Call, found: usage.Used | None) -> None:
        if found is not None:
            call.settle(found.of_kind(call.guess.kind))

    def _answered(self, call: Call, response: Any) -> None:
        found = usage.used(response)
        self._settle(call, found)
        call.told = found is not None

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any
    ) -> Any:
        call = self._find(data)
        if call is not None:
            self._guarded("booking tokens", self._answered, call, response)
            self._guarded("ending a request", call.finish)
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for chunk in response:
                yield chunk
        finally:
            call = self._find(request_data)
            if call is not None:
                self._guarded("ending a stream", call.finish)

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        call = self._find(request_data)
        if call is not None:
            self._guarded("ending a request", call.fail)

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        call = self._find(data)
        if call is None or not call.held.subjects:
            return None
        found = self._guarded("telling what is left", call.held.remaining)
        return responses.headers_of(found) if found else None

    # attempts at deployments ----------------------------------------------------------------------

    async def async_pre_call_check(
        self, deployment: dict[str, Any], parent_otel_span: Any = None
    ) -> dict[str, Any] | None:
        begun: list[Attempt] = []
        _attempt.set(begun)
        call = _call.get() or None
        found: Attempt | calls.Denial | None = None
        try:
            if call is not None and not call.finished:
                if attempts.counts_alone(deployment, call):
                    call.tries += 1
                else:
                    found = await attempts.also_counts(deployment, call, _group)
            if found is None:  # attempts.begin(), which never makes an event loop wait
                subject = attempts.subject_of(deployment, self._per_minute())
                if subject is not None:
                    estimate = attempts.tokens_of(subject, call)
                    admitted = calls.admit_here([subject], estimate)
                    if admitted is None:
                        admitted = await calls.admit_async([subject], estimate)
                    found = attempts.begun(subject, admitted, call)
        except Exception as error:
            self._not_judged(deployment, error)
            return deployment
        return self._begun(deployment, found, begun)

    def pre_call_check(self, deployment: dict[str, Any]) -> dict[str, Any] | None:
        begun: list[Attempt] = []
        _attempt.set(begun)
        try:
            found = attempts.begin(deployment, self._per_minute(), _call.get() or None)
        except Exception as error:
            self._not_judged(deployment, error)
            return deployment
        return self._begun(deployment, found, begun)

    @staticmethod
    def _per_minute() -> bool:
        return attempts.keeps_per_minute(settings.current().deployment_limits)

    @staticmethod
    def _begun(
        deployment: dict[str, Any], found: Attempt | calls.Denial | None, begun: list[Attempt]
    ) -> dict[str, Any]:
        attempts.judged(deployment, True)
        if found is not None:
            failures.judged()
        if isinstance(found, calls.Denial):
            model = str((deployment.get("litellm_params") or {}).get("model"))
            raise responses.too_many_for(model, found)
        if found is not None:
            begun.append(found)
        return deployment

    def _not_judged(self, deployment: Mapping[str, Any], error: Exception) -> None:
        if settings.current().fail_open:
            attempts.judged(deployment, False)
            failures.failed("judging an attempt", error, "it is made (fail_open)")
            return
        failures.failed("judging an attempt", error, "it is refused (fail_open is false)")
        model = str((deployment.get("litellm_params") or {}).get("model"))
        raise responses.refused(error, model) from error

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: dict[str, Any]) -> None:
        begun = _attempt.get(None)
        if begun:
            kwargs[_ATTEMPT] = begun.pop()

    # what became of them --------------------------------------------------------------------------

    def _logged(self, kwargs: Mapping[str, Any], response: Any, success: bool) -> None:
        call, attempt = self._find(kwargs), kwargs.get(_ATTEMPT)
        if attempt is None:
            deployment, begun = _deployment_of(kwargs), _attempt.get(None)
            if begun and begun[0].deployment == deployment:
                attempt = begun[0]
            elif call is not None:
                attempt = call.attempt_at(deployment)
        if call is None and attempt is None:
            return
        found = None
        if (call is not None and not call.told) or (
            attempt is not None and attempt.held.counts_tokens
        ):
            # the answer itself says what of it was cached, LiteLLM's payload does not
            found = usage.used(response) or usage.used(kwargs.get("standard_logging_object"))
        # a picture has used none, say: LiteLLM counts none either
        unknown = None if success and not _has_ended(response) else 0
        if attempt is not None:
            kind = usage.kind() if call is None else call.guess.kind
            attempt.end(unknown if found is None else found.of_kind(kind))
        if call is None:
            return
        if not call.told:  # else this may be one of several answers
            self._settle(call, found)
            if success and not call.held.settled and unknown is not None:
                call.held.settle(unknown)
        self._end_if_left(call)

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._guarded("ending an attempt", self._logged, kwargs, response_obj, True)

    async def async_log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._guarded("ending an attempt", self._logged, kwargs, response_obj, False)

    def log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._guarded("ending an attempt", self._logged, kwargs, response_obj, True)

    def log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._guarded("ending an attempt", self._logged, kwargs, response_obj, False)


# LiteLLM tells a class with this in its name of each answer. Of a request that has "no-log" in its
# body it tells no other: streams would count as their estimates.
SharedLimiter.__name__ = "_PROXY_SharedLimiter"
limiter = SharedLimiter()
