"""The short way to ask a server about a key that this host has no tokens of: for limits of which a
question tells no more than the native part knows. It makes the question, and takes over the answer
(csrc/leasing/question.c). The long way, of token_lease.py, is for all others, and says the same."""

from __future__ import annotations

import functools
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.states import States
from fast_litellm_shm.cluster import algorithms, names, wire
from fast_litellm_shm.cluster.connection import MOST_KEYS, Connection
from fast_litellm_shm.cluster.link import MOST
from fast_litellm_shm.cluster.outage import Decided, decided
from fast_litellm_shm.limits import FixedWindow, LimitSpec, TokenBucket

_ANSWER = struct.Struct("<6d")
_HEAD = struct.Struct("<BI")
_TAKE, _AHEAD = (algorithms.OPERATIONS[each] for each in ("take", "ahead"))
# Key, costs, the same for the native part, question.
_Begun: TypeAlias = tuple[bytes, tuple[int, ...], Any, Any]
_PARTS = 9  # of a call beside its keys


class Questions:
    """Of one limiter under these limits. asking: the permits of its single flight."""

    def __init__(
        self,
        connection: Connection,
        limiter: bytes,
        rules: Sequence[algorithms.Rule],
        states: States,
        leased: States,
        refused: States,
        asking: States,
    ) -> None:
        self._connection, self._states, self._refused = connection, states, refused
        self._asking, self._leased, self._limiter = asking, leased, limiter
        self._asked = ffi.new("fshm_asked *")
        self._asked.limits, self._asked.leases = states.handle, leased.handle
        self._asked.refused, self._asked.asking = refused.handle, asking.handle
        self._asked.count = len(rules)
        for i, each in enumerate(rules):
            self._asked.most[i] = each.n if each.kind else each.burst
            self._asked.buckets |= (each.kind == 0) << i
        self._costs = functools.lru_cache(maxsize=64)(
            functools.partial(ffi.new, ffi.typeof("uint64_t[4]"))
        )
        self._spare = deque[Any]()  # questions whose permits are not held
        self._segment = connection.segment._handle
        self._metric = connection.metric("take")
        self._size = 48 * len(rules)  # bytes of a question's numbers
        self._answer_size = 48 + 56 * len(rules)
        prefix, self._seal = connection.cluster.prefix, connection.seal
        self._start = names.start(prefix, names.RATES, limiter)
        self._hash = names.hash_of(prefix, limiter)
        self._head = wire.evalsha(algorithms.SOURCE)
        sealed = b"0" if self._seal is None else b"1"
        tail = (connection.host, connection.channel.encode(), limiter, sealed)
        self._tail = wire.bulks((*tail, algorithms.packed_limits(rules)))

    def _question(self) -> Any:
        try:
            return self._spare.pop()
        except IndexError:
            # Its end gives the permit back, where an exception strikes before.
            drop = functools.partial(lib.fshm_question_drop, self._asking.handle)
            return owned(ffi.new("fshm_question *"), drop, self._asking)

    def _drop(self, question: Any) -> None:
        lib.fshm_question_drop(self._asking.handle, question)
        self._spare.append(question)

    def _key(self, raw: bytes) -> bytes:
        """What it is called at the server, as names.state_key says."""
        hashed = self._hash.copy()
        hashed.update(raw)
        return b"%b%b}" % (self._start, hashed.hexdigest().encode())

    def _packed(self, keys: list[bytes], said: bytes) -> bytes:
        """A call for these keys, as the server reads it."""
        count = len(keys)
        return b"*%d\r\n%b$%d\r\n%d\r\n%b%b$%d\r\n%b\r\n" % (
            _PARTS + count, self._head, len(b"%d" % count), count, wire.bulks(keys),
            self._tail, len(said), said,
        )  # fmt: skip

    def _said(self, operation: int, raw: bytes, question: Any) -> bytes:
        name = raw if self._seal is None else self._seal.seal(raw)
        head = _HEAD.pack(operation, len(name))
        return b"%b%b%b" % (head, name, ffi.buffer(question.numbers, self._size))

    def _again(self, key: bytes, raw: bytes, question: Any) -> wire.Call:
        """take(), where the server may have heard it: nothing is given back twice."""
        for i in range(self._asked.count):
            question.numbers[algorithms.NUMBERS * i + algorithms.GIVEN] = 0
        packed = self._packed([key], self._said(_TAKE, raw, question))
        return wire.Call(algorithms.SOURCE, packed)

    def take(self, raw: bytes, costs: tuple[int, ...]) -> Decided | None:
        """Ask for these tokens, and a batch. None: another process asks. Raises
        UnreachableError."""
        question, numbers = self._question(), self._costs(costs)
        status = lib.fshm_question_begin(self._asked, raw, len(raw), numbers, 0, question)
        if status != lib.FSHM_ALLOWED:
            self._spare.append(question)
            return None
        try:
            key = self._key(raw)
            packed = self._packed([key], self._said(_TAKE, raw, question))
            began = time.monotonic_ns()
            again = functools.partial(self._again, key, raw, question)
            call = wire.Call(algorithms.SOURCE, packed, again)
            reply = self._connection.run_one("take", call, began, self._answer_size)
            out = ffi.new("fshm_decision *")
            lib.fshm_question_end(
                self._asked, raw, len(raw), numbers, question,
                ffi.from_buffer("double[]", reply), out,
            )  # fmt: skip
        finally:
            self._drop(question)
        admitted, batch, _, back_off, _, junk = _ANSWER.unpack_from(reply)
        most = max(costs)
        took = time.monotonic_ns() - began
        lib.fshm_metric_record(
            self._segment, self._metric, took, 1, True, most, most * _whole(admitted + batch)
        )
        if junk:
            self._connection.tell_junk(self._limiter, key)
        if not admitted:
            self._states.count(raw, lib.FSHM_DENIED)
        if back_off or not admitted:
            self._refused.refuse(raw, costs, _whole(back_off) * 1000)
        return decided(out)

    def ahead(self, due: Iterator[tuple[bytes, tuple[int, ...]]]) -> None:
        """Ask for batches of keys that this host cannot answer, many in a round trip. Raises
        UnreachableError."""
        while part := self._begin(due):
            try:
                began = time.monotonic_ns()
                size = self._answer_size
                replies = self._connection.run("ahead", self._calls(part), began, size * len(part))
                answers = ffi.from_buffer("double[]", replies)
                at = asked = granted = 0
                for raw, costs, numbers, question in part:
                    lib.fshm_question_end(
                        self._asked, raw, len(raw), numbers, question, answers + at, ffi.NULL
                    )
                    asked += costs[0]
                    granted += costs[0] * _whole(answers[at + 1])
                    if answers[at + 5]:
                        self._connection.tell_junk(self._limiter, self._key(raw))
                    at += size // 8
            finally:
                self._drop_all(part)
            self._connection.measured("ahead", began, asked, granted)

    def _begin(self, due: Iterator[tuple[bytes, tuple[int, ...]]]) -> list[_Begun]:
        begun: list[_Begun] = []
        begin, asked, allowed = lib.fshm_question_begin, self._asked, lib.FSHM_ALLOWED
        last: tuple[int, ...] = ()
        try:
            for raw, costs in due:
                if costs is not last:
                    last, numbers = costs, self._costs(costs)
                question = self._question()
                begun.append((raw, costs, numbers, question))
                if begin(asked, raw, len(raw), numbers, 1, question) != allowed:
                    self._spare.append(begun.pop()[3])
                elif len(begun) == MOST:
                    break
        except BaseException:
            self._drop_all(begun)
            raise
        return begun

    def _drop_all(self, begun: Sequence[_Begun]) -> None:
        drop, asking = lib.fshm_question_drop, self._asking.handle
        for _, _, _, question in begun:
            drop(asking, question)
            self._spare.append(question)

    def _calls(self, begun: Sequence[_Begun]) -> Iterator[wire.Call]:
        for at in range(0, len(begun), MOST_KEYS):
            part = begun[at : at + MOST_KEYS]
            keys = [self._key(raw) for raw, _, _, _ in part]
            said = b"".join([self._said(_AHEAD, raw, each) for raw, _, _, each in part])
            yield wire.Call(algorithms.SOURCE, self._packed(keys, said))


def _whole(number: float) -> int:
    """Of an answer. 0: it is none, as only a server that means harm says."""
    return int(number) if 0 <= number < 1 << 53 else 0


def of(
    connection: Connection,
    limiter: bytes,
    limits: Sequence[LimitSpec],
    rules: Sequence[algorithms.Rule],
    *handles: States,
) -> Questions | None:
    """None: the limits need the long way."""
    brief = all(
        isinstance(each, TokenBucket) or (isinstance(each, FixedWindow) and each.timezone is None)
        for each in limits
    )
    if not brief or sys.byteorder != "little":  # numbers go as they are in memory
        return None
    return Questions(connection, limiter, rules, *handles)
