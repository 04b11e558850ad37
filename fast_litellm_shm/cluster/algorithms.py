"""Requests about rates and their answers: the arguments of algorithms.lua."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import zones
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.cluster import names
from fast_litellm_shm.limits import FixedWindow, InFlight, LimitSpec, SlidingWindow, TokenBucket

SOURCE = names.source("algorithms.lua")

_MOST_LEASE_US = 1_000_000
_LARGEST = 2**53 - 1
# Of algorithms.lua, in its order; each with its number there.
OPERATIONS = {
    name: number
    for number, name in enumerate(
        ("take", "single", "ahead", "look", "give", "charge", "fill", "refund", "block", "reset"), 1
    )
}
_LIMIT = struct.Struct("<7d")
NUMBERS, GIVEN = 6, 2  # of a limit in a question, and which of them is `given`
_NUMBERS = struct.Struct(f"<{NUMBERS}d")
_ANSWERS = [struct.Struct(f"<{6 + 7 * count}d") for count in range(lib.FSHM_MAX_LIMITS + 1)]
_HEAD = struct.Struct("<BI")
_PART = 100
CALENDAR = 3  # the kind of a Rule
COARSE = 2**20  # ns: as in csrc/limits/algorithms.h


class Rule(NamedTuple):
    """A limit, as algorithms.lua takes it: numbers below 2**53. limit: for a state file, which
    counts by the core's own arithmetic."""

    kind: int
    n: int
    per_us: int
    burst: int
    num: int
    den: int
    lease_us: int
    limit: LimitSpec


@functools.lru_cache(maxsize=1024)
def rule(limit: LimitSpec) -> Rule:
    """How the server counts a limit. Raises ValueError: it cannot."""
    found = unbounded_rule(limit)
    if found.kind != 0:
        return found
    num, den, burst = found.num, found.den, found.burst
    if den > 2**26 or num >= 2**53 or burst * (num // den + 1) >= 2**52:
        raise ValueError(
            f"{limit!r}: over many hosts, n must be at most {2**26:,} where that is more than one "
            "a millisecond, and a bucket must be full again within 52 days; a FixedWindow can "
            "count more"
        )
    return found


@functools.lru_cache(maxsize=1024)
def unbounded_rule(limit: LimitSpec) -> Rule:
    """How a grantor counts a limit.

    A bucket's tokens are leased for a second or a twentieth of ``per``, whichever is less, so that
    at most ``burst + rate * (t + lease)`` are admitted in t seconds. A strict bucket refills more
    slowly by as much: ``n`` in any ``per``, spent late or not. Windows need no lease: what was
    granted in one is over with it.
    """
    if isinstance(limit, InFlight):  # which another process has given the limiter's name
        raise exceptions.SegmentError(
            f"{limit!r} is a limit of calls in flight, which is not kept with rates: another "
            "process gave the name of this limiter to a Quota; give that another name"
        )
    per = limit._per_ns
    if isinstance(limit, FixedWindow) and limit.timezone is not None:
        return Rule(CALENDAR, limit.n, per // 1000, 0, 0, 0, 0, limit)
    if not isinstance(limit, TokenBucket):
        kind = 2 if isinstance(limit, SlidingWindow) else 1
        return Rule(kind, limit.n, -(-per // 1000), 0, 1, 1, 0, limit)
    lease_us = min(_MOST_LEASE_US, per // 20_000)
    if limit.strict:
        per, slots = per + lease_us * 1000, limit.n - limit.burst + 1
    else:
        slots = limit.n
    num, den = per + limit.strict, slots
    if per // slots >= COARSE or (not limit.strict and per % slots == 0):
        num, den = (per // slots + 1 if limit.strict else -(-per // slots)), 1
    per_us = -(-limit._per_ns // 1000)
    return Rule(0, limit.n, per_us, limit.burst, num, den, lease_us, limit)


def most_leased(limit: LimitSpec) -> int:
    """Tokens of a limit that a state file has leased at most, for a key: a hundredth, and one."""
    return max(limit.n // _PART, 1)


def dated(each: Rule, limit: LimitSpec, minute: int) -> Rule:
    """With the ends of three windows of the calendar, as of this minute since 1970. The server's
    clock may be behind by an hour, or ahead by a window."""
    if each.kind != CALENDAR or not isinstance(limit, FixedWindow) or limit.timezone is None:
        return each
    known = () if limit.timezone == zones.UTC else zones.spans(limit.timezone)
    words, ends, at = ffi.new("uint64_t[]", known or (0,)), [], minute - 60
    for _ in range(3):
        at = int(lib.fshm_calendar_end(limit._per_ns, words, len(known), at))
        ends.append(at * 60_000_000)
    return each._replace(burst=ends[0], num=ends[1], den=ends[2])


def packed_limits(rules: Sequence[Rule]) -> bytes:
    return b"".join([_LIMIT.pack(*each[:7]) for each in rules])


class Request(NamedTuple):
    """One call of the script. Each sequence has a number for each limit."""

    operation: str
    limiter: bytes
    key: bytes
    rules: Sequence[Rule]
    costs: Sequence[int]
    kept: Sequence[int]
    given: Sequence[int]
    used: Sequence[int]
    previous: Sequence[int]  # of a sliding window; `used` has the present one alone
    left: Sequence[int]  # us; of a bucket ns; of a refund: which window, as Known.window says
    at: bytes | None = None  # the server's key, where `key` is not known

    @property
    def source(self) -> str:
        return SOURCE

    def again(self) -> Request:
        """What is asked in its place where the server may have heard it, and the reply is lost.
        Nothing is given back twice: what was not heard the first time stays used."""
        none = (0,) * len(self.rules)
        if self.operation in ("refund", "give"):
            return self._replace(
                operation="look", costs=none, given=none, used=none, previous=none, left=none
            )
        return self._replace(given=none) if any(self.given) else self

    @property
    def asked(self) -> int:
        """Tokens, asked for or given back: for the metrics."""
        return max(self.costs) + max(self.given)

    def granted(self, found: Answer) -> int:
        if self.operation not in ("take", "single", "ahead"):
            return 0
        return max(self.costs) * (found.admitted * (self.operation != "ahead") + found.batch)

    def limits(self) -> bytes:
        """As the script takes them; many requests of a call have them in common."""
        return packed_limits(self.rules)

    def question(self, name: bytes) -> bytes:
        """As the script takes it. name: the key's, which may be sealed."""
        head = _HEAD.pack(OPERATIONS[self.operation], len(name))
        columns = self.costs, self.kept, self.given, self.used, self.previous, self.left
        numbers = [
            _NUMBERS.pack(min(cost, 2**52), kept, given, used, previous, min(left, _LARGEST))
            for _, cost, kept, given, used, previous, left in zip(
                self.rules, *columns, strict=False
            )
        ]
        return b"".join([head, name, *numbers])

    @property
    def answer_size(self) -> int:
        """Bytes of its answer."""
        return _ANSWERS[len(self.rules)].size

    def answer(self, raw: bytes, at: int = 0) -> Answer:
        """at: where it begins."""
        numbers = _ANSWERS[len(self.rules)].unpack_from(raw, at)
        admitted, batch, wait, back_off, refused, junk, *rest = map(int, numbers)
        known = []
        for i, each in enumerate(self.rules):
            used, left, lease, redated, current, previous, window = rest[7 * i : 7 * i + 7]
            left_ns = left if each.kind == 0 else left * 1000
            counts = current, previous
            known.append(Known(used, left_ns, lease * 1000, bool(redated), *counts, window))
        retry = -1 if wait < 0 else wait * 1000
        return Answer(
            bool(admitted), batch, retry, back_off * 1000, refused, tuple(known), bool(junk)
        )

    def state_key(self, prefix: str) -> bytes:
        return self.at or names.state_key(prefix, names.RATES, self.limiter, self.key)


class Known(NamedTuple):
    """What the server says of the state of one limit."""

    used: int  # tokens
    left_ns: int
    lease_ns: int
    redated: bool
    current: int = 0  # of a sliding window: what was consumed in it, and in the one before
    previous: int = 0
    window: int = 0  # its name, for a refund; 0: a bucket, or nothing is used


class Answer(NamedTuple):
    """``batch``: how many times the cost was granted beyond it. ``junk``: the value at the server
    was not ours, so the key counts as used up."""

    admitted: bool
    batch: int
    retry_after_ns: int  # -1: never
    back_off_ns: int
    refused: int
    limits: tuple[Known, ...]
    junk: bool = False
