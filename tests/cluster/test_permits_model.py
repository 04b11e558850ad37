"""permits.lua at given times: hosts that use all that they may, and messages that are late, lost,
sent twice or overtaken. What they could hold together never exceeds n."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from support import servers

from fast_litellm_shm.cluster import permits

S = 1_000_000  # us
_TTL, _USED = 10 * S, 8 * S
_count = itertools.count()


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    for kind in servers.KINDS:
        if servers.installed(kind):
            with servers.Server(kind) as server:
                yield Script(server.client())
            return
    pytest.skip("there is neither redis-server nor valkey-server here")


@dataclass(frozen=True)
class Word:
    """A host's permit lease (csrc/leasing/permit_lease.h): two are the same, or one is newer."""

    end: int  # us
    leased: int = 0
    dirty: bool = False

    @property
    def packed(self) -> int:
        """Numbers that order as csrc's do."""
        return self.end << 18 | 2 * (self.leased + 1) + (not self.dirty)


@dataclass(frozen=True)
class Message:
    host: int
    word: Word
    sent: int
    reported: int
    want: int
    n: int


class Script:
    """permits.lua, told what time it is."""

    def __init__(self, client: Any) -> None:
        source = permits.SOURCE.replace("redis.call('TIME')", "{ARGV[#ARGV - 1], ARGV[#ARGV]}")
        assert source != permits.SOURCE
        self._client, self._script = client, client.register_script(source)
        self._look = client.register_script(
            "local s = redis.call('GET', KEYS[1]) if not s then return '{}' end "
            "return cjson.encode(cmsgpack.unpack(s).h)"
        )

    def __call__(self, at: int, key: bytes, message: Message) -> permits.Answer:
        request = self._request(key, message)
        head = [b"host %d" % message.host, "channel", request.limiter, 0, key]
        arguments = [*head, *request.arguments(), at // S, at % S]
        raw = self._script([request.state_key("t")], arguments)
        return request.answer(raw)

    def records(self, at: int, key: bytes) -> dict[int, int]:
        """What the server counts for each host now."""
        name = self._request(key, Message(0, Word(0), 0, 0, 0, 1)).state_key("t")
        found = dict(json.loads(self._look([name])) or {})
        return {int(k.split()[1]): int(h["a"]) for k, h in found.items() if h["t"] > at}

    def forget(self, key: bytes) -> None:
        self._client.delete(self._request(key, Message(0, Word(0), 0, 0, 0, 1)).state_key("t"))

    @staticmethod
    def _request(key: bytes, m: Message) -> permits.Request:
        return permits.Request(b"l", key, m.n, m.word.packed, m.reported, m.want)


@dataclass
class Host:
    """Of csrc: the word, and how many are held. Everything else is in messages under way."""

    word: Word
    held: int = 0

    def leased(self, at: int) -> int:
        return self.word.leased if at < self.word.end else 0

    def could_hold(self, at: int) -> int:
        return max(self.leased(at), self.held)


@dataclass
class World:
    script: Script
    n: int
    seed: int
    hosts: list[Host] = field(default_factory=list)
    at: int = 10**11
    ahead: int = 0  # of the server's clock

    def __post_init__(self) -> None:
        self.chance, self.key = random.Random(self.seed), b"key %d" % next(_count)
        self.hosts = [Host(Word(self.at - 1)) for _ in range(self.chance.choice((2, 3, 4)))]
        self.questions: list[Message] = []
        self.answers: list[tuple[Message, permits.Answer]] = []
        self.cut_off: set[int] = set()  # hosts that nobody counts, with permits in flight
        self.lapsed = False  # there was one
        self.granted = 0

    # what a host does

    def open(self, i: int) -> None:
        """A word that is over may be forgotten with its cell. The next is a later one."""
        host = self.hosts[i]
        if self.at >= host.word.end and self.chance.random() < 0.5:
            host.word = Word(self.at + 4 * S)

    def take(self, i: int) -> None:
        host = self.hosts[i]
        if host.held < host.leased(self.at):
            host.held += 1

    def release(self, i: int) -> None:
        host = self.hosts[i]
        host.held -= host.held > 0

    def ask(self, i: int, want: int) -> None:
        self.open(i)
        host = self.hosts[i]
        reported = host.could_hold(self.at)
        self.questions.append(Message(i, host.word, self.at, reported, want, self.n))

    def lower(self, i: int) -> None:
        host = self.hosts[i]
        to = self.chance.randint(0, host.word.leased)
        if to < host.word.leased:
            host.word = replace(host.word, leased=to, dirty=True)
        self.ask(i, 0)

    # what the network does: any message at any time, more than once, or never

    def arrive(self) -> None:
        if self.questions:
            i = self.chance.randrange(len(self.questions))
            message = self.questions[i]
            if self.chance.random() < 0.9:
                self.questions.pop(i)  # else it comes once more
            found = self.deliver(message)
            if self.chance.random() < 0.9:
                self.answers.append((message, found))

    def answered(self) -> None:
        if self.answers:
            i = self.chance.randrange(len(self.answers))
            self.put(*self.answers[i])
            if self.chance.random() < 0.9:
                self.answers.pop(i)

    def talk(self, i: int, want: int) -> None:
        """Without delay."""
        self.ask(i, want)
        message = self.questions.pop()
        self.put(message, self.deliver(message))

    def deliver(self, message: Message) -> permits.Answer:
        found = self.script(self.at + self.ahead, self.key, message)
        host = self.hosts[message.host]
        if (
            found.known
            and message.word == host.word
            and message.reported >= host.could_hold(self.at)
        ):
            self.cut_off.discard(message.host)  # the server knows how things are
        return found

    def put(self, message: Message, found: permits.Answer) -> None:
        host, end = self.hosts[message.host], message.sent + _USED
        if not found.known or host.word != message.word or end <= host.word.end:
            return
        # A host may put in less than it was given.
        less = self.chance.randint(0, found.leased) if self.chance.random() < 0.2 else 10**6
        host.word = Word(end, min(found.leased, less), self.chance.random() < 0.5)
        self.granted += message.want > 0 and host.leased(self.at) > message.reported

    def lose(self) -> None:
        if self.questions and self.chance.random() < 0.3:
            self.questions.pop(self.chance.randrange(len(self.questions)))

    # what must hold

    def check(self) -> None:
        records = self.script.records(self.at + self.ahead, self.key)
        for i, host in enumerate(self.hosts):
            if i not in records:
                assert host.leased(self.at) == 0, (i, host)
                if host.held:
                    self.cut_off.add(i)
            else:
                counted = host.could_hold(self.at) <= records[i]
                assert counted or i in self.cut_off, (i, host, records)
        self.lapsed |= bool(self.cut_off)
        if not self.lapsed:
            assert sum(host.could_hold(self.at) for host in self.hosts) <= self.n
        assert sum(host.leased(self.at) for host in self.hosts) <= self.n

    def step(self, longest: int, heartbeats: bool = True) -> None:
        i = self.chance.randrange(len(self.hosts))
        steps: list[Callable[[], object]] = [
            lambda: self.ask(i, 1), lambda: self.ask(i, 0), lambda: self.ask(i, 3),
            lambda: self.lower(i), lambda: self.take(i), lambda: self.take(i),
            lambda: self.take(i), lambda: self.release(i), self.arrive, self.arrive,
            self.arrive, self.answered, self.answered, self.answered, self.lose,
            lambda: self.talk(i, 1), lambda: self.talk(i, 1), lambda: self.talk(i, 0),
        ]  # fmt: skip
        what = self.chance.choice(steps)
        self.at += self.chance.choice((0, 1, 300, self.chance.randint(0, longest)))
        self.check()
        what()
        self.check()
        for k, host in enumerate(self.hosts):
            if heartbeats and host.word.end < self.at + 5 * S and host.could_hold(self.at):
                self.talk(k, 0)
                self.check()


@pytest.mark.parametrize("longest", [S // 100, S], ids=["fast", "slow"])
@pytest.mark.parametrize("seed", range(8))
def test_hosts_never_hold_more_than_n(script: Script, longest: int, seed: int) -> None:
    world = World(script, random.Random(seed).choice((1, 2, 5, 17)), seed)
    for _ in range(900):
        world.step(longest)
    assert not world.lapsed
    assert world.granted > 0


@pytest.mark.parametrize("seed", range(8))
def test_hosts_that_are_cut_off(script: Script, seed: int) -> None:
    """Without heartbeats, and with questions that come long after. What such a host holds is not
    known; what hosts are allowed is never more than n all the same, and it is counted again."""
    world = World(script, random.Random(seed).choice((1, 2, 5, 17)), seed)
    for _ in range(900):
        world.step(6 * S, heartbeats=False)
        if world.chance.random() < 0.01:
            world.at += 10 * S
    assert world.lapsed
    for host in range(len(world.hosts)):
        world.open(host)
        world.talk(host, 0)
    world.check()
    assert not world.cut_off


@pytest.mark.parametrize("back", [0, 1, 100 * S])
def test_a_vanished_host_gives_back_in_time(script: Script, back: int) -> None:
    """Also where the server's clock jumps back meanwhile."""
    world = World(script, 5, 1, ahead=10**10)
    while world.hosts[0].word.leased < 5:
        world.talk(0, 5)
        world.at += 1
    world.ahead -= back
    world.talk(1, 1)
    world.at += _TTL - 2 * S
    world.talk(1, 1)
    assert world.hosts[1].word.leased == 0
    world.at += 2 * S
    world.talk(1, 1)
    assert world.hosts[1].word.leased >= 1


def test_a_clock_that_jumps_back_lets_nobody_hold_more(script: Script) -> None:
    for seed in range(6):
        world = World(script, 5, 100 + seed, ahead=10**10)
        for k in range(500):
            world.step(S // 10)
            if k % 100 == 50:
                world.ahead -= world.chance.choice((1, S, 100 * S))
        assert not world.lapsed


def test_who_waits_comes_first_up_to_a_fair_share(script: Script) -> None:
    """One host has all of them, and takes each one back that is released: the other, refused, gets
    the next."""
    world = World(script, 10, 1)
    busy = world.hosts[0]
    while busy.word.leased < 10:
        world.talk(0, 10)
        world.at += 1
    busy.held = 10
    world.talk(1, 1)
    assert world.hosts[1].word.leased == 0
    busy.word, busy.held = replace(busy.word, leased=9, dirty=True), 9
    world.at += 1
    world.talk(0, 1)
    assert busy.leased(world.at) == 9
    world.at += 60_000
    world.talk(1, 1)
    assert world.hosts[1].word.leased == 1


def test_all_of_them_are_granted(script: Script) -> None:
    for n in (1, 2, 7, 100, 100_000):
        world = World(script, n, 3)
        found = 0
        for k in itertools.count():
            world.talk(k % len(world.hosts), 1)
            for host in world.hosts:
                host.held = host.word.leased
            world.at += 1000
            before, found = found, sum(host.held for host in world.hosts)
            if found == n or (found == before and k % len(world.hosts) == 0 and k > 10_000):
                break
        assert found == n
        assert n < 1000 or k < n // 50  # in batches
