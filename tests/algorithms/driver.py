"""The C API as these tests call it: one key, explicit times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import ffi, lib

BUCKET, WINDOW, SLIDING = lib.FSHM_BUCKET, lib.FSHM_WINDOW, lib.FSHM_SLIDING
NEVER = lib.FSHM_NEVER
LATEST = (1 << 57) - 2

_count = itertools.count()


@dataclass(frozen=True)
class Rule:
    kind: int
    n: int
    per: int  # ns
    burst: int = 0
    strict: bool = False

    def raw(self) -> tuple[int, int, int, int, int]:
        return self.n, self.per, self.burst, self.kind, self.strict


class OneKey:
    """One key of one limiter. A new key for each instance, so that examples do not meet."""

    def __init__(self, segment: Segment, *rules: Rule) -> None:
        self._segment = segment
        self._key = b"key %d" % next(_count)
        self.change(*rules)

    def change(self, *rules: Rule, now: int = 1) -> None:
        out = ffi.new("fshm_limiter **")
        raw = ffi.new("fshm_limit[]", [rule.raw() for rule in rules])
        status = lib.fshm_limiter_open_at(
            self._segment._handle, b"limiter", 7, raw, len(rules), now, out
        )
        assert status == lib.FSHM_OK, (status, rules)
        self._limiter = ffi.gc(out[0], lib.fshm_limiter_close)
        self._count = len(rules)

    def apply(self, op: int, now: int, costs: int | tuple[int, ...], max_wait: int = 0) -> Any:
        assert 0 < now <= LATEST
        each = (costs,) * self._count if isinstance(costs, int) else costs
        raw = ffi.new("uint64_t[4]", list(each))
        d = ffi.new("fshm_decision *")
        lib.fshm_apply(self._limiter, op, self._key, len(self._key), raw, max_wait, now, d)
        assert d.status in (lib.FSHM_ALLOWED, lib.FSHM_DENIED), d.status
        return d

    def acquire(self, now: int, costs: int | tuple[int, ...] = 1) -> bool:
        return bool(self.apply(lib.FSHM_ACQUIRE, now, costs).status)

    def peek(self, now: int, costs: int | tuple[int, ...] = 1) -> Any:
        return self.apply(lib.FSHM_PEEK, now, costs)

    def charge(self, now: int, costs: int | tuple[int, ...]) -> Any:
        return self.apply(lib.FSHM_CHARGE, now, costs)

    def refund(self, now: int, costs: int | tuple[int, ...]) -> Any:
        return self.apply(lib.FSHM_REFUND, now, costs)

    def block(self, now: int, ns: int) -> Any:
        return self.apply(lib.FSHM_BLOCK, now, ns)

    def reserve(self, now: int, costs: int | tuple[int, ...], max_wait: int) -> Any:
        return self.apply(lib.FSHM_RESERVE, now, costs, max_wait)

    def remaining(self, now: int) -> list[int]:
        out = ffi.new("uint64_t[4]")
        got = lib.fshm_remaining(self._limiter, self._key, len(self._key), now, out)
        return [int(v) for v in out[0:got]]
