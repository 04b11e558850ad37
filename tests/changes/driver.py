"""The C API as the tests of changing limits call it: several keys, explicit times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import ffi, lib

BUCKET, WINDOW, SLIDING, PERMITS = (
    lib.FSHM_BUCKET,
    lib.FSHM_WINDOW,
    lib.FSHM_SLIDING,
    lib.FSHM_PERMITS,
)
SECOND = 10**9
HOUR = 3600 * SECOND

_count = itertools.count()


@dataclass(frozen=True)
class Rule:
    """One limit. For permits, ``per`` is 0."""

    kind: int
    n: int
    per: int = 0  # ns
    burst: int = 0
    strict: bool = False

    def like(self, other: Rule) -> bool:
        """Is it the same limit, perhaps with other numbers?"""
        return (self.kind, self.per) == (other.kind, other.per)

    @property
    def most(self) -> int:
        """What one request may cost at most."""
        return self.burst if self.kind == BUCKET else self.n


def bucket(n: int, per: int, burst: int = 0, strict: bool = False) -> Rule:
    return Rule(BUCKET, n, per, burst or n, strict)


def window(n: int, per: int) -> Rule:
    return Rule(WINDOW, n, per)


def sliding(n: int, per: int) -> Rule:
    return Rule(SLIDING, n, per)


def permits(n: int) -> Rule:
    return Rule(PERMITS, n)


class Limiter:
    """One name, whose limits are changed. Each instance has keys of its own."""

    def __init__(self, segment: Segment, *rules: Rule) -> None:
        self._segment = segment
        self._turn = next(_count)
        self._name = b"limiter"
        self.change(*rules)

    def change(self, *rules: Rule, now: int = 1) -> None:
        out = ffi.new("fshm_limiter **")
        raw = ffi.new("fshm_limit[]", [(r.n, r.per, r.burst, r.kind, r.strict) for r in rules])
        status = lib.fshm_limiter_open_at(
            self._segment._handle, self._name, len(self._name), raw, len(rules), now, out
        )
        assert status == lib.FSHM_OK, (status, rules)
        self._limiter = ffi.gc(out[0], lib.fshm_limiter_close)
        self.rules = rules

    def _key(self, key: str) -> bytes:
        return b"%d %s" % (self._turn, key.encode())

    def _costs(self, costs: int | Sequence[int]) -> Any:
        each = [costs] * 4 if isinstance(costs, int) else list(costs)
        return ffi.new("uint64_t[4]", each)

    def apply(
        self, op: int, key: str, now: int, costs: int | Sequence[int], max_wait: int = 0
    ) -> Any:
        raw, d = self._key(key), ffi.new("fshm_decision *")
        lib.fshm_apply(self._limiter, op, raw, len(raw), self._costs(costs), max_wait, now, d)
        return d

    def acquire(self, key: str, now: int, costs: int | Sequence[int] = 1) -> bool:
        status = self.apply(lib.FSHM_ACQUIRE, key, now, costs).status
        assert status in (lib.FSHM_ALLOWED, lib.FSHM_DENIED), status
        return bool(status)

    def admit(self, key: str, now: int, costs: int | Sequence[int] = 1) -> tuple[Any, Any]:
        """The permit, by which a settlement knows what it settles, and the decision."""
        raw, d = self._key(key), ffi.new("fshm_decision *")
        permit, in_flight = ffi.new("fshm_permit *"), ffi.new("uint32_t *")
        costs = self._costs(costs)
        lib.fshm_admit(self._limiter, raw, len(raw), costs, now, permit, d, in_flight)
        assert d.status in (lib.FSHM_ALLOWED, lib.FSHM_DENIED), d.status
        return permit, d

    def settle(
        self,
        key: str,
        now: int,
        charged: int | Sequence[int],
        actual: int | Sequence[int],
        permit: Any,
    ) -> None:
        raw = self._key(key)
        charged, actual = self._costs(charged), self._costs(actual)
        status = lib.fshm_settle(self._limiter, raw, len(raw), charged, actual, permit, now)
        assert status == lib.FSHM_ALLOWED, status

    def release(self, permit: Any) -> bool:
        return bool(lib.fshm_permit_release(self._limiter, permit))

    def in_flight(self, key: str) -> int:
        raw = self._key(key)
        return int(lib.fshm_in_flight(self._limiter, raw, len(raw)))

    def charge(self, key: str, now: int, costs: int | Sequence[int]) -> None:
        assert self.apply(lib.FSHM_CHARGE, key, now, costs).status == lib.FSHM_ALLOWED

    def refund(self, key: str, now: int, costs: int | Sequence[int]) -> None:
        assert self.apply(lib.FSHM_REFUND, key, now, costs).status == lib.FSHM_ALLOWED

    def block(self, key: str, now: int, ns: int) -> int:
        return int(self.apply(lib.FSHM_BLOCK, key, now, ns).status)

    def reset(self, key: str) -> None:
        raw = self._key(key)
        assert lib.fshm_reset_key(self._limiter, raw, len(raw)) == lib.FSHM_OK

    def peek(self, key: str, now: int, costs: int | Sequence[int] = 1) -> Any:
        return self.apply(lib.FSHM_PEEK, key, now, costs)

    def remaining(self, key: str, now: int) -> list[int]:
        raw, out = self._key(key), ffi.new("uint64_t[4]")
        got = lib.fshm_remaining(self._limiter, raw, len(raw), now, out)
        return [int(v) for v in out[0:got]]

    def drain(self, key: str, now: int, most: int) -> int:
        """How many requests of cost 1 are admitted, one after the other."""
        return sum(1 for _ in itertools.takewhile(lambda _: self.acquire(key, now), range(most)))
