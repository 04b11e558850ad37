"""Budgets, in LiteLLM's real proxy with four workers: a key of one dollar stops at one dollar."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from support.names import left_over, remove, unique_name
from support.permits import wait_until_dead
from support.proxy import Proxy, proxy
from support.upstream import serving
from support.waiting import comes_true

from fast_litellm_shm import Budget, Segment
from fast_litellm_shm.limiters.budget import Usage

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")

import litellm

PRICES = "input_cost_per_token: 0.001, output_cost_per_token: 0.001"
DENIED = litellm.budget_exceeded_status_code
ANSWER = Decimal("0.03")  # an answer's cost: 10 tokens in, 20 out
MODELS = """  - model_name: priced
    litellm_params: {{model: openai/fake, api_key: sk-none, mock_response: "hello", {prices}}}
  - model_name: priced-slow
    litellm_params:
      {{model: openai/fake, api_key: sk-none, mock_response: "hello", mock_delay: 30, {prices}}}
  - model_name: priced-up
    litellm_params: {{model: openai/up, api_key: sk-none, api_base: "{upstream}", {prices}}}
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def segment() -> Iterator[str]:
    name = unique_name("proxy-budgets")
    try:
        yield name
    finally:
        remove(name)
        assert not left_over(name)


def started(directory: Path, segment: str, upstream: str) -> Iterator[Proxy]:
    models = MODELS.format(prices=PRICES, upstream=upstream)
    with proxy(directory, segment, gunicorn=True, models=models, upstream=upstream) as found:
        yield found


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, segment: str, upstream: str
) -> Iterator[Proxy]:
    yield from started(tmp_path_factory.mktemp("budgets"), segment, upstream)


_keys = iter(range(10**6))


def key_of(limits: str) -> str:
    return f"sk-{next(_keys)}-{limits}"


def hashed(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def usage(segment: str, name: str, per: str | None = None) -> Usage:
    by = f" by {per}" if per else ""
    budget = Budget("1e-9", per, name=f"litellm budgets{by}", segment=Segment(segment))
    return budget.usage(name)


def of_key(segment: str, key: str) -> Usage:
    return usage(segment, f"key:{hashed(key)}")


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def settled(segment: str, key: str) -> Decimal:
    """What was spent, once LiteLLM has said of all calls what they cost."""
    assert comes_true(lambda: not of_key(segment, key).reserved, 30), of_key(segment, key)
    return of_key(segment, key).spent


def test_a_key_of_a_dollar_stops_at_a_dollar(
    served: Proxy, segment: str, upstream: str, tmp_path: Path
) -> None:
    """Whatever comes at the same time, and over a restart of the proxy."""
    key = key_of("usd=1")
    answers = served.ask_many(120, key, model="priced", max_tokens=25)
    while True:  # what was denied since others were in flight
        settled(segment, key)
        last = served.ask(key, model="priced", max_tokens=25)
        if last.status_code != 200:
            break
        answers.append(last)
    assert statuses(answers).keys() <= {200, DENIED}
    admitted = statuses(answers)[200]
    spent = settled(segment, key)
    assert spent == admitted * ANSWER  # each was counted, once
    assert 1 <= spent < 1 + ANSWER
    error = last.json()["error"]
    assert (last.status_code, error["type"]) == (DENIED, "budget_exceeded")
    assert error["message"].startswith(f"Budget has been exceeded! Key={hashed(key)} Current cost:")
    assert error["message"].endswith("Max budget: 1.0")

    for again in started(tmp_path, segment, upstream):
        assert again.ask(key, model="priced").status_code == DENIED
        assert again.ask(key_of("usd=1"), model="priced").status_code == 200
        # a larger budget holds at once, with what was spent
        (tmp_path / "limits.json").write_text(f'{{"{key}": "sk-x-usd=1.05"}}')
        assert statuses(again.ask_many(10, key, at_once=1, model="priced"))[200] in (1, 2)
    assert settled(segment, key) < Decimal("1.05") + ANSWER


def test_what_litellm_knows_was_spent_counts(served: Proxy, segment: str) -> None:
    key = key_of("usd=1-spent=0.95")
    answers = served.ask_many(20, key, at_once=1, model="priced", max_tokens=25)
    assert statuses(answers)[200] in (1, 2)
    assert Decimal("0.95") < settled(segment, key) < 1 + ANSWER


def test_a_failed_call_costs_nothing(served: Proxy, segment: str) -> None:
    key = key_of("usd=0.1")
    messages = [{"role": "user", "content": f"fail always: {key}"}]
    failed = served.ask_many(20, key, model="priced-up", messages=messages, max_tokens=10)
    assert 500 in statuses(failed)
    assert settled(segment, key) == 0
    assert served.ask(key, model="priced-up").status_code == 200
    assert settled(segment, key) == ANSWER


def test_a_stream_costs_what_it_has_used(served: Proxy, segment: str) -> None:
    key = key_of("usd=1")
    answer = served.ask(key, model="priced-up", stream=True)
    assert answer.status_code == 200
    assert comes_true(lambda: of_key(segment, key).spent == ANSWER, 30), of_key(segment, key)
    assert settled(segment, key) == ANSWER


def test_counters_do_not_drift(served: Proxy, segment: str) -> None:
    """BerriAI/litellm#27639, #28283, #30460: what a key has spent grew beyond what its calls cost.
    Calls that are answered, streamed, that fail and are tried again, and that another limit
    denies: what was answered counts, once, and nothing else."""
    key = key_of("usd=50-rpm=60")
    messages = [{"role": "user", "content": f"fail always: {key}"}]
    answered = 0
    for _ in range(2):
        answered += statuses(served.ask_many(12, key, model="priced", max_tokens=25))[200]
        served.ask_many(4, key, model="priced-up", messages=messages, max_tokens=25)
        streams = served.ask_many(4, key, model="priced-up", stream=True, max_tokens=25)
        answered += statuses(streams)[200]
    assert answered == 32
    denied = statuses(served.ask_many(40, key, model="priced", max_tokens=25))
    assert denied[429] and denied.keys() <= {200, 429}
    assert settled(segment, key) == (answered + denied[200]) * ANSWER


def test_no_call_is_denied_below_the_budget(served: Proxy, segment: str) -> None:
    """BerriAI/litellm#36926: a key that has used half of its budget, under load."""
    key = key_of("usd=20-spent=12")
    answers = served.ask_many(120, key, at_once=16, model="priced", max_tokens=25)
    assert statuses(answers) == {200: 120}
    assert settled(segment, key) == 12 + 120 * ANSWER


def test_a_budget_holds_from_the_first_request_on(served: Proxy, segment: str) -> None:
    """BerriAI/litellm#26672: a new deployment, whose key has spent more than its budget already."""
    key = key_of("usd=1-spent=1.5")
    assert statuses(served.ask_many(8, key, model="priced", max_tokens=25)) == {DENIED: 8}


def test_the_budget_of_a_team(served: Proxy, segment: str) -> None:
    """One for all of its keys."""
    found = Counter[int]()
    for _ in range(3):
        found += statuses(served.ask_many(5, key_of("team_usd=0.2"), at_once=1, model="priced"))
    assert found[200] in (6, 7)
    assert found[DENIED] == 15 - found[200]
    assert usage(segment, "team:t1").spent == found[200] * ANSWER


def test_the_budget_of_a_model(served: Proxy, segment: str) -> None:
    key = key_of("priced.usd=0.1")
    answers = served.ask_many(30, key, at_once=1, model="priced", max_tokens=25)
    assert statuses(answers)[200] == 4
    denied = next(answer for answer in answers if answer.status_code != 200)
    assert denied.status_code == DENIED
    assert "exceeded budget for model=priced" in denied.text
    assert served.ask(key, model="priced-up").status_code == 200
    spent = usage(segment, f"key:{hashed(key)}:model:priced:30d", "month").spent
    assert spent == 4 * ANSWER


def test_a_worker_that_is_killed_leaves_nothing_reserved(served: Proxy, segment: str) -> None:
    key = key_of("usd=0.05")
    before = served.workers()

    def hold() -> None:
        with suppress(httpx.HTTPError):
            served.ask(key, model="priced-slow")

    holder = threading.Thread(target=hold)
    holder.start()
    served.wait(lambda: of_key(segment, key).reserved, "one is in flight")
    assert served.ask(key, model="priced").status_code == DENIED
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    for pid in before:
        wait_until_dead(pid)
    assert comes_true(lambda: not of_key(segment, key).reserved, 1.0), "of a dead worker"
    holder.join()
    assert of_key(segment, key).spent == 0
    served.wait_for_workers()
    assert served.ask(key, model="priced").status_code == 200
