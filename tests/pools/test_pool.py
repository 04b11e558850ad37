"""SimpleConnectionPool: fast-litellm's names and dicts, with limits that hold."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest

import fast_litellm_shm as fast_litellm
from fast_litellm_shm import PermitTimeoutError, Segment, SimpleConnectionPool

A, B = "https://a.example", "https://b.example"


def make(segment: Segment, **options: Any) -> SimpleConnectionPool:
    return SimpleConnectionPool("p", segment=segment, **options)


def counts(of: SimpleConnectionPool) -> tuple[int, int]:
    stats = of.get_stats()
    assert stats["total_connections"] == stats["active_connections"] + stats["idle_connections"]
    return stats["active_connections"], stats["idle_connections"]


def take(of: SimpleConnectionPool, endpoint: str = A) -> str:
    found = of.get_connection(endpoint)
    assert isinstance(found, str)
    return found


def test_module_functions_and_their_dicts() -> None:
    found = fast_litellm.get_connection(A)
    assert isinstance(found, str)
    assert fast_litellm.health_check_connection(found) is True
    assert fast_litellm.get_connection_pool_stats() == {
        "active_connections": 1,
        "idle_connections": 0,
        "total_connections": 1,
        "max_total_connections": 100,
        "endpoints": {A: {"available_connections": 0, "max_connections": 10}},
    }
    assert fast_litellm.return_connection(found) is None  # type: ignore[func-returns-value]
    stats = fast_litellm.get_connection_pool_stats()
    assert (stats["active_connections"], stats["idle_connections"]) == (0, 1)
    assert stats["endpoints"][A]["available_connections"] == 1
    assert fast_litellm.get_connection(A) == found
    assert fast_litellm.remove_connection(found) is None  # type: ignore[func-returns-value]
    assert fast_litellm.health_check_connection(found) is False
    assert fast_litellm.cleanup_expired_connections() == 0
    assert fast_litellm.get_connection_pool_stats()["total_connections"] == 0


def test_arguments_by_name(segment: Segment) -> None:
    of = make(segment)
    found = of.get_connection(endpoint=A)
    assert found is not None
    of.return_connection(connection_id=found)
    assert counts(of) == (0, 1)
    with pytest.raises(TypeError, match="missing the argument 'endpoint'"):
        of.get_connection()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes at most 1 arguments"):
        of.return_connection(found, found)  # type: ignore[call-arg]


def test_ten_to_an_endpoint_active_ones_counted(segment: Segment) -> None:
    of = make(segment)
    ids = [take(of) for _ in range(10)]
    assert len(set(ids)) == 10
    assert of.get_connection(A) is None
    assert counts(of) == (10, 0)
    other = take(of, B)
    of.remove_connection(other)
    of.return_connection(ids[3])
    assert counts(of) == (9, 1)
    assert take(of) == ids[3]
    assert of.get_connection(A) is None


def test_a_hundred_in_all_and_idle_ones_make_room(segment: Segment) -> None:
    of = make(segment)
    ids = [take(of, f"https://host{i % 10}") for i in range(100)]
    assert of.get_connection(A) is None
    assert counts(of) == (100, 0)
    of.return_connection(ids[7])
    assert counts(of) == (99, 1)
    assert take(of) not in ids  # the idle one was closed for it
    assert counts(of) == (100, 0)
    assert not of.health_check(ids[7])


def test_the_last_returned_is_taken_first(segment: Segment) -> None:
    of = make(segment)
    ids = [take(of) for _ in range(3)]
    for one in ids:
        of.return_connection(one)
    assert [take(of) for _ in range(3)] == ids[::-1]


def test_pools_of_a_name_share_and_others_do_not(segment: Segment) -> None:
    one, same = make(segment, max_per_endpoint=1), make(segment, max_per_endpoint=1)
    other = SimpleConnectionPool("q", max_per_endpoint=1, segment=segment)
    kept = take(one)
    assert same.get_connection(A) is None
    assert counts(same) == (1, 0)
    assert counts(other) == (0, 0)
    assert take(other)
    assert other.name == "q"
    same.remove_connection(kept)  # not its own
    assert counts(one) == (1, 0)


def test_a_pool_that_its_own_connections_refer_to_is_collected(segment: Segment) -> None:
    class Wire:
        def __init__(self, pool: SimpleConnectionPool) -> None:
            self.pool = pool

    of, closed = make(segment), []
    of.bind(lambda _, of=of: Wire(of), lambda wire: closed.append(type(wire)))  # type: ignore[misc]
    of.return_connection(take(of))
    take(of, B)
    del of
    gc.collect()
    assert len(closed) == 2
    assert counts(make(segment)) == (0, 0)


@pytest.mark.parametrize("odd", ["nope", "", "conn-0000000000000000-1", "é" * 300])
def test_unknown_ids_change_nothing(segment: Segment, odd: str) -> None:
    of = make(segment)
    kept, idle = take(of), take(of)
    of.return_connection(idle)
    for _ in range(2):
        of.return_connection(odd)
        of.remove_connection(odd)
    assert of.health_check(odd) is False
    assert counts(of) == (1, 1)
    with pytest.raises(KeyError):
        of.object_of(odd)
    of.remove_connection(kept)


def test_returned_or_removed_twice_changes_nothing(segment: Segment) -> None:
    of = make(segment)
    first, second = take(of), take(of)
    for _ in range(3):
        of.return_connection(first)
    assert counts(of) == (1, 1)
    assert take(of) == first
    assert take(of) not in (first, second)  # it was put back once only
    for _ in range(3):
        of.remove_connection(first)
    of.return_connection(first)
    assert counts(of) == (2, 0)


@pytest.mark.parametrize("bad", [None, 3, b"conn", ["conn"]])
def test_an_id_that_is_no_str(segment: Segment, bad: Any) -> None:
    of = make(segment)
    kept = take(of)
    for call in (of.return_connection, of.remove_connection):
        with pytest.raises(TypeError, match="connection id must be a str"):
            call(bad)
    assert counts(of) == (1, 0)
    of.remove_connection(kept)


@pytest.mark.parametrize("bad", [None, 3, b"https://a", ["https://a"], {}])
def test_an_endpoint_that_is_no_str(segment: Segment, bad: Any) -> None:
    of = make(segment)
    with pytest.raises(TypeError, match="endpoint must be a str such as 'https://host'"):
        of.get_connection(bad)
    assert counts(of) == (0, 0)


@pytest.mark.parametrize("bad", ["", "a.example", "a.example:443", "://a", "https://", "1a://b"])
def test_an_endpoint_without_a_scheme(segment: Segment, bad: str) -> None:
    of = make(segment)
    with pytest.raises(ValueError, match="endpoint must be a URL with a scheme"):
        of.get_connection(bad)
    with pytest.raises(ValueError, match="URL with a scheme"), of.connection(bad):
        raise AssertionError("entered")
    assert counts(of) == (0, 0)


@pytest.mark.parametrize(
    ("option", "bad", "kind"),
    [
        ("max_per_endpoint", 0, ValueError),
        ("max_per_endpoint", "3", TypeError),
        ("max_total", -1, ValueError),
        ("max_total", 1.5, TypeError),
        ("idle_timeout", 0, ValueError),
        ("idle_timeout", -1, ValueError),
        ("idle_timeout", float("nan"), ValueError),
        ("idle_timeout", "1", TypeError),
        ("idle_timeout", True, TypeError),
    ],
)
def test_bad_options_are_named(
    segment: Segment, option: str, bad: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"{option} must be"):
        make(segment, **{option: bad})


def _limits(of: SimpleConnectionPool) -> tuple[int, int, float]:
    found = take(of)
    stats = of.get_stats()
    of.remove_connection(found)
    return stats["endpoints"][A]["max_connections"], stats["max_total_connections"], of._idle


def test_limits_come_from_constructor_environment_and_file(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _limits(make(segment)) == (10, 100, 300)
    file = tmp_path / "features.json"
    inner = {"max_connections_per_endpoint": 4, "idle_timeout_seconds": 2.5}
    file.write_text(json.dumps({"features": {"rust_connection_pool": {"config": inner}}}))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(file))
    assert _limits(make(segment)) == (4, 100, 2.5)
    monkeypatch.setenv("FAST_LITELLM_POOL_MAX_PER_ENDPOINT", "5")
    monkeypatch.setenv("FAST_LITELLM_POOL_MAX_TOTAL", "6")
    monkeypatch.setenv("FAST_LITELLM_POOL_IDLE_TIMEOUT", "7.5")
    assert _limits(make(segment)) == (5, 6, 7.5)
    given = make(segment, max_per_endpoint=2, max_total=3, idle_timeout=1)
    assert _limits(given) == (2, 3, 1)


@pytest.mark.parametrize("bad", ["0", "-1", "many", "1.5"])
def test_a_bad_setting_is_named(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("FAST_LITELLM_POOL_MAX_TOTAL", bad)
    with pytest.raises(ValueError, match=f"FAST_LITELLM_POOL_MAX_TOTAL must be .*{bad!r}"):
        make(segment)


@pytest.mark.parametrize("bad", [0, -3, "many", None, True, []])
def test_a_bad_field_of_the_file_is_named(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: Any
) -> None:
    file = tmp_path / "features.json"
    inner = {"max_connections_per_endpoint": bad}
    file.write_text(json.dumps({"features": {"rust_connection_pool": {"config": inner}}}))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(file))
    with pytest.raises(ValueError, match=r"features\.json: .*max_connections_per_endpoint must be"):
        make(segment)


class Line:
    """A connection that tells what became of it."""

    opened: list[Line]

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.closed, self.well = endpoint, False, True
        Line.opened.append(self)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@pytest.fixture(name="bound")
def _bound(segment: Segment) -> SimpleConnectionPool:
    of, Line.opened = make(segment, max_per_endpoint=2), []
    of.bind(Line, Line.close, lambda line: line.well)
    return of


def test_an_id_carries_an_object(bound: SimpleConnectionPool) -> None:
    found = take(bound)
    assert [bound.object_of(found)] == Line.opened
    assert Line.opened[0].endpoint == A
    bound.return_connection(found)
    assert bound.object_of(take(bound)) is Line.opened[0]
    assert len(Line.opened) == 1
    bound.remove_connection(found)
    assert Line.opened[0].closed
    bound.remove_connection(found)


def test_with_connection(bound: SimpleConnectionPool) -> None:
    for _ in range(3):
        with bound.connection(A) as line:
            assert line is Line.opened[0]
            assert counts(bound) == (1, 0)
        assert counts(bound) == (0, 1)
    assert len(Line.opened) == 1


def test_with_connection_async(bound: SimpleConnectionPool) -> None:
    async def use() -> None:
        async with bound.connection_async(A) as line, bound.connection_async(A) as second:
            assert [line, second] == Line.opened
            with pytest.raises(PermitTimeoutError):
                async with bound.connection_async(A, timeout=0.01):
                    raise AssertionError("entered")

    asyncio.run(use())
    asyncio.run(use())
    assert counts(bound) == (0, 2)
    assert len(Line.opened) == 2


def test_as_a_decorator_each_call_holds_a_connection(bound: SimpleConnectionPool) -> None:
    use = bound.connection(A, timeout=0)

    @use
    def call(depth: int, *, fails: bool = False) -> tuple[int, int]:
        """Say how many are held."""
        if fails:
            raise KeyError
        return call(depth - 1) if depth else counts(bound)

    assert (call.__name__, call.__doc__) == ("call", "Say how many are held.")
    assert [call(0), call(1), call(0)] == [(1, 0), (2, 0), (1, 1)]
    with pytest.raises(PermitTimeoutError):
        call(2)
    with pytest.raises(KeyError):
        call(0, fails=True)
    assert counts(bound) == (0, 0)  # what raised is closed, as after a block
    with use:  # a decorator can yet be a block, once
        assert counts(bound) == (1, 0)
    for wrong in ((), (call, call)):
        with pytest.raises(TypeError):
            use(*wrong)
    with pytest.raises(TypeError):
        use(function=call)  # type: ignore[call-arg]


def test_as_a_decorator_of_a_coroutine_function(bound: SimpleConnectionPool) -> None:
    @bound.connection_async(A, timeout=0)
    async def call(depth: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return await call(depth - 1) if depth else counts(bound)

    async def main() -> None:
        assert [await call(0), await call(1), await call(0)] == [(1, 0), (2, 0), (1, 1)]
        with pytest.raises(PermitTimeoutError):
            await call(2)

    asyncio.run(main())
    assert counts(bound)[0] == 0


def test_without_bind_it_is_the_id(segment: Segment) -> None:
    of = make(segment)
    with of.connection(A) as found:
        assert of.health_check(found)
        assert of.object_of(found) is None


def test_an_object_whose_use_raised_is_closed(bound: SimpleConnectionPool) -> None:
    async def use() -> None:
        async with bound.connection_async(A):
            raise KeyError

    with pytest.raises(KeyError), bound.connection(A):
        raise KeyError
    with pytest.raises(KeyError):
        asyncio.run(use())
    assert [line.closed for line in Line.opened] == [True, True]
    assert counts(bound) == (0, 0)


def test_a_connect_that_fails_takes_no_place(segment: Segment) -> None:
    def refused(endpoint: str) -> Line:
        raise OSError(f"{endpoint} refused")

    of = make(segment, max_per_endpoint=1)
    of.bind(refused)
    for _ in range(3):
        with pytest.raises(OSError, match=r"a\.example refused"):
            of.get_connection(A)
    assert counts(of) == (0, 0)


def test_no_connection_in_time(bound: SimpleConnectionPool) -> None:
    says = (
        r"pool 'p': no connection to https://a\.example within .* s: 2 to an endpoint, 100 in all"
    )
    with bound.connection(A), bound.connection(A):
        for timeout in (0, 0.02):
            with (
                pytest.raises(PermitTimeoutError, match=says),
                bound.connection(A, timeout=timeout),
            ):
                raise AssertionError("entered")


def test_an_unhealthy_object_is_closed_and_not_reused(bound: SimpleConnectionPool) -> None:
    found = take(bound)
    assert bound.health_check(found)
    bound.return_connection(found)
    Line.opened[0].well = False
    assert not bound.health_check(found)
    assert bound.cleanup() == 1
    assert Line.opened[0].closed
    assert take(bound) != found


def test_idle_too_long_is_closed_and_not_reused(segment: Segment) -> None:
    of, Line.opened = make(segment, idle_timeout=0.02, max_per_endpoint=2), []
    of.bind(Line, Line.close)
    old, kept = take(of), take(of)
    of.return_connection(old)
    time.sleep(0.03)
    assert not of.health_check(old)
    assert of.health_check(kept)  # in use: however old
    assert take(of) not in (old, kept)
    assert [line.closed for line in Line.opened] == [True, False, False]
    of.return_connection(kept)
    time.sleep(0.03)
    assert of.cleanup() == 1
    assert of.cleanup() == 0
    assert counts(of) == (1, 0)


def test_close_closes_all_of_this_process(bound: SimpleConnectionPool) -> None:
    first, _ = take(bound), take(bound)
    bound.return_connection(first)
    bound.close()
    assert [line.closed for line in Line.opened] == [True, True]
    assert counts(bound) == (0, 0)


@pytest.mark.parametrize(("name", "which"), [("connect", 0), ("close", 1), ("is_healthy", 2)])
def test_bind_takes_callables(segment: Segment, name: str, which: int) -> None:
    given: list[Any] = [Line, None, None]
    given[which] = "x"
    with pytest.raises(TypeError, match=f"bind: {name} must be callable, not 'x'"):
        make(segment).bind(*given)


def test_a_pool_that_is_dropped_gives_its_places_back(segment: Segment) -> None:
    watching = make(segment)
    dropped = make(segment)
    take(dropped)
    dropped.return_connection(take(dropped))
    del dropped
    gc.collect()
    assert counts(watching) == (0, 0)
