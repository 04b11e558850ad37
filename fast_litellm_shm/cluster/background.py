"""The threads of a process that talk to the server unasked: batches before they run out, what calls
have used beside that, and, in the one process that leads the host, what other hosts want back."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import threading
import time
from collections.abc import Mapping
from multiprocessing import util
from typing import TYPE_CHECKING, Any, TypeVar

from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.inspection import HELD, LEASED
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.cluster import settlement
from fast_litellm_shm.cluster import connection as links
from fast_litellm_shm.cluster.heartbeat import renew
from fast_litellm_shm.cluster.hosts import host_count, keep_host_count

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.permit_lease import PermitLeases
    from fast_litellm_shm.cluster.token_lease import TokenLeases

AnyShared = TypeVar("AnyShared", bound=SharedLimits)

_BEAT = 2.0  # seconds between two heartbeats of a host
_MOST = 200  # keys in one pipeline
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

class Agent:
    """Of one link."""

    def __init__(self, link: links.Connection) -> None:
        self.link = link
        self._wallets: dict[bytes, TokenLeases] = {}  # of whatever limiter of the host
        self._leases: dict[bytes, PermitLeases] = {}
        self._due: queue.SimpleQueue[tuple[TokenLeases, bytes, tuple[int, ...]] | None]
        self._due = queue.SimpleQueue()
        link.on_lost = self.wake  # to be tried, until it is back
        self._busy = threading.Lock()

    def start(self) -> None:
        for work in (self._refill, self._lead):
            threading.Thread(
                target=work, name=f"fast-shm-cluster{work.__name__}", daemon=True
            ).start()

    # batches before they run out, and what is to be booked

    def wake(self) -> None:
        self._due.put(None)

    def refill(self, wallet: TokenLeases, raw: bytes, costs: tuple[int, ...]) -> None:
        self._due.put((wallet, raw, costs))

    def _refill(self) -> None:
        while True:
            try:
                while self.link.away is not None:
                    time.sleep(links.PROBE)
                    self._try_again()
                got = [self._due.get()]
                while len(got) < _MOST and not self._due.empty():
                    got.append(self._due.get())
                due = [each for each in got if each is not None]
                with self._busy:
                    self._tell()
                    self._ask_ahead({(id(each[0]), each[1]): each for each in due}.values())
            except links.UnreachableError:
                pass  # who finds the wallet empty goes by the policy
            except Exception:
                links._log.exception("booking, or refilling in advance, failed")

    def _try_again(self) -> None:
        while not self._due.empty():
            self._due.get()  # nothing is asked for in advance
        settlement.owe(self.link)
        self.link.probe()

    def finish(self) -> None:
        """Let nothing be lost that is on its way: a process that ends takes its threads along."""
        if self._busy.acquire(timeout=2 * self.link.cluster.timeout):
            with contextlib.suppress(links.UnreachableError):
                self._tell()

    def _tell(self) -> None:
        while booked := settlement.taken(self.link):
            settlement.tell(self.link, booked)

    def _ask_ahead(self, due: Any) -> None:
        asked = []
        try:
            for wallet, raw, costs in due:
                permit = wallet.asking.begin(raw)
                if permit is not None:  # else somebody is asking for it
                    asked.append((wallet, raw, permit, *wallet.request("ahead", raw, costs)))
            if asked:
                found = self.link.call([each[3] for each in asked])
                for (wallet, _, _, request, sent), answer in zip(asked, found, strict=True):
                    wallet.learn(request, answer, sent)
        finally:
            for wallet, _, permit, *_ in asked:
                wallet.asking.end(permit)

    # the leader of a host

    def _lead(self) -> None:
        handle, told = self.link.segment._handle, ""
        while True:
            try:
                # to wait for it in the kernel would stop all greenlets of this thread
                if lib.fshm_lead(handle, not greenlets.must_yield()) != 1:
                    time.sleep(_AGAIN)
                    continue
                self._serve()
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                outage = isinstance(error, links.UnreachableError) or links._is_outage(error)
                if said != told and not outage:  # it tries again and again
                    links._log.exception("leading this host failed")
                elif said != told and links.is_refusal(error) and self.link.away is None:
                    self.link.tell_refusal(error)
                told = said
            time.sleep(_AGAIN)

    def _serve(self) -> None:
        """Until the connection is lost."""
        client = self.link.cluster.client(timeout=max(self.link.cluster.timeout, 1.0))
        hosts_key = f"{self.link.cluster.prefix}:hosts"
        beat = client.register_script(_HOSTS)
        inbox = client.pubsub(ignore_subscribe_messages=True)
        # A host that has gone is counted for a time anyway; those that have not been heard since
        # the server was emptied must not be forgotten: each host would take their share too.
        seen = {time.monotonic(): host_count(self.link.segment)}
        try:
            inbox.subscribe(self.link.channel)
            due = 0.0
            while True:
                now = time.monotonic()
                if now >= due:
                    seen[now] = int(beat([hosts_key], [self.link.host]))
                    seen = {at: count for at, count in seen.items() if now - at < 3 * _BEAT}
                    keep_host_count(self.link.segment, max(seen.values()))
                    due = now + _BEAT * random.uniform(0.9, 1.1)
                    if self.link.away is None:
                        renew(self.link, self._leases_of)
                message = inbox.get_message(timeout=min(max(due - now, 0.0), 0.5))
                if message is not None and message["data"]:
                    self._give_back(message["data"])
        finally:
            inbox.close()
            client.close()

    def _give_back(self, data: bytes) -> None:
        try:
            kind, limiter, raw, *rest = _unpack(data)
            permits = {b"m": False, b"M": False, b"p": True, b"P": True}[kind]
            share, need = map(_whole, rest[:2]) if permits else (0, 0)
            hosts = rest[2:] if permits else rest
            sealed = dict(zip(hosts[::2], hosts[1::2], strict=True))
        except (IndexError, KeyError, ValueError):
            self.link.heard_junk()
            return
        if self.link.host in sealed and self.link.seal is not None:
            name = self.link.seal.unseal(sealed[self.link.host])
        else:
            name = None if kind.isupper() else raw  # as whoever asks calls it
        if name is None:
            return  # others are meant
        if permits:
            leases = self._leases_of(limiter)
            if leases is not None:
                leases.recalled(name, share, need)
        else:
            self._spare(limiter, name)

    def _spare(self, limiter: bytes, raw: bytes) -> None:
        wallet = self._wallet_of(limiter)
        if wallet is None:
            return
        taken, _ = wallet.look(raw, take=True)
        if any(taken):
            request, _ = wallet.request("give", raw, (0,) * len(taken), taken)
            self.link.call([request])

    # Wallets and leases have an agent, and the agent of a leader has those that others use: so it
    # imports them when it needs them.

    def _wallet_of(self, limiter: bytes) -> TokenLeases | None:
        from fast_litellm_shm.cluster.token_lease import TokenLeases

        if limiter not in self._wallets:
            # A name of a limiter that counts here alone makes no wallet: any host can tell it.
            if not self._has(limiter + HELD.encode()):
                return None
            shared = self._shared(SharedLimits, limiter)
            self._wallets[limiter] = TokenLeases(shared, self.link.cluster)
        return self._wallets[limiter]

    def _leases_of(self, limiter: bytes) -> PermitLeases | None:
        from fast_litellm_shm.cluster.permit_lease import LeasedLimits

        if limiter not in self._leases:
            if not self._has(limiter + LEASED.encode()):
                return None
            shared = self._shared(LeasedLimits, limiter)
            self._leases[limiter] = shared.join(self.link.cluster)
        return self._leases[limiter]

    def _has(self, limiter: bytes) -> bool:
        """Whether this host has a limiter of that name."""
        segment, out = self.link.segment, ffi.new("fshm_limiter **")
        if lib.fshm_limiter_find(segment._handle, limiter, len(limiter), out) != lib.FSHM_OK:
            return False
        lib.fshm_limiter_close(out[0])
        return True

    def _shared(self, kind: type[AnyShared], limiter: bytes) -> AnyShared:
        name = limiter.decode("utf-8", "surrogatepass")
        return kind((), name=name, segment=self.link.segment, on_full="deny", keep=True)


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


_agents: dict[int, Agent] = {}
_lock = threading.RLock()  # the collector may come upon a call in here that has to be booked


def ensure(link: links.Connection) -> Agent:
    """The agent of a link in this process: threads do not survive a fork, and are started anew."""
    known = _agents.get(id(link))
    if known is None:
        with _lock:
            known = _agents.get(id(link))
            if known is None:
                # Known before its threads start: meanwhile other greenlets run and come here, and
                # a lock that was made before the program was patched does not keep them out.
                known = _agents[id(link)] = Agent(link)
                try:
                    known.start()
                except BaseException:
                    del _agents[id(link)]
                    raise
                # also where a child of multiprocessing ends, which runs no atexit
                util.Finalize(None, known.finish, exitpriority=0)
    return known


def refill(wallet: TokenLeases, raw: bytes, costs: tuple[int, ...]) -> None:
    found = ensure(wallet.link)
    found.refill(wallet, raw, costs)


def fetch(wallet: TokenLeases, due: Mapping[bytes, tuple[int, ...]]) -> None:
    """As refill(), in this thread, and done when it returns; nothing while the server is away."""
    found, asked = ensure(wallet.link), list(due.items())
    try:
        for at in range(0, len(asked), _MOST):
            found._ask_ahead([(wallet, raw, costs) for raw, costs in asked[at : at + _MOST]])
    except links.UnreachableError:
        pass  # each key goes by the policy


def _forked() -> None:
    global _lock
    _lock = threading.RLock()
    _agents.clear()


os.register_at_fork(after_in_child=_forked)
