"""algorithms.lua answers the first question about a key in a short way, and many questions in one
call. Both come to what the rest of the script comes to, for each question by itself."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import servers

from fast_litellm_shm import FixedWindow, SlidingWindow, TokenBucket
from fast_litellm_shm.cluster import algorithms
from fast_litellm_shm.limits import LimitSpec

some = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NOW = 1_764_000_000_000_000  # us
_STATE = """
local packed = redis.call('GET', KEYS[1])
return {cjson.encode(cmsgpack.unpack(packed)), redis.call('PTTL', KEYS[1])}
"""
_SHORT = "if not known then return false end"
_count = itertools.count()


class Scripts:
    """The script as it is, and without its short way; both at a time that stands still."""

    def __init__(self, client: Any) -> None:
        frozen = f"{{'{NOW // 10**6}', '{NOW % 10**6}'}}"
        source = algorithms.SOURCE.replace("redis.call('TIME')", frozen)
        whole = source.replace(_SHORT, "do return false end")
        assert algorithms.SOURCE != source != whole
        self.short, self.whole = client.register_script(source), client.register_script(whole)
        self._state = client.register_script(_STATE)

    def state(self, key: bytes) -> tuple[Any, int]:
        """What is kept, and for how many seconds."""
        state, left = self._state([key])
        return json.loads(state), round(left / 1000)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    for kind in servers.KINDS:
        if servers.installed(kind):
            with servers.Server(kind) as server:
                yield Scripts(server.client())
            return
    pytest.skip("there is neither redis-server nor valkey-server here")


def _limits() -> st.SearchStrategy[LimitSpec]:
    n, per = st.integers(1, 1_000_000), st.sampled_from((7.5, 60, 3600))
    return st.one_of(
        st.builds(FixedWindow, n, per=per),
        st.builds(SlidingWindow, n, per=per),
        st.builds(FixedWindow, n, per=st.just("day"), timezone=st.just("UTC")),
        st.builds(TokenBucket, n, per=st.sampled_from((1, 60, 3600))),
        st.builds(TokenBucket, st.integers(2, 1000), per=st.just(60), burst=st.just(2)),
        st.builds(TokenBucket, st.integers(1, 1000), per=st.just(60), strict=st.just(True)),
    )


@st.composite
def questions(draw: st.DrawFn) -> list[algorithms.Request]:
    limits = draw(st.lists(_limits(), min_size=1, max_size=4))
    rules = [algorithms.dated(algorithms.rule(each), each, NOW // 60_000_000) for each in limits]
    count = len(rules)
    mostly_0 = st.one_of(st.just(0), st.just(0), st.integers(0, 20))

    def some_of(each: st.SearchStrategy[int]) -> Sequence[int]:
        return draw(st.lists(each, min_size=count, max_size=count))

    keys = [b"key %d" % next(_count) for _ in range(draw(st.integers(1, 3)))]
    found = []
    for _ in range(draw(st.integers(1, 8))):
        operation = draw(st.sampled_from(("take",) * 4 + ("ahead",) * 4 + ("single", "charge")))
        costs = [draw(st.sampled_from((0, 1, 1, 2, 7, 5000)))] * count
        kept, back, used, previous, left = (some_of(mostly_0) for _ in range(5))
        key = draw(st.sampled_from(keys))
        found.append(
            algorithms.Request(operation, b"l", key, rules, costs, kept, back, used, previous, left)
        )
    return found


@pytest.mark.parametrize("sealed", [0, 1])
@some
@given(asked=questions())
def test_both_ways_come_to_the_same(
    scripts: Scripts, sealed: int, asked: list[algorithms.Request]
) -> None:
    head, began = [b"%016x" % 7, "channel", b"l", sealed], time.monotonic()
    limits = asked[0].limits()
    together = b"".join(each.question(each.key) for each in asked)
    keys = [each.state_key("together") for each in asked]
    reply = scripts.short(keys, [*head, limits, together])
    size = asked[0].answer_size
    for i, each in enumerate(asked):
        expected = scripts.whole([each.state_key("t")], [*head, limits, each.question(each.key)])
        assert each.answer(reply, i * size) == each.answer(expected), each
    for each in asked:
        found, left = scripts.state(each.state_key("together"))
        expected, kept = scripts.state(each.state_key("t"))
        assert found == expected
        assert abs(left - kept) <= 1 + time.monotonic() - began


def test_most_new_keys_go_the_short_way(scripts: Scripts) -> None:
    """Else the test above would compare the script with itself."""
    source = algorithms.SOURCE
    mark = "-- all keys ---"
    assert source.count(mark) == 1
    cut = source[: source.index(mark)] + "return redis.error_reply('the long way')"
    for limit in (FixedWindow(10, 60), SlidingWindow(10, 60), TokenBucket(1000, 60)):
        rules = [algorithms.rule(limit)]
        key = b"key %d" % next(_count)
        none = (0,)
        request = algorithms.Request("take", b"l", key, rules, (1,), none, none, none, none, none)
        script = scripts.short.registered_client.register_script(cut)
        arguments = [b"h", "channel", b"l", 0, request.limits(), request.question(key)]
        reply = script([request.state_key("cut")], arguments)
        assert request.answer(reply).admitted
