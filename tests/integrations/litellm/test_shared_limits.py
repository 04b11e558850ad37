"""rpm and tpm of deployments under share(), by real routers whose answers are LiteLLM's mocks; and
what becomes of LiteLLM's own check meanwhile, and afterwards."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from litellm.integrations.custom_logger import CustomLogger
from support.children import PATIENCE
from support.litellm_workers import CALLBACKS, GROUP, MESSAGES, router

from fast_litellm_shm import health_check
from fast_litellm_shm.integrations.litellm import (
    admission,
    attempts,
    failures,
    share,
    unshare,
)
from fast_litellm_shm.integrations.litellm.router import sharing

pytestmark = pytest.mark.filterwarnings("ignore")  # LiteLLM's own

# A mock answer has 30 tokens, 10 in and 20 out: of 100 tokens a minute the fourth is the last.
LIMITS: list[dict[str, int]] = [{"rpm": 4}, {"tpm": 100}]
NO_SEGMENT = str(2**31)  # of a capacity: larger than any /dev/shm


class Told(CustomLogger):  # type: ignore[misc]
    """Comes after all other callbacks: what they do of an answer is done."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def async_log_success_event(
        self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self.answers.put_nowait(None)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    def forget() -> None:
        attempts.restore_check()
        attempts._unchecked.clear()
        sharing._limited.clear()
        admission.forget()
        failures.forget()

    before = {name: list(getattr(litellm, name)) for name in CALLBACKS}
    forget()
    for name in CALLBACKS:
        setattr(litellm, name, [])
    yield
    for name, found in before.items():
        setattr(litellm, name, found)
    sharing._added = None
    forget()


def enforcing(deployment_id: str, **limits: int) -> Any:
    """A router that enforces them. Its check's minute does not end during a test."""
    params = {"mock_response": "hello", **limits}
    made = router(
        deployment_id, params=params, optional_pre_call_checks=["enforce_model_rate_limits"]
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    check().clock = lambda: now
    return made


def check() -> Any:
    """LiteLLM's own."""
    return next(cb for cb in litellm.callbacks if type(cb).__name__ == "ModelRateLimitingCheck")


def admitted(made: Any, of: int = 8) -> int:
    """How many of so many calls, one after the other, are admitted."""
    told = Told()

    async def all_of_them() -> int:
        found = 0
        for _ in range(of):
            try:
                await made.acompletion(GROUP, MESSAGES)
            except litellm.RateLimitError:
                continue
            found += 1
            await asyncio.wait_for(told.answers.get(), PATIENCE)
        return found

    litellm.callbacks.append(told)
    try:
        return asyncio.run(all_of_them())
    finally:
        litellm.logging_callback_manager.drop_callbacks([told])


def shared(made: Any) -> Any:
    share(made)
    return made


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_of_a_deployment(limits: dict[str, int]) -> None:
    made = shared(enforcing("d", **limits))
    assert admitted(made) == 4
    assert check()._get_deployment_limits({"model_info": {"id": "d"}, "rpm": 4}) == (None, None)
    assert admitted(shared(enforcing("d", **limits))) == 0  # another router's: it is one limit


def test_calls_that_are_not_async() -> None:
    made = shared(enforcing("d", rpm=3))
    found = 0
    for _ in range(6):
        try:
            made.completion(GROUP, MESSAGES)
            found += 1
        except litellm.RateLimitError:
            pass
    assert found == 3


def test_tokens_of_calls_in_flight() -> None:
    """Nobody knows them before the answer: each counts as one that is still to come."""
    made = shared(enforcing("d", tpm=3, max_parallel_requests=10))

    async def at_once() -> int:
        asked = [made.acompletion(GROUP, MESSAGES, mock_delay=0.2) for _ in range(6)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(each) for each in found if isinstance(each, Exception)} == {
            litellm.RateLimitError
        }
        return sum(not isinstance(each, Exception) for each in found)

    assert asyncio.run(at_once()) == 3


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_litellm_keeps_them_again_after_unshare(limits: dict[str, int]) -> None:
    made = shared(enforcing("d", **limits))
    assert admitted(made, 1) == 1
    unshare(made)
    assert "_get_deployment_limits" not in vars(check())
    assert admitted(made) <= 4
    other = enforcing("other", **limits)  # of the same process, and never shared
    assert admitted(other) == 4


def test_litellm_keeps_them_again_when_the_setting_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = shared(enforcing("d", rpm=4))
    assert admitted(made, 1) == 1
    monkeypatch.setattr(litellm, "fast_litellm_shm", {"deployment_limits": False}, raising=False)
    assert admitted(made) <= 4


def test_a_check_that_takes_the_place_of_another() -> None:
    made = shared(enforcing("d", rpm=4))
    assert admitted(made, 1) == 1
    first = check()
    litellm.callbacks.remove(first)
    again = enforcing("d", rpm=4)
    assert check() is not first
    assert admitted(again) == 3
    assert "_get_deployment_limits" not in vars(first)
    assert "_get_deployment_limits" in vars(check())


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("ours", ["first", "last"])
def test_without_a_segment_litellm_keeps_them(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], ours: str
) -> None:
    """Each worker by itself, whichever of the two is asked first; and with the segment, all
    together again."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", NO_SEGMENT)
    made = shared(enforcing("d", **limits))
    if ours == "first":
        litellm.callbacks.reverse()
    assert admitted(made) == 4
    assert health_check()["litellm"]["could_not_judge"] >= 4
    monkeypatch.delenv("FAST_LITELLM_SHM_CAPACITY")
    failures.forget()
    # the shared count begins, while LiteLLM's own is used up
    assert admitted(made) == (4 if ours == "first" else 0)
    assert attempts._unchecked == (set() if ours == "first" else {"d"})
