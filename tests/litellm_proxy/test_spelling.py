"""LiteLLM's real proxy: no client gets around a limit by how it spells its request, and none takes
what others need."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.names import left_over, remove, unique_name
from support.proxy import Proxy, proxy
from support.upstream import Upstream, serving
from support.waiting import PATIENCE, wait_until

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")

RETRIES = 1  # as the operator has it
MODELS = """\
  - model_name: other
    litellm_params: {{model: openai/other, api_key: sk-none, api_base: "{0}"}}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    name = unique_name("proxy-spelling")
    directory = tmp_path_factory.mktemp("spelling")
    try:
        with (
            serving() as upstream,
            proxy(
                directory,
                name,
                workers=2,
                gunicorn=True,
                retries=RETRIES,
                upstream=upstream,
                models=MODELS.format(upstream),
            ) as started,
        ):
            yield started
    finally:
        remove(name)
        assert not left_over(name)


_keys = iter(range(10**6))


def key_of(limits: str) -> str:
    return f"sk-s{next(_keys)}-{limits}"


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def left(served: Proxy, key: str, what: str) -> int:
    """Of the key, before the request that asks."""
    answer = served.ask(key)
    assert answer.status_code == 200, answer.text
    return int(answer.headers[f"x-ratelimit-api_key-remaining-{what}"])


# neighbours ----------------------------------------------------------------------------------


def test_long_answers_of_one_key_are_not_expected_of_another(served: Proxy) -> None:
    """Its answers may be of any length: the other key has all its tokens."""
    long = key_of("tpm=2000000000")
    answers = served.ask_many(12, long, model="upstream", messages=says(f"long: {long}"))
    assert statuses(answers) == {200: 12}
    victim = key_of("tpm=20000")
    answers = served.ask_many(60, victim, at_once=4, model="upstream")
    assert statuses(answers) == {200: 60}
    assert left(served, victim, "tokens") == 20_000 - 61 * 30


def test_a_key_that_has_long_answers_still_begins_several(served: Proxy) -> None:
    """An estimated output is at most a quarter of the limit."""
    key = key_of("tpm=300000")
    answer = served.ask(key, model="upstream", messages=says(f"long: {key}"))
    assert answer.status_code == 200
    slow = says(f"slow: {key}")  # less than 200,000 are left for two
    assert statuses(served.ask_many(2, key, at_once=2, model="upstream", messages=slow)) == {200: 2}


# usage of a request ------------------------------------------------------------------------------


def test_a_stream_that_asks_not_to_be_logged(served: Proxy) -> None:
    """Its tokens count all the same."""
    key = key_of("tpm=100000")
    options: dict[str, Any] = {"stream": True, "max_tokens": 1, "no-log": True}
    assert served.ask(key, model="upstream", messages=says("hi"), **options).status_code == 200
    asked = itertools.count(1)
    wait_until(
        "its 30 tokens are booked",
        lambda: left(served, key, "tokens") == 100_000 - 30 * (1 + next(asked)),
        every=0.5,
    )


def test_a_number_of_choices_beyond_any(served: Proxy) -> None:
    """The estimate multiplies it by a float. Beyond any float that failed, and a request that could
    not be checked passed."""
    key = key_of("rpm=2-tpm=100000")
    text = f"hello: {key}"
    for _ in range(8):  # either worker learns
        served.ask(key, model="upstream", messages=says(text), n=1)
    for _ in range(8):
        served.ask(key, model="upstream", messages=says(text), n=10**400)
    assert Upstream.seen[text] == 2
    assert "OverflowError" not in served.log()


# lists of models ---------------------------------------------------------------------------------


def test_each_model_of_a_list_is_a_request(served: Proxy) -> None:
    key = key_of("rpm=4")
    text = f"hello: {key}"
    for _ in range(20):
        served.ask(key, model=",".join(["upstream"] * 20), messages=says(text))
    assert Upstream.seen[text] == 0
    answers = [served.ask(key, model="upstream, upstream", messages=says(text)) for _ in range(6)]
    assert statuses(answers) == {200: 2, 429: 4}
    assert Upstream.seen[text] == 4


def test_each_conversation_of_a_list_is_a_request(served: Proxy) -> None:
    key = key_of("rpm=8")
    text = f"hello: {key}"
    for _ in range(4):
        served.ask(key, model="upstream,upstream", messages=[says(text)] * 2)
    assert Upstream.seen[text] == 8


def test_the_fastest_of_a_list_counts_as_all_of_it(served: Proxy) -> None:
    key = key_of("rpm=4-tpm=100000")
    text = f"hello: {key}"
    options: dict[str, Any] = {"model": "upstream,upstream", "fastest_response": True}
    answers = [served.ask(key, messages=says(text), **options) for _ in range(4)]
    assert statuses(answers) == {200: 2, 429: 2}
    assert Upstream.seen[text] <= 4


@pytest.mark.parametrize("models", ["other,upstream", "upstream,other,"])
def test_each_model_of_a_list_has_its_limit(served: Proxy, models: str) -> None:
    key = key_of("other.rpm=2")
    text = f"hello: {key}"
    answers = [served.ask(key, model=models, messages=says(text)) for _ in range(5)]
    assert statuses(answers)[429] == 3
    assert Upstream.seen[text] == 4
    assert served.ask(key, model="upstream").status_code == 200


def test_a_list_has_as_many_parallel_slots_as_models(served: Proxy) -> None:
    key = key_of("parallel=3-tpm=100000")
    text = f"slow: {key}"
    assert served.ask(key, model="upstream,other", messages=says(text)).status_code == 200
    assert served.ask(key, model=",".join(["other"] * 4), messages=says(text)).status_code == 429
    options: dict[str, Any] = {"model": "upstream,other", "messages": says(text)}
    assert 429 in statuses(served.ask_many(4, key, at_once=4, **options))
    assert Upstream.most[text] <= 3


def test_tokens_of_a_list(served: Proxy) -> None:
    key = key_of("tpm=100000")
    answer = served.ask(key, model="upstream,other", messages=says(f"hello: {key}"))
    assert answer.status_code == 200
    assert left(served, key, "tokens") == 100_000 - 2 * 30 - 30


@pytest.mark.parametrize("path", ["/engines/{}/chat/completions", "/v1/chat/completions?model={}"])
def test_models_in_a_path(served: Proxy, path: str) -> None:
    key = key_of("rpm=4")
    text = f"hello: {key}"
    for _ in range(20):
        httpx.post(
            served.url + path.format("upstream,upstream"),
            headers={"Authorization": f"Bearer {key}", "Connection": "close"},
            json={"messages": says(text)},
            timeout=PATIENCE,
            trust_env=False,
            verify=False,
        )
    assert Upstream.seen[text] <= 4


# retries and fallbacks ---------------------------------------------------------------------------


POLICY = {"model_group_retry_policy": {"upstream": {"InternalServerErrorRetries": 6}}}
RETRIED: dict[str, dict[str, Any]] = {
    "num_retries": {"num_retries": 6},
    "max_retries": {"max_retries": 6},
    "policy": POLICY,
    "override": {"router_settings_override": {"num_retries": 6}},
    "policy in override": {"router_settings_override": POLICY},
    "header": {},
}


@pytest.mark.parametrize("asked", RETRIED)
def test_retries_that_a_client_asks_for(served: Proxy, asked: str) -> None:
    """They are requests, but for those that the operator's router would make by itself."""
    key = key_of("rpm=3")
    text = f"fail always: {key}"
    headers = {"x-litellm-num-retries": "6"} if asked == "header" else {}
    for _ in range(4):
        served.ask(key, model="upstream", messages=says(text), headers=headers, **RETRIED[asked])
    assert 2 <= Upstream.seen[text] <= 3 * (1 + RETRIES)


def test_the_operators_retries_are_no_requests(served: Proxy) -> None:
    key = key_of("rpm=100")
    answer = served.ask(key, model="upstream", messages=says(f"fail once: {key}"))
    assert answer.status_code == 200
    assert left(served, key, "requests") == 98


def test_a_model_that_a_request_falls_back_to_has_its_limit(served: Proxy) -> None:
    key = key_of("other.rpm=2")
    text = f"fail some: {key}"
    Upstream.failing.add("up")
    try:
        answers = [
            served.ask(key, model="upstream", messages=says(text), fallbacks=["other"])
            for _ in range(5)
        ]
    finally:
        Upstream.failing.clear()
    assert statuses(answers)[200] == 2
    assert served.ask(key, model="other").status_code == 429


# several answers ---------------------------------------------------------------------------------


def test_choices_are_tokens(served: Proxy) -> None:
    """``n`` is one request. Its estimate is for each choice; then the reported usage counts."""
    key = key_of("tpm=1000-rpm=10")
    assert served.ask(key, model="upstream", n=4, max_tokens=400).status_code == 200
    assert left(served, key, "tokens") == 1000 - 30 - 30
    assert served.ask(key, model="upstream", n=4, max_tokens=400).status_code == 429


# sets of limits ----------------------------------------------------------------------------------


def test_sets_of_limits_do_not_run_out(served: Proxy) -> None:
    """A tenant that makes keys can have any number of different limits."""
    for n in range(10, 310):
        assert served.ask(key_of(f"rpm={n}-tpm={10**6 + n}")).status_code == 200
    key = key_of("rpm=7")
    assert statuses(served.ask_many(20, key)) == {200: 7, 429: 13}
    assert "checking a request failed" not in served.log()
