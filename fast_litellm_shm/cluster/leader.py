"""The leader of a host: one process, which sends the host's heartbeat, gives back what other hosts
want, and reports permits that the processes that hold them have not reported."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.inspection import held_permits, is_cut, limiters_in, stored_name
from fast_litellm_shm._shared.named_limiter import InnerLimits
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.side_limiters import (
    PERMIT_LEASES,
    TOKEN_LEASES,
    has_leases,
    is_planned,
)
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.budget_lease import BudgetLeases
from fast_litellm_shm.cluster.connection import Connection, is_outage, is_refusal
from fast_litellm_shm.cluster.hosts import host_count, keep_host_count
from fast_litellm_shm.cluster.link import UnreachableError, log
from fast_litellm_shm.cluster.permit_lease import PermitLeases
from fast_litellm_shm.cluster.token_lease import TokenLeases

AnyLeases = TypeVar("AnyLeases", TokenLeases, PermitLeases)

_HEARTBEAT = 2.0  # seconds between two heartbeats of a host

_AGAIN = 0.5  # seconds after an error
_HOST_FORGOTTEN_US = 10_000_000

# Heartbeat: the hosts, by the server's clock. Answers how many there are.
_HOSTS = f"""
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local added = redis.pcall('ZADD', KEYS[1], now, ARGV[1])
if type(added) == 'table' then -- a value of another type, which no host of ours wrote
  if not string.find(added.err or '', 'WRONGTYPE') then return added end
  redis.call('PEXPIRE', KEYS[1], 0)
  redis.call('ZADD', KEYS[1], now, ARGV[1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - {_HOST_FORGOTTEN_US})
-- the clock went back, or it is junk; (in '..' a number is cut to 14 digits)
redis.call('ZREMRANGEBYSCORE', KEYS[1], string.format('(%.0f', now), '+inf')
redis.call('PEXPIRE', KEYS[1], {_HOST_FORGOTTEN_US // 1000})
return redis.call('ZCARD', KEYS[1])
"""


def lead(connection: Connection) -> None:
    """For a thread of its own: lead this host, or be ready to."""
    leader, logged = Leader(connection), ""
    while not connection.closed:
        try:
            # to wait for it in the kernel would stop all greenlets of this thread
            if lib.fshm_lead(connection.segment._handle, not greenlets.must_yield()) != 1:
                time.sleep(_AGAIN)
                continue
            leader.serve()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            outage = isinstance(error, UnreachableError) or is_outage(error)
            if text != logged and not outage:  # it tries again and again
                log.exception("leading this host failed")
            elif text != logged and is_refusal(error) and connection.outage is None:
                connection.tell_refusal(error)
            logged = text
        time.sleep(_AGAIN)


class Leader:
    """Of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._segment = connection, connection.segment
        self._known: dict[Any, Any] = {}  # leases of limiters of any process of the host

    def serve(self) -> None:
        """Until the connection is lost."""
        cluster = self._connection.cluster
        client = cluster.client(timeout=max(cluster.timeout, 1.0))
        hosts_key = f"{cluster.prefix}:hosts"
        heartbeat = client.register_script(_HOSTS)
        inbox = client.pubsub(ignore_subscribe_messages=True)
        # A host that has gone is counted for a time anyway. Hosts that have sent no heartbeat since
        # the server was emptied must be counted too: else each host would take their share.
        seen = {time.monotonic(): host_count(self._segment)}
        try:
            inbox.subscribe(self._connection.channel)
            due = 0.0
            while not self._connection.closed:
                now = time.monotonic()
                if now >= due:
                    seen[now] = int(heartbeat([hosts_key], [self._connection.host]))
                    seen = {at: count for at, count in seen.items() if now - at < 3 * _HEARTBEAT}
                    keep_host_count(self._segment, max(seen.values()))
                    due = now + _HEARTBEAT * random.uniform(0.9, 1.1)
                    if self._connection.outage is None:
                        self._report_overdue()
                message = inbox.get_message(timeout=min(max(due - now, 0.0), 0.5))
                if message is not None and message["data"]:
                    self._give_back(message["data"])
        finally:
            inbox.close()
            client.close()

    def _give_back(self, data: bytes) -> None:
        connection = self._connection
        try:
            kind, limiter, raw, *rest = _unpack(data)
            numbers = {b"m": 0, b"p": 2, b"b": 1}[kind.lower()]
            said, hosts = [_whole(each) for each in rest[:numbers]], rest[numbers:]
            if len(said) < numbers:
                raise ValueError("a number is missing")
            sealed = dict(zip(hosts[::2], hosts[1::2], strict=True))
        except (IndexError, KeyError, ValueError):
            connection.note_junk_message()
            return
        if connection.host in sealed and connection.seal is not None:
            name = connection.seal.unseal(sealed[connection.host])
        else:
            name = None if kind.isupper() else raw  # the key as the sender calls it
        if name is None:
            return  # it is for other hosts
        if numbers == 2:
            leases = self._leases_of(PermitLeases, limiter)
            if leases is not None:
                leases.recalled(name, *said)
        elif numbers:
            self._give_back_money(limiter, name, *said)
        else:
            self._give_back_tokens(limiter, name)

    def _give_back_money(self, budget: bytes, raw: bytes, window: int) -> None:
        """window: its end; 0: another host has reset the key. That is for budgets of this process,
        of which is known that the server keeps them: any host can name any."""
        if not window:
            if (mine := self._connection.budgets.get(budget)) is not None:
                mine.tell(raw)
            return
        leases = self._connection.budgets.get(budget) or self._known.get(budget)
        if leases is None and (handle := _money_limiter(self._segment, budget)) is not None:
            name = budget.decode("utf-8", "surrogatepass")
            leases = BudgetLeases(handle, name, self._segment, self._connection)
            self._known[budget] = leases
        if leases is None:
            return
        with self._reporting():
            given = leases.withdrawn(raw, window)
            if given is not None:
                self._connection.call([given])

    def _give_back_tokens(self, limiter: bytes, raw: bytes) -> None:
        leases = self._leases_of(TokenLeases, limiter)
        if leases is None:
            return
        with self._reporting():
            taken, _ = leases.look(raw, take=True)
            if any(taken):
                request, _ = leases.request("give", raw, (0,) * len(taken), taken)
                self._connection.call([request])

    def _reporting(self) -> threading.Lock:
        """To be held from taking out of the segment to telling the server: a process that ends
        waits for it. Else what was taken would be in neither."""
        return self._connection.ensure(Background).reporting

    def _report_overdue(self) -> None:
        """Permits that are held here and were not reported for long. What the host may hold is
        looked at as always; where a key's name is not kept, or is wrong, nothing is found."""
        late = []
        for limiter, raw in _keys_in_flight(self._segment):
            leases = self._leases_of(PermitLeases, limiter)
            if leases is not None and (found := leases.overdue(raw)) is not None:
                late.append((leases, *found))
        self._connection.call_all(late)

    def _leases_of(self, kind: type[AnyLeases], limiter: bytes) -> AnyLeases | None:
        """None: the limiter counts on this host alone, or is not there. Any host can name it."""
        known: AnyLeases | None = self._known.get((kind, limiter))
        suffix = TOKEN_LEASES if kind is TokenLeases else PERMIT_LEASES
        if known is None and is_planned(self._segment, limiter):
            return self._connection.planned.get(limiter)  # None: no process of ours knows its plans
        if known is None and has_leases(self._segment, limiter, suffix):
            name = limiter.decode("utf-8", "surrogatepass")
            limits = InnerLimits((), name=name, segment=self._segment, on_full="deny", keep=True)
            known = self._known[kind, limiter] = kind(limits, self._connection)
        return known


def _money_limiter(segment: Segment, name: bytes) -> Any:
    """None: there is no budget of that name."""
    out, four, version = (
        ffi.new("fshm_limiter **"), ffi.new("fshm_limit[4]"), ffi.new("uint64_t *"),
    )  # fmt: skip
    if lib.fshm_limiter_find(segment._handle, name, len(name), out) != lib.FSHM_OK:
        return None
    handle = owned(out[0], lib.fshm_limiter_close, segment._handle)
    found = lib.fshm_limiter_limits(handle, four, version)
    return handle if found == 4 and four[0].kind == lib.FSHM_MONEY else None


def _keys_in_flight(segment: Segment) -> Iterator[tuple[bytes, bytes]]:
    """Limiters whose permits a server grants, and their keys with some in flight."""
    names = {index: name for index, name, _ in limiters_in(segment)}
    leased = {
        index: name
        for index, name in names.items()
        if name + PERMIT_LEASES.encode() in names.values()
    }
    if not leased:
        return
    seen = set()
    for slot, permit in held_permits(segment):
        key = permit.limiter, permit.key_hash
        if permit.limiter not in leased or not permit.alive or key in seen:
            continue
        name = stored_name(segment, slot)
        if name is not None and not is_cut(*name):
            seen.add(key)
            yield leased[permit.limiter], name[1]


def _unpack(data: bytes) -> list[bytes]:
    """An array of strings, as cmsgpack packs it. Raises IndexError, KeyError or ValueError: it is
    something else."""
    head = data[0]
    if head & 0xF0 == 0x90:
        count, at = head & 15, 1
    else:
        size = {0xDC: 2, 0xDD: 4}[head]
        count, at = int.from_bytes(data[1 : 1 + size], "big"), 1 + size
    out: list[bytes] = []
    while len(out) < count:
        head = data[at]
        if head & 0xE0 == 0xA0:
            size, skip = head & 31, 1
        else:
            skip = {0xD9: 2, 0xDA: 3, 0xDB: 5}[head]
            size = int.from_bytes(data[at + 1 : at + skip], "big")
        out.append(data[at + skip : at + skip + size])
        at += skip + size
    if at != len(data):  # also where the last one is cut
        raise ValueError("there is more, or less")
    return out


def _whole(text: bytes) -> int:
    if not text.isdigit() or len(text) > 10:
        raise ValueError("no number of permits")
    return int(text)
