"""A host that has the password and is broken, or means harm: what it writes into a key at the
server is that key's problem alone, and never more quota."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.test_meter import Meter, meter, new_key
from cluster.test_rights import documented, granting, url_of
from support import servers
from support.leases import connection_of, permits_of, tokens_of
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm._shared import performance as monitoring
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.limits import LimitSpec

__all__ = ["meter"]  # the fixture

HOUR = 3600
KINDS: dict[str, LimitSpec] = {
    "window": Window(100, HOUR),
    "sliding": SlidingWindow(100, HOUR),
    "bucket": Limit(100, HOUR),
}


def packed(value: Any) -> bytes:
    """As msgpack has it: of what the scripts keep."""
    if isinstance(value, bytes):
        return b"\xdb" + struct.pack(">I", len(value)) + value
    if isinstance(value, str):
        return packed(value.encode())
    if isinstance(value, bool) or value is None:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(packed, value))
    pairs = b"".join(packed(k) + packed(v) for k, v in value.items())
    return b"\xdf" + struct.pack(">I", len(value)) + pairs


NAN, INF = float("nan"), float("inf")
RAW = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "text": b"hello",
    "cut": b"\x82\xa1t",
    "two": b"\x01\x02",
    "nested": b"\x91" * 100_000,
    "nil as a key": b"\x81\xc0\x01",
    "says it is large": b"\xdd\xff\xff\xff\xff",
    "nothing": packed(None),
    "a number": packed(5),
    "an array": packed([]),
    "a map": packed({}),
    "large": packed({"t": 1, "l": [], "h": {}, "x": b"x" * 5_000_000}),
}
WINDOW = {"k": 1, "r": [100, HOUR * 10**6], "a": 0, "w": HOUR * 10**6, "c": 50, "p": 0, "s": 1}
BUCKET = {"k": 0, "r": [100, HOUR * 10**6, 100, 36 * 10**9, 1], "a": 10**9, "w": 0, "c": 0, "p": 0, "s": 1}  # noqa: E501  # fmt: skip
HOST = {"t": 1, "g": 1, "b": 1}
STATE: dict[str, Any] = {"t": 1, "l": [WINDOW], "h": {"x": HOST}}
WRONG = [
    STATE | {"t": -1}, STATE | {"t": NAN}, STATE | {"t": "1"}, STATE | {"t": 1e300},
    STATE | {"l": 5}, STATE | {"l": {"x": WINDOW}}, STATE | {"l": [5]},
    STATE | {"l": [WINDOW] * 40},
    STATE | {"h": 5}, STATE | {"h": {"x": 5}}, STATE | {"h": [HOST]},
    *(STATE | {"l": [WINDOW | {name: value}]} for name, value in (
        ("k", 3), ("k", None), ("r", None), ("r", [100]), ("r", [0, 1]), ("r", [100, 0]),
        ("r", [NAN, 1]),
        ("r", [100, 1, 1, 1, 1, 1]), ("c", -1), ("c", INF), ("c", "5"), ("c", None), ("p", -5),
        ("w", NAN),
        ("w", INF), ("a", -1), ("s", "x"), ("o", []), ("f", 7), ("q", -1), ("g", "1"),
    )),
    *(STATE | {"l": [BUCKET | {"r": numbers}]} for numbers in (
        [100, 1, 100, 1e-300, 2**53], [100, 1, 100, 0, 1], [100, 1, 100, 1, 0], [100, 1, 0, 1, 1],
        [100, 1, 2**52, 2**52, 1], [100, 1, 100, 1, INF],
    )),
    STATE | {"l": [BUCKET | {"a": -(10**15)}]}, STATE | {"l": [BUCKET | {"a": 1e200}]},
    *(STATE | {"h": {"x": HOST | {name: value}}} for name, value in (
        ("t", None), ("t", "x"), ("g", NAN), ("b", -1), ("b", INF), ("r", "x"), ("p", 5),
        ("p", {"x": 1}),
        ("p", ["x"]), ("i", [0]), ("i", [-1]), ("i", [NAN]), ("k", 5),
    )),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", RAW)
def test_a_value_that_is_no_state(meter: Meter, kind: str, raw: str) -> None:
    _is_used_up(meter, KINDS[kind], RAW[raw])


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_a_state_with_a_wrong_value(meter: Meter, wrong: int) -> None:
    for limit in KINDS.values():
        _is_used_up(meter, limit, packed(WRONG[wrong]))


def _is_used_up(meter: Meter, limit: LimitSpec, value: bytes) -> None:
    """The key's limit is used up, as of now; that is told once; and it goes by, or is reset."""
    key, at, per = new_key(), 10**15, HOUR * 10**6
    assert meter(at, "a", "take", key, [limit], costs=60).admitted
    meter.put(key, value)
    found = meter(at, "b", "take", key, [limit], costs=1)
    assert found.junk and not found.admitted and found.batch == 0
    assert 0 < found.retry_after_ns <= 2 * HOUR * 10**9
    again = meter(at, "a", "take", key, [limit], costs=60)
    assert not again.junk and not again.admitted
    assert meter(at + 2 * per, "a", "single", key, [limit], costs=60).admitted
    meter.put(key, value)
    assert meter(at, "b", "reset", key, [limit], costs=0).junk
    assert meter(at, "b", "take", key, [limit], costs=60).admitted


def test_a_value_of_another_type(meter: Meter) -> None:
    key, limit = new_key(), Window(100, HOUR)
    meter.put(key, b"x", "LPUSH")
    found = meter(10**15, "b", "take", key, [limit], costs=1)
    assert found.junk and not found.admitted


@pytest.mark.parametrize("seed", range(8))
def test_values_that_were_changed_at_random(meter: Meter, seed: int) -> None:
    """Of real states, with bytes flipped, cut and mixed: whatever it is taken for, every operation
    answers, with numbers."""
    chance, limits = random.Random(seed), [list(KINDS.values()), [KINDS["window"]]]
    values = []
    for i in range(6):
        key = new_key()
        for j in range(4):
            meter(10**15 + j, f"host {j}", "take", key, limits[i % 2], costs=3)
        values.append(meter.value(key))
    for i in range(400):
        value = bytearray(chance.choice(values))
        for _ in range(chance.randrange(1, 6)):
            what, at = chance.randrange(4), chance.randrange(len(value) or 1)
            if what == 0 and value:
                value[at] = chance.randrange(256)
            elif what == 1 and value:
                value[at] ^= 1 << chance.randrange(8)
            elif what == 2:
                del value[at : at + chance.randrange(1, 9)]
            else:
                other = chance.choice(values)
                value[at:at] = other[chance.randrange(len(other)) :][: chance.randrange(1, 20)]
        key = new_key()
        for operation in ("take", "single", "ahead", "look", "give", "charge", "fill", "block",
                          "refund", "reset"):  # fmt: skip
            meter.put(key, bytes(value))
            at = 10**15 + chance.randrange(-(10**7), 10**10)
            host = f"host {chance.randrange(5)}"
            told = {
                "costs": chance.randrange(5),
                "given": chance.randrange(3),
                "used": 5,
                "left": 99,
            }
            found = meter(at, host, operation, key, limits[i % 2], **told)
            assert -1 <= found.retry_after_ns <= 2**63 and 0 <= found.batch < 2**24
            assert all(
                0 <= each.used < 2**63 and 0 <= each.left_ns < 2**63 for each in found.limits
            )


# over real hosts, with the rights that are documented


@pytest.fixture
def limits_server() -> Iterator[servers.Server]:
    kind = next((each for each in servers.KINDS if servers.installed(each)), servers.KINDS[0])
    with granting(kind, *documented()) as server:
        yield server


def hostile(server: servers.Server) -> Any:
    """Another host's own client: a user with exactly the documented rights."""
    import redis

    return redis.Redis.from_url(url_of(server))


def only_key(client: Any, start: str = "fast-shm:rates:") -> bytes:
    (found,) = client.scan_iter(match=f"{start}*")
    return bytes(found)


@pytest.mark.parametrize("value", [b"", b"\xc1", b"junk" * 9])
def test_junk_is_its_keys_problem_alone(
    limits_server: servers.Server,
    segment: Segment,
    other: Segment,
    caplog: pytest.LogCaptureFixture,
    value: bytes,
) -> None:
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    one, two = (
        RateLimiter(Window(100, HOUR), name="api", segment=each, cluster=cluster)
        for each in (segment, other)
    )
    assert one.acquire("key", 100)
    with hostile(limits_server) as client, caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        name = only_key(client)
        client.set(name, value)
        assert not two.acquire("key")  # was: a whole limit, or an error
        for i in range(20):
            assert two.acquire(f"key {i}")
            client.set(name, value)
            assert not two.acquire("key") or i
        for each in (one, two):
            assert connection_of(each).outage is None
    told = [
        each.getMessage() for each in caplog.records if "not a value of ours" in each.getMessage()
    ]
    assert len(told) == 1 and "'api'" in told[0] and name.decode() in told[0], told
    seen = monitoring.segment_stats(other, "cluster_values")["cluster_values"]
    assert seen["operations"]["junk"]["total_calls"] >= 1
    two.reset("key")
    assert two.acquire("key")


@pytest.mark.parametrize("wrong", [NAN, INF, -INF, -1.0, 1e300])
def test_an_answer_that_is_no_number(
    limits_server: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    wrong: float,
) -> None:
    """NaN was a ValueError in the middle of a request."""
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)
    assert limiter.acquire("before")
    connection = connection_of(limiter)
    real = connection.run_one

    def run_one(*args: Any) -> Any:
        return struct.pack("<12d", wrong > 0, *[wrong] * 11) if real(*args) else b""

    monkeypatch.setattr(connection, "run_one", run_one)
    assert limiter.acquire("key").allowed == (wrong > 0)
    monkeypatch.undo()
    assert connection.outage is None
    limiter.reset("key")
    assert limiter.acquire("key")


def test_junk_for_permits(limits_server: servers.Server, segment: Segment, other: Segment) -> None:
    """Who holds some goes on holding them; nobody is granted more until all have told."""
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    one, two = (
        ConcurrencyLimiter(4, name="api", segment=each, cluster=cluster)
        for each in (segment, other)
    )
    leases = permits_of(two)
    held = [one.acquire("key") for _ in range(4)]
    assert all(held)
    with hostile(limits_server) as client:
        name = only_key(client, "fast-shm:permits:")
        for value in (*RAW.values(), packed({"t": 1, "r": 0, "h": {"x": {"a": -9, "t": 2**52}}})):
            client.set(name, value)
            assert not two.acquire("key")
            wait_until("it is asked anew", lambda: not leases.answers(b"key"))
    wait_until(
        "what one holds is known again",
        lambda: (two.acquire("key"), _told(limits_server, name) >= 4)[1],
        every=0.1,
    )
    assert not two.acquire("key")
    for each in held:
        each.release()
    got = wait_until("the other gets one", lambda: two.acquire("key"), every=0.05)
    got.release()


_TOLD = """
local found, state = 0, redis.call('GET', KEYS[1])
for _, host in pairs(state and cmsgpack.unpack(state).h or {}) do found = found + host.a end
return found
"""


def _told(server: servers.Server, name: bytes) -> int:
    with server.client() as client:
        return int(client.register_script(_TOLD)([name]))


def test_junk_among_the_hosts(
    limits_server: servers.Server, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another type, or hosts of the future: it is known again how many hosts there are."""
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    with hostile(limits_server) as client, limits_server.client() as admin:
        client.set("fast-shm:hosts", "junk")
        limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)
        assert limiter.acquire("key")
        wait_until("the host is known", lambda: host_count(segment) == 1)
        for i in range(50):
            client.zadd("fast-shm:hosts", {f"host {i}": 2**60})
        wait_until("they are forgotten", lambda: admin.zcard("fast-shm:hosts") == 1)


JUNK_MESSAGES: list[bytes] = [
    b"", b"x", b"\xc1", b"\x94", b"\x92\xa1x", b"\xdc\xff\xff", b"\x94\xa1p\xa3api\xa3key",
    b"\x92\xdb\xff\xff\xff\xff", packed(["p", "api", "key", "x", "y"]),
    packed(["p", "api", "key", "-5", "99999999999999999999"]), packed(["m", b"\xff\xfe", b"\xff"]),
    packed(["m", "api", "", "host"]), packed(["p", "api"]), packed([]),
    packed(["m", "x" * 300, "y"]),
]  # fmt: skip


def test_junk_that_is_told_to_hosts(
    limits_server: servers.Server,
    segment: Segment,
    other: Segment,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ended the leader's connection, which tells that the host lives and hears the others."""
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    one, two = (
        RateLimiter(Window(1000, HOUR), name="api", segment=each, cluster=cluster)
        for each in (segment, other)
    )
    assert one.acquire("key")
    wait_until("both are heard", lambda: two.acquire("x") and host_count(other) == 2)
    with hostile(limits_server) as client, caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        heard = _connections(limits_server)
        for each in JUNK_MESSAGES * 20:
            client.publish("fast-shm:recall", each)
        rest = 0

        def all_is_used() -> bool:
            nonlocal rest
            rest += two.is_allowed("key")
            return rest == 1000 - 1

        wait_until("what one does not use comes back", all_is_used, every=0.0001)
        assert _connections(limits_server) - heard < 10
    assert not [each for each in caplog.records if each.exc_info]


def test_limiters_that_are_not_over_hosts_are_recalled(
    limits_server: servers.Server, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that names one made a wallet for it, or ended the leader's connection."""
    cluster = Cluster(url_of(limits_server), on_outage="deny", timeout=servers.SLOWEST)
    api = RateLimiter(Window(1000, HOUR), name="api", segment=segment, cluster=cluster)
    RateLimiter(Window(1000, HOUR), name="alone", segment=segment, cluster=False)
    ConcurrencyLimiter(3, name="gpu", segment=segment, cluster=False)
    assert api.acquire("key") and api.acquire("spare")
    wait_until("it is heard", lambda: host_count(segment) == 1)
    before = {each["name"] for each in Inspection(segment).limiters()}
    heard = _connections(limits_server)
    with hostile(limits_server) as client, caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        for name in ("alone", "gpu", "api (wallet)", "api (refused)", "(cluster)") * 3:
            client.publish("fast-shm:recall", packed(["m", name, "key"]))
            client.publish("fast-shm:recall", packed(["p", name, "key", "1", "1"]))
        # in order: who has heard this has heard those before
        client.publish("fast-shm:recall", packed(["m", "api", "spare"]))
        wallet = tokens_of(api)
        wait_until("it gives back", lambda: not any(wallet.look(b"spare")[0]))
        assert _connections(limits_server) - heard < 3
    assert {each["name"] for each in Inspection(segment).limiters()} == before
    assert not [each for each in caplog.records if each.exc_info]


def _connections(server: servers.Server) -> int:
    with server.client() as client:
        return int(client.info("stats")["total_connections_received"])
