"""LiteLLM's real proxy with four workers: what is configured is what is admitted.

``make test-litellm`` runs these, with both kinds of workers: uvicorn spawns them, gunicorn loads
the application and forks.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from support.litellm_auth import FIELDS
from support.names import left_over, remove, unique_name
from support.permits import wait_until_dead
from support.proxy import WORKERS, Proxy, proxy
from support.upstream import Upstream, serving
from support.waiting import PATIENCE, comes_true

from fast_litellm_shm._shared.inspection import Inspection

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")

TOKENS = 30  # LiteLLM's mock answers: 10 in, 20 out


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstream: str
) -> Iterator[Proxy]:
    name = unique_name(f"proxy-{request.param}")
    directory = tmp_path_factory.mktemp(request.param)
    gunicorn = request.param == "gunicorn"
    try:
        with proxy(directory, name, gunicorn=gunicorn, retries=1, upstream=upstream) as started:
            yield started
    finally:
        remove(name)
        assert not left_over(name)


_keys = iter(range(10**6))


def key_of(limits: str) -> str:
    """A key that no other test has, with these limits."""
    return f"sk-{next(_keys)}-{limits}"


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


@contextmanager
def held(text: str) -> Iterator[threading.Event]:
    """The upstream holds what it is asked with this text until the event is set; or the block
    ends."""
    gate = Upstream.gates[text] = threading.Event()
    try:
        yield gate
    finally:
        gate.set()
        del Upstream.gates[text]


def permits(served: Proxy) -> int:
    """Slots that living workers hold."""
    found = Inspection(served.opened()).permits()
    return sum(permit.pid is not None for permit in found)


def no_permits(served: Proxy) -> None:
    served.wait(lambda: permits(served) == 0, "all slots are back")


def test_the_fields_that_are_read_are_litellms() -> None:
    from litellm.proxy._types import UserAPIKeyAuth

    assert set(FIELDS) <= set(UserAPIKeyAuth.model_fields)


def test_requests_of_a_key(served: Proxy) -> None:
    answers = served.ask_many(100, key_of("rpm=10"))
    assert statuses(answers) == {200: 10, 429: 90}
    admitted = [answer for answer in answers if answer.status_code == 200]
    left = sorted(int(answer.headers["x-ratelimit-remaining-requests"]) for answer in admitted)
    assert left[0] == 0
    assert set(left) <= set(range(10))
    denied = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(denied.headers["retry-after"]) <= 60
    assert denied.headers["x-ratelimit-limit-requests"] == "10"
    assert denied.headers["x-ratelimit-api_key-remaining-requests"] == "0"
    assert "Rate limit exceeded for api_key" in denied.text
    # and that was over all of them
    assert len(served.workers()) >= WORKERS


def test_two_keys_do_not_meet(served: Proxy) -> None:
    first, second = key_of("rpm=3"), key_of("rpm=3")
    assert statuses(served.ask_many(8, first))[200] == 3
    assert statuses(served.ask_many(8, second))[200] == 3


def test_requests_of_a_model(served: Proxy) -> None:
    key = key_of("m1.rpm=5")
    assert statuses(served.ask_many(40, key))[200] == 5
    assert served.ask(key, model="slow").status_code == 200  # another model


def test_requests_of_a_model_that_is_asked_for_as_latest(served: Proxy) -> None:
    from litellm.litellm_core_utils.model_latest_aliases import expand_model_latest_alias

    latest, model = expand_model_latest_alias("claude-sonnet-latest")
    key = key_of(f"{model.replace('-', '_')}.rpm=5")
    assert statuses(served.ask_many(40, key, model=latest)) == {200: 5, 429: 35}


def test_tokens_of_a_deployment(served: Proxy) -> None:
    answers = served.ask_many(60, key_of("rpm=1000"), model="tokened")
    tokens = statuses(answers)[200] * TOKENS
    assert 300 - TOKENS <= tokens <= 300 + TOKENS
    assert set(statuses(answers)) == {200, 429}


def test_tokens_of_a_key(served: Proxy) -> None:
    answers = served.ask_many(100, key_of("tpm=1000"))
    tokens = statuses(answers)[200] * TOKENS
    assert 1000 - TOKENS <= tokens <= 1000 + TOKENS
    assert set(statuses(answers)) == {200, 429}


def test_parallel_requests_of_a_key(served: Proxy) -> None:
    key = key_of("parallel=4")
    options: dict[str, Any] = {"model": "upstream", "messages": _slow(key)}
    found = served.ask_many(120, key, at_once=40, apart=0.01, **options)
    assert set(statuses(found)) == {200, 429}
    no_permits(served)
    assert statuses(found)[200] >= 4
    for _ in range(10):  # all four are to be had again
        assert statuses(served.ask_many(4, key, at_once=4, **options)) == {200: 4}
        no_permits(served)
    assert Upstream.most[f"slow: {key}"] == 4


def test_requests_of_a_deployment(served: Proxy) -> None:
    answers = served.ask_many(100, key_of("rpm=1000"), model="deployed")
    assert statuses(answers) == {200: 10, 429: 90}
    denied = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(denied.headers["llm_provider-retry-after"]) <= 60


def test_parallel_requests_of_a_deployment(served: Proxy) -> None:
    key = key_of("rpm=1000")
    for _ in range(3):
        found = served.ask_many(8, key, at_once=8, model="narrow", messages=_slow(key))
        assert set(statuses(found)) <= {200, 429}
        assert statuses(found)[200] >= 2  # more: the router tries again, later
        no_permits(served)
    assert Upstream.most[f"slow: {key}"] == 2


def test_streams(served: Proxy) -> None:
    key = key_of("parallel=2-tpm=100000")
    for _ in range(6):
        answer = served.ask(key, stream=True)
        assert answer.status_code == 200
        assert answer.text.rstrip().endswith("[DONE]")
        assert answer.headers["x-ratelimit-api_key-limit-tokens"] == "100000"
    no_permits(served)
    booked = served.wait(lambda: _tokens_of(served, key, 100000), "tokens of streams are booked")
    assert 0 < booked < 6 * 100


def test_a_stream_holds_its_slot_to_its_end(served: Proxy) -> None:
    key = key_of("parallel=1-tpm=100000")
    text = f"hello: {key}"
    with held(text) as gate, _stream(served, key, "upstream", text) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        assert permits(served) == 1
        assert served.ask(key).status_code == 429
        gate.set()
        rest = b"".join(chunks)
    assert rest.rstrip().endswith(b"[DONE]")
    no_permits(served)
    assert served.ask(key).status_code == 200
    served.wait(lambda: _tokens_of(served, key, 100000) % TOKENS == 0, "its tokens are booked")


def test_a_stream_that_is_cut_upstream(served: Proxy) -> None:
    key = key_of("parallel=1-tpm=100000")
    with _stream(served, key, "upstream", f"cut: {key}") as answer:
        assert answer.status_code == 200
        with suppress(httpx.HTTPError):
            answer.read()
    no_permits(served)
    assert served.ask(key).status_code == 200


def test_clients_that_choose_the_same_call_id(served: Proxy) -> None:
    """x-litellm-call-id comes from the client: it opens no way around the limits."""
    key = key_of("parallel=2-rpm=100")
    options: dict[str, Any] = {"model": "upstream", "messages": _slow(key)}
    headers = {"x-litellm-call-id": "mine"}
    found = served.ask_many(24, key, at_once=24, headers=headers, **options)
    assert set(statuses(found)) == {200, 429}
    assert Upstream.most[f"slow: {key}"] == 2
    no_permits(served)
    assert statuses(served.ask_many(2, key, at_once=2, headers=headers, **options)) == {200: 2}
    no_permits(served)


def test_a_stranger_that_knows_a_call_id(served: Proxy) -> None:
    """A request that is refused before it is checked gives back no other request's slots."""
    key = key_of("parallel=1")
    text, headers = f"hello: {key}", {"x-litellm-call-id": key}
    with held(text) as gate, _stream(served, key, "upstream", text, headers) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        for _ in range(3 * WORKERS):  # one of them comes to its worker
            refused = served.ask("sk-0-unreadable", litellm_call_id=key)
            assert refused.status_code not in (200, 429)
        assert permits(served) == 1
        gate.set()
        assert b"[DONE]" in b"".join(chunks)
    no_permits(served)


def test_a_list_of_models(served: Proxy) -> None:
    """LiteLLM makes a request to each: all their tokens count, and the slowest ends the call."""
    key = key_of("parallel=3-tpm=100000")
    text = f"slow: {key}"
    options: dict[str, Any] = {"model": "m1,m1,upstream", "messages": _slow(key)}
    with held(text) as gate:
        holder = threading.Thread(target=lambda: served.ask(key, **options))
        holder.start()
        served.wait(lambda: Upstream.at_once[text], "the last of them is held")
        for _ in range(25):  # the others end meanwhile
            assert permits(served) == 3
            time.sleep(0.02)
        gate.set()
        holder.join()
    no_permits(served)
    assert _tokens_of(served, key, 100000) == 4 * TOKENS  # with this one


@pytest.mark.parametrize("model", ["any", ["any"], {"any": 1}])
def test_a_pass_through(served: Proxy, model: Any) -> None:
    """Whatever its body says, the key's limits hold."""
    key = key_of("rpm=3-tpm=100000")

    def ask() -> int:
        return httpx.post(
            f"{served.url}/through",
            headers={"Authorization": f"Bearer {key}", "Connection": "close"},
            json={"model": model, "messages": [{"role": "user", "content": "hello"}]},
            timeout=60,
            trust_env=False,
            verify=False,
        ).status_code

    assert Counter(ask() for _ in range(8)) == {200: 3, 429: 5}


def _stream(
    served: Proxy, key: str, model: str, text: str, headers: dict[str, str] | None = None
) -> Any:
    return httpx.stream(
        "POST",
        f"{served.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", **(headers or {})},
        json={"model": model, "stream": True, "messages": [{"role": "user", "content": text}]},
        timeout=60,
        trust_env=False,
        verify=False,
    )


def _tokens_of(served: Proxy, key: str, limit: int) -> int:
    """What the key has used, as the next answer tells."""
    left = int(served.ask(key).headers["x-ratelimit-api_key-remaining-tokens"])
    return limit - left


def test_a_client_that_leaves_a_stream(served: Proxy) -> None:
    key = key_of("parallel=1")
    for _ in range(3):
        with _stream(served, key, "upstream", f"hello: {key}") as answer:
            assert answer.status_code == 200
            next(answer.iter_bytes())
        no_permits(served)


def test_a_client_that_does_not_wait(served: Proxy) -> None:
    key = key_of("parallel=1")
    text = f"hello: {key}"
    body = json.dumps({"model": "upstream", "messages": [{"role": "user", "content": text}]})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with held(text):
        leaves = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        leaves.request("POST", "/v1/chat/completions", body, headers)
        served.wait(lambda: permits(served) == 1, "its request is in flight")
        leaves.close()
    no_permits(served)
    assert served.ask(key).status_code == 200


def test_an_upstream_that_fails_once(served: Proxy) -> None:
    key = key_of("parallel=1-rpm=100-tpm=10000")
    text = f"fail once: {key}"
    answer = served.ask(key, model="upstream", messages=[{"role": "user", "content": text}])
    assert answer.status_code == 200, answer.text
    assert Upstream.seen[text] == 2
    no_permits(served)
    again = served.ask(key, model="upstream")
    assert again.headers["x-ratelimit-api_key-remaining-requests"] == "98"


def test_a_request_that_fails_gives_all_tokens_back(served: Proxy) -> None:
    key = key_of("parallel=1-tpm=10000")
    text = f"fail always: {key}"
    answer = served.ask(key, model="upstream", messages=[{"role": "user", "content": text}])
    assert answer.status_code == 500
    no_permits(served)
    assert _tokens_of(served, key, 10000) <= 2 * TOKENS


def test_limits_that_change(served: Proxy) -> None:
    key = key_of("rpm=3")
    assert statuses(served.ask_many(12, key))[200] == 3
    path = served.directory / "limits.json"
    path.write_text(f'{{"{key}": "sk-x-rpm=7"}}')
    try:
        assert statuses(served.ask_many(28, key))[200] == 7
    finally:
        path.unlink()


@pytest.mark.parametrize("served", ["gunicorn"], indirect=True)  # uvicorn takes minutes for it
def test_workers_that_are_replaced(served: Proxy) -> None:
    """A reload (SIGHUP) begins no new minute, and what old workers held is back."""
    key, before, begun = key_of("rpm=10-parallel=1"), served.workers(), time.monotonic()
    assert served.ask(key).status_code == 200
    os.kill(served.process.pid, signal.SIGHUP)
    served.wait(lambda: not before & served.workers(), "the old workers have gone", 120)
    served.wait_for_workers()
    found = Counter[int]()
    for _ in range(40):
        found[served.ask(key).status_code] += 1
    minutes = (time.monotonic() - begun) // 60 + 1  # that may have begun; one, unless it is slow
    assert 10 <= 1 + found[200] <= 10 * minutes
    assert found[200] + found[429] == 40
    no_permits(served)


def test_a_worker_that_is_killed(served: Proxy) -> None:
    """Its slots are back within a second, for others to take."""
    key = key_of("parallel=3")
    before = served.workers()
    failed: list[BaseException] = []

    def hold() -> None:
        try:
            served.ask(key, model="slowest")
        except httpx.HTTPError as error:
            failed.append(error)

    holders = [threading.Thread(target=hold) for _ in range(3)]
    for holder in holders:
        holder.start()
    served.wait(lambda: permits(served) == 3, "three are in flight")
    owners = {found.pid for found in Inspection(served.opened()).permits() if found.pid}
    assert owners <= before
    assert served.ask(key).status_code == 429
    for pid in owners:
        os.kill(pid, signal.SIGKILL)
    for pid in owners:
        wait_until_dead(pid)
    assert comes_true(lambda: permits(served) == 0, 1.0), "slots of dead workers are still held"
    for holder in holders:
        holder.join()
    assert len(failed) == 3
    served.wait(lambda: _admitted(served, key), "a slot is to be had again")
    served.wait_for_workers()
    options: dict[str, Any] = {"model": "upstream", "messages": _slow(key)}
    assert statuses(served.ask_many(3, key, at_once=3, **options)) == {200: 3}  # all of them
    no_permits(served)


def _slow(key: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"slow: {key}"}]


def _admitted(served: Proxy, key: str) -> bool:
    try:
        return served.ask(key).status_code == 200
    except httpx.HTTPError:  # the connection was the dead one's
        return False
