"""``mode: native`` in LiteLLM's real proxy with four workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
from support.names import left_over, remove, unique_name
from support.proxy import Proxy, proxy

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    name = unique_name("proxy-native")
    directory = tmp_path_factory.mktemp("native")
    try:
        with proxy(
            directory, name, gunicorn=True, settings="{mode: native, router_state: true}"
        ) as started:
            yield started
    finally:
        remove(name)
        assert not left_over(name)


def statuses(served: Proxy, n: int, key: str, **options: object) -> Counter[int]:
    found = served.ask_many(n, key, **options)  # type: ignore[arg-type]
    return Counter(answer.status_code for answer in found)


def test_requests(served: Proxy) -> None:
    assert statuses(served, 100, "sk-1-rpm=10") == {200: 10, 429: 90}


def test_tokens(served: Proxy) -> None:
    """LiteLLM reserves what a request may use, here more than the 30 that it does, and gives the
    rest back after the answer. So 32 are admitted, once all is given back, and never 33."""
    key, admitted = "sk-2-tpm=1000", 0

    def ask(n: int) -> int:
        nonlocal admitted
        admitted += statuses(served, n, key, max_tokens=40)[200]
        return admitted

    ask(100)
    served.wait(lambda: ask(1) >= 32, "32 requests are admitted", within=30)
    ask(20)
    assert admitted == 32


def test_parallel_requests(served: Proxy) -> None:
    """An answer takes five seconds: so often at most can each of the four be had again."""
    key = "sk-3-parallel=4"
    for _ in range(2):
        begun = time.monotonic()
        found = statuses(served, 40, key, at_once=40, apart=0.02, model="slower")
        turns = (time.monotonic() - begun) // 5  # one, unless the machine is very slow
        assert 4 <= found[200] <= 4 * turns
        assert found[200] + found[429] == 40


def test_requests_of_a_deployment(served: Proxy) -> None:
    """Which the plugin keeps in either mode."""
    assert statuses(served, 100, "sk-4-rpm=1000", model="deployed") == {200: 10, 429: 90}


def test_the_routers_state_is_shared(served: Proxy) -> None:
    assert served.ask("sk-6").status_code == 200
    log = served.log()
    assert "sharing a router's state" not in log  # failed
    assert "offers no way" not in log


def test_it_is_the_built_in_limiter_that_answers(served: Proxy) -> None:
    answer = served.ask("sk-5-rpm=10")
    assert answer.headers["x-ratelimit-api_key-remaining-requests"] == "9"
    assert "x-ratelimit-remaining-requests" not in answer.headers
