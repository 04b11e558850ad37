"""LiteLLM's limits over two hosts: two real proxies of two workers each, which share nothing but a
Redis server. One start of them for all that is checked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import httpx
import pytest
from support import servers
from support.names import left_over, remove, unique_name
from support.proxy import Proxy, proxy
from support.upstream import Upstream, serving

from fast_litellm_shm._shared.inspection import Inspection

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")

MINUTE = 60


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Proxy]]:
    """One has the server's URL by the variable, the other by the plugin's setting."""
    kind = next(filter(servers.installed, servers.KINDS), None)
    if kind is None:
        pytest.skip("there is neither redis-server nor valkey-server here")
    names = [unique_name("proxy-host0"), unique_name("proxy-host1")]
    with ExitStack() as running:
        upstream = running.enter_context(serving())
        url = running.enter_context(servers.Server(kind)).url
        given: list[dict[str, Any]] = [
            {"environment": {"FAST_LITELLM_SHM_CLUSTER": url}},
            {"settings": f'{{cluster: "{url}"}}'},
        ]

        # Not in the threads: the first call, of any module, empties the folder of all.
        directories = [tmp_path_factory.mktemp(f"host{i}") for i in range(2)]

        def start(i: int) -> Proxy:
            options: dict[str, Any] = {"workers": 2, "gunicorn": True, "upstream": upstream}
            return running.enter_context(proxy(directories[i], names[i], **options, **given[i]))

        for name in names:
            running.callback(remove, name)
        with ThreadPoolExecutor(2) as pool:
            started = list(pool.map(start, range(2)))
        yield started
    assert not any(map(left_over, names))


def ask_both(hosts: list[Proxy], n: int, key: str, **options: Any) -> Counter[int]:
    """n requests to each, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda each: each.ask_many(n, key, **options), hosts)
        return Counter(answer.status_code for found in answers for answer in found)


def permits(host: Proxy) -> int:
    return sum(each.pid is not None for each in Inspection(host.opened()).permits())


def none_held(host: Proxy) -> bool:
    return permits(host) == 0


def no_permits(hosts: list[Proxy]) -> None:
    for host in hosts:
        host.wait(partial(none_held, host), "all slots are back")


def admits_exactly(hosts: list[Proxy], n: int, key: str, **options: Any) -> None:
    began, found = time.monotonic(), Counter[int]()

    def ask(times: int) -> int:
        found.update(ask_both(hosts, times, key, **options))
        return found[200]

    # what one host was granted and does not use comes back while the other asks
    hosts[0].wait(lambda: ask(10) >= n, f"{n} are admitted")
    ask(30)
    minutes = int((time.monotonic() - began) // MINUTE) + 1  # another one began meanwhile
    assert set(found) == {200, 429}
    assert found[200] == n or n < found[200] <= n * minutes


def test_requests_of_a_key(hosts: list[Proxy]) -> None:
    admits_exactly(hosts, 25, "sk-1-rpm=25")


def test_tokens_of_a_key(hosts: list[Proxy]) -> None:
    """A mock answer has 30, as the estimate of these requests: a limit of 600 is 20 of them."""
    admits_exactly(hosts, 20, "sk-2-tpm=600-parallel=50", max_tokens=22)


def test_several_limits_at_once(hosts: list[Proxy]) -> None:
    """What a request is denied by one of them, it has not used of the others."""
    admits_exactly(hosts, 20, "sk-3-rpm=20-tpm=100000-m1.rpm=1000-team_rpm=5000-parallel=50")


def test_requests_of_a_deployment(hosts: list[Proxy]) -> None:
    admits_exactly(hosts, 10, "sk-4-rpm=100000", model="deployed")


def test_tokens_that_were_not_used_are_the_hosts_again(hosts: list[Proxy]) -> None:
    """Each is estimated at 1,000 tokens and uses 30: more than three pass."""
    key, found = "sk-5-tpm=3000", Counter[int]()

    def ask() -> int:
        found.update(ask_both(hosts, 5, key, at_once=1, max_tokens=992))
        return found[200]

    hosts[0].wait(lambda: ask() >= 30, "30 requests are admitted")


def test_parallel_requests_of_a_key(hosts: list[Proxy]) -> None:
    key = "sk-6-parallel=3"
    text = f"slow: {key}"
    options: dict[str, Any] = {
        "model": "upstream",
        "messages": [{"role": "user", "content": text}],
        "at_once": 10,
    }

    def all_three() -> bool:
        assert set(ask_both(hosts, 10, key, **options)) <= {200, 429}
        return Upstream.most[text] >= 3

    hosts[0].wait(all_three, "three are in flight")
    ask_both(hosts, 20, key, **options)
    assert Upstream.most[text] == 3
    no_permits(hosts)


def test_a_host_that_vanishes(hosts: list[Proxy]) -> None:
    """The last one: it ends a proxy. Its slots are the other host's when it has not been heard for
    ten seconds."""
    first, second = hosts
    key = "sk-7-parallel=3"

    def hold() -> None:
        with suppress(httpx.HTTPError):
            second.ask(key, model="slowest")

    def admitted() -> bool:
        return first.ask(key).status_code == 200

    holders = [threading.Thread(target=hold) for _ in range(3)]
    for holder in holders:
        holder.start()
    second.wait(lambda: permits(second) == 3, "three are in flight")
    assert not any(admitted() for _ in range(5))
    os.killpg(second.process.pid, signal.SIGKILL)
    for holder in holders:
        holder.join()
    first.wait(admitted, "its slots are to be had")
    no_permits([first])
