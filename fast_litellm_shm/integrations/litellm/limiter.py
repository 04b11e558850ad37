"""The callback that LiteLLM calls, and what each of its hooks does.

===========================================  =====================================================
``async_pre_call_hook``                      admits the request for all its subjects, or raises 429
``async_post_call_success_hook``             the answer is there: gives slots back, settles tokens
``async_post_call_streaming_iterator_hook``  the stream ended or its client left: gives slots back
``async_log_success_event``                  an attempt was answered: settles tokens, what it cost
``async_log_failure_event``                  an attempt failed, and may be tried again
``async_post_call_failure_hook``             the request failed: gives slots, unused tokens back
``async_post_call_response_headers_hook``    returns ``x-ratelimit-*``
``async_pre_call_check``                     admits one attempt at one deployment, or raises 429
===========================================  =====================================================

LiteLLM calls ``async_pre_call_hook`` only where the class itself defines it. Where a hook fails,
:mod:`.failures` reports it; ``fail_open`` decides whether the request passes.
"""

from __future__ import annotations

import asyncio
import math
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import litellm
from litellm.integrations.custom_logger import CustomLogger

from fast_litellm_shm.integrations.litellm import (
    admission,
    attempts,
    failures,
    queue,
    responses,
    settings,
    usage,
)
from fast_litellm_shm.integrations.litellm.admission import Denial
from fast_litellm_shm.integrations.litellm.budgets import replacement as budgets
from fast_litellm_shm.integrations.litellm.budgets import sessions
from fast_litellm_shm.integrations.litellm.budgets.spending import Spending
from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
from fast_litellm_shm.integrations.litellm.calls import Attempt, Call
from fast_litellm_shm.integrations.litellm.router.sharing import routers
from fast_litellm_shm.integrations.litellm.subjects import Subjects, of_calls
from fast_litellm_shm.integrations.litellm.subjects import subjects as of_request
from fast_litellm_shm.tokens import counter as tokens

P = ParamSpec("P")
T = TypeVar("T")

_TOOL_CALL = "call_mcp_tool"
# With these in its body, or as headers, a client asks for more tries than the router makes.
_TRIES = (
    *("num_retries", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks"),
    "model_group_retry_policy",
)
# The body may have them in here too. LiteLLM puts the router settings of a key or team here.
_OVERRIDE = "router_settings_override"
_ABOUT_TRIES = frozenset((*_TRIES, _OVERRIDE))
_COST_KNOWN_AFTER = 60.0  # seconds; LiteLLM says in the background what a request cost
_NONE = Subjects()
_NOT_OURS = frozenset({"acreate_batch", "create_batch"})  # LiteLLM counts the requests of its file

# The call of a request. False: it was denied, so that its hooks find no other call of its id.
_call: ContextVar[Call | Literal[False] | None] = ContextVar("fast_litellm_shm_call", default=None)
# The attempt of a context, until log_pre_api_call() moves it into the kwargs of its log events. A
# context lives as long as any task or stream that began in it. If it kept the attempt, one that is
# cancelled without an event, or a stream that is not read to its end, would keep its slot.
_attempt: ContextVar[list[Attempt]] = ContextVar("fast_litellm_shm_attempt")
_ATTEMPT = "fast_litellm_shm_attempt"  # in the kwargs of log events: streams end in another context


def router_of_proxy() -> Any:
    """The proxy's router; None where there is none."""
    return getattr(sys.modules.get("litellm.proxy.proxy_server"), "llm_router", None)


def _group_of(model: str) -> str | None:
    """The model that a name is an alias of, in the proxy's router."""
    router = router_of_proxy()
    if router is None:
        return None
    found = router.registry().aliases().get(model)
    if isinstance(found, Mapping):
        found = found.get("model")
    return found if isinstance(found, str) else None


def subjects_of(
    auth: Any, data: Mapping[str, Any], models: Mapping[str, int] | None = None
) -> Subjects:
    """The subjects of a request to the proxy. models: those of its calls; None: as it names."""
    found = data.get("model")
    model = found if isinstance(found, str) else None
    if models and models.get(model or "") != 1:
        return of_calls(auth, models, _group_of)
    return of_request(auth, model, _group_of)


def _limit_tries(call: Call, data: dict[str, Any]) -> None:
    """Where the client asks for retries or fallbacks: each try that the router would not make by
    itself counts as a request, and the client gets at most as many as it has requests left. (They
    are limited before the call, since LiteLLM waits between tries: a denial would not end it.)"""
    if _ABOUT_TRIES.isdisjoint(data):
        return
    override = data.get(_OVERRIDE)
    asked = [data, dict(override)] if isinstance(override, Mapping) else [data]
    if not any(name in each for each in asked for name in _TRIES):
        return
    retries = getattr(router_of_proxy(), "num_retries", None)
    free = retries if isinstance(retries, int) else 0
    call.free_tries = call.estimate.calls.total * (1 + free)
    left = call.admissions.requests_left()
    if left is None:
        return
    for each in asked:
        for name in ("num_retries", "model_group_retry_policy"):
            if name in each:
                each[name] = _at_most(each[name], max(free, left))
    if len(asked) > 1:
        data[_OVERRIDE] = asked[1]


def _at_most(tries: Any, most: int, depth: int = 2) -> Any:
    """tries: a number, or a retry policy, with a number for each group and error."""
    if isinstance(tries, Mapping) and depth:
        return {name: _at_most(n, most, depth - 1) for name, n in tries.items()}
    return min(tries, most) if isinstance(tries, int) else tries


def _tenant(auth: Any) -> str | None:
    """The tenant of the token memo: a key, with its end user."""
    key, end_user = getattr(auth, "api_key", None), getattr(auth, "end_user_id", None)
    return None if key is None else f"{key}\0{end_user}"


def _learner(auth: Any, found: Subjects) -> Hashable:
    """From whose answers an estimate learns: the key's; without one, those of the same subjects."""
    return auth.api_key or tuple(subject[:2] for subject in found)


def found_for(auth: Any, data: Mapping[str, Any]) -> Subjects:
    """:func:`subjects_of` a request that is being made. Where the hook has found them in this
    context, for the same request, it returns those."""
    call = _call.get()
    if call and call.auth is auth and call.estimate.model == data.get("model"):
        return call.admissions.subjects
    return subjects_of(auth, data)


def _deployment_of(kwargs: Mapping[str, Any]) -> str:
    """The id of the deployment that a log event is about."""
    params = kwargs.get("litellm_params") or {}
    info = params.get("model_info") or (params.get("metadata") or {}).get("model_info") or {}
    return str(info.get("id"))


def _has_ended(response: Any) -> bool:
    """False for an answer that is still made in the background: its usage comes later."""
    return getattr(response, "status", None) not in ("queued", "in_progress")


def _id_of(of: Mapping[str, Any]) -> Any:
    """The call id that log events will have. The data of a pass-through is the client's body, so an
    id in it is the client's choice."""
    logging = of.get("litellm_logging_obj")
    return getattr(logging, "litellm_call_id", None) or of.get("litellm_call_id")


def _guarded(doing: str, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call do(). Giving back must not fail the request that it is for: an error is reported."""
    try:
        return do(*args, **kwargs)
    except Exception as error:
        _not_given_back(doing, error)
        return None


def _not_given_back(doing: str, error: Exception) -> None:
    failures.report(doing, error, "what it held may count until this worker ends")


def _pass_or_refuse(
    doing: str, error: Exception, refusal: Callable[[Exception], Exception]
) -> None:
    """What could not be checked passes where fail_open is set; else the refusal is raised."""
    if settings.current().fail_open:
        failures.report(doing, error, "it passes (fail_open)")
        return
    failures.report(doing, error, "it is refused (fail_open is false)")
    raise refusal(error) from error


class SharedLimiter(CustomLogger):  # type: ignore[misc]
    """Keeps LiteLLM's limits over all workers of the host, or of many hosts. One object,
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
        if call_type in _NOT_OURS or user_api_key_dict is None:
            return
        try:
            denial, waited = await self._admit(user_api_key_dict, data, call_type)
        except litellm.BudgetExceededError as error:
            error.type = "budget_exceeded"  # as where LiteLLM's authentication raises it
            raise
        except sessions.Refused as refused:
            raise refused.error from None
        except Exception as error:
            _pass_or_refuse("checking a request", error, responses.unchecked)
            replacement.checked.set(False)
            return
        if denial is not None:
            raise responses.too_many(denial, data.get("model"), waited)

    async def _admit(
        self, auth: Any, data: dict[str, Any], call_type: str
    ) -> tuple[Denial | None, queue.Waited | None]:
        outer, spending = _call.get() or None, None
        if outer is not None and outer.finished:
            outer = None
        if outer is not None:
            if call_type == _TOOL_CALL:
                return None, None  # part of a request that is admitted
            again = auth is outer.auth and call_type == outer.estimate.call_type
            if again and not outer.attempts and not outer.admissions.settled:
                # another callback has denied it: LiteLLM asks again, for a fallback of its model
                spending, outer.spending = outer.spending, None
                outer.cancel()
                outer = None
        _call.set(False)
        replacement.checked.set(True)
        if outer is None and spending is None and not budgets.has_none(auth):
            spending = await budgets.reserved_for(auth, data)
        if replacement.builtin_serves and spending is None:
            return None, None
        try:
            return await self._admit_all(auth, data, call_type, outer, spending)
        except BaseException:
            if spending is not None:
                spending.release()
            raise

    async def _admit_all(
        self,
        auth: Any,
        data: dict[str, Any],
        call_type: str,
        outer: Call | None,
        spending: Spending | None,
    ) -> tuple[Denial | None, queue.Waited | None]:
        calls = usage.calls_of(data, call_type)
        found = _NONE if replacement.builtin_serves else subjects_of(auth, data, calls.models)
        id = _id_of(data)
        if id is None:
            id = data["litellm_call_id"] = str(uuid.uuid4())
        estimate = usage.Estimate(data, call_type, usage.kind(), calls, _learner(auth, found))
        charge = estimate.for_subjects(found)
        waits, waited = settings.current().queue, None
        if waits is not None:
            admitted, waited = await queue.admit(found, charge, waits, auth)
        else:
            here = admission.admit_here(found, charge)
            admitted = await admission.admit_async(found, charge) if here is None else here
        if found:
            failures.flush()
        if isinstance(admitted, Denial):
            if spending is not None:
                spending.release()
            return admitted, waited
        call = Call(str(id), admitted, estimate, auth, outer)
        call.waited, call.spending = waited, spending
        _call.set(call)
        _limit_tries(call, data)
        task = asyncio.current_task()
        if task is not None:  # for a request that ends without any of the hooks below
            task.add_done_callback(partial(self._task_ended, call))
        return None, None

    def _task_ended(self, call: Call, _: object) -> None:
        call.task_ended = True
        if call.spending is not None:  # should LiteLLM never say what it cost
            asyncio.get_running_loop().call_later(_COST_KNOWN_AFTER, call.spending.release)
        self._finish_if_abandoned(call)

    def _finish_if_abandoned(self, call: Call) -> None:
        """Finish a request that no hook will finish: its task and all its attempts have ended. The
        success of an attempt alone ends nothing: the request may be making others."""
        if call.task_ended and not call.finished and all(a.ended for a in call.attempts):
            _guarded("ending a request", call.finish)

    def _find(self, of: Mapping[str, Any]) -> Call | None:
        """The call of a hook's data: the one of its context, never another with the same id, which
        a client may have chosen. A guardrail's own call has another id."""
        found = _call.get()
        if not found:
            return None
        id = _id_of(of)
        if id is None or found.id == id:
            return found
        while found is not None and id is not None and found.id != str(id):
            found = found.outer
        return found

    def _end(self, of: Mapping[str, Any], doing: str, end: Callable[[Call], None]) -> None:
        call = self._find(of)
        if call is not None:
            _guarded(doing, end, call)

    @staticmethod
    def _settle(call: Call, found: usage.Usage | None) -> None:
        if found is not None:
            call.settle(found.of_kind(call.estimate.kind))

    def _answered(self, call: Call, response: Any) -> None:
        found = usage.usage_of(response)
        self._settle(call, found)
        call.usage_known = found is not None

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any
    ) -> Any:
        call = self._find(data)
        if call is not None:
            try:
                self._answered(call, response)
            except Exception as error:
                _not_given_back("settling tokens", error)
            try:
                call.finish()
            except Exception as error:
                _not_given_back("ending a request", error)
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for chunk in response:
                yield chunk
        finally:
            self._end(request_data, "ending a stream", Call.finish)

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        self._end(request_data, "ending a request", Call.fail)

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        call = self._find(data)
        if call is None or not call.admissions.subjects:
            return None
        try:
            found = call.admissions.remaining()
        except Exception as error:
            _not_given_back("reading what is left", error)
            return None
        if not found:
            return None
        headers = responses.headers_of(found)
        if call.waited is not None:
            headers.update(queue.headers_of(call.waited))
        return headers

    # attempts at deployments ----------------------------------------------------------------------

    async def async_pre_call_check(
        self, deployment: dict[str, Any], parent_otel_span: Any = None
    ) -> dict[str, Any] | None:
        _attempt.set([])
        call = _call.get() or None
        found: Attempt | Denial | None = None
        try:
            if call is not None and not call.finished:
                call.tries += 1
                if call.free_tries is not None or not attempts.is_named(deployment, call):
                    found = await attempts.charge_request(deployment, call, _group_of)
            if found is None and (subjects := attempts.subjects_of(deployment)):
                charge = attempts.tokens_of(subjects, call)
                admitted = admission.admit_here(subjects, charge)
                if admitted is None:
                    admitted = await admission.admit_async(subjects, charge)
                found = attempts.begun(admitted, call)
        except Exception as error:
            self._not_checked(deployment, error)
            return deployment
        return self._begun(deployment, found)

    def pre_call_check(self, deployment: dict[str, Any]) -> dict[str, Any] | None:
        _attempt.set([])
        call = _call.get() or None
        found: Attempt | Denial | None = None
        try:
            if subjects := attempts.subjects_of(deployment):
                charge = attempts.tokens_of(subjects, call)
                found = attempts.begun(admission.admit(subjects, charge), call)
        except Exception as error:
            self._not_checked(deployment, error)
            return deployment
        return self._begun(deployment, found)

    @staticmethod
    def _begun(deployment: dict[str, Any], found: Attempt | Denial | None) -> dict[str, Any]:
        attempts.note(deployment, checked=True)
        if found is not None:
            failures.flush()
        if isinstance(found, Denial):
            model = str((deployment.get("litellm_params") or {}).get("model"))
            raise responses.too_many_for(model, found)
        if found is not None:
            _attempt.get().append(found)
        return deployment

    @staticmethod
    def _not_checked(deployment: Mapping[str, Any], error: Exception) -> None:
        model = str((deployment.get("litellm_params") or {}).get("model"))
        _pass_or_refuse("checking an attempt", error, partial(responses.unchecked_for, model))
        attempts.note(deployment, checked=False)

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: dict[str, Any]) -> None:
        begun = _attempt.get(None)
        if begun:
            kwargs[_ATTEMPT] = begun.pop()

    # the end of an attempt ------------------------------------------------------------------------

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
        if (call is not None and not call.usage_known) or (
            attempt is not None and attempt.admissions.subjects.least_tokens
        ):
            # the answer itself says which tokens were cached, LiteLLM's payload does not
            found = usage.usage_of(response) or usage.usage_of(
                kwargs.get("standard_logging_object")
            )
        # an answer without usage, such as a picture, has used 0 tokens; LiteLLM counts none either
        otherwise = None if success and not _has_ended(response) else 0
        if attempt is not None:
            kind = usage.kind() if call is None else call.estimate.kind
            attempt.end(otherwise if found is None else found.of_kind(kind))
        if call is None:
            return
        self._spend(call, kwargs, success)
        if not call.usage_known:  # else this may be one of several answers
            self._settle(call, found)
            if success and not call.admissions.settled and otherwise is not None:
                call.admissions.settle(otherwise)
        self._finish_if_abandoned(call)

    @staticmethod
    def _spend(call: Call, kwargs: Mapping[str, Any], success: bool) -> None:
        """One attempt is over. What it cost, LiteLLM says in this event alone. One that failed may
        have cost something (a stream that was cut); else another attempt may follow."""
        payer: Call | None = call
        while payer is not None and payer.spending is None:
            payer = payer.outer  # of a call that a guardrail makes
        if payer is None or payer.spending is None:
            return
        logged = kwargs.get("standard_logging_object")
        cost = (kwargs if logged is None else logged).get("response_cost")
        if isinstance(cost, (int, float)) and math.isfinite(cost) and (success or cost > 0):
            payer.spending.spent(cost)  # after a release too

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        try:
            self._logged(kwargs, response_obj, True)
        except Exception as error:
            _not_given_back("ending an attempt", error)

    async def async_log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        _guarded("ending an attempt", self._logged, kwargs, response_obj, False)

    def log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        _guarded("ending an attempt", self._logged, kwargs, response_obj, True)

    def log_failure_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        _guarded("ending an attempt", self._logged, kwargs, response_obj, False)


# LiteLLM calls a class with "_PROXY_" in its name for each answer. For a request with "no-log" in
# its body it calls no other, and streams would stay charged with their estimates.
SharedLimiter.__name__ = "_PROXY_SharedLimiter"
limiter = SharedLimiter()
