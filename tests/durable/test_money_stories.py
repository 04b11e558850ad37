"""Stories of a durable budget against a sequential model: calls, additions, changes, clean stops
and power cuts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.names import remove, unique_name
from support.reboots import Host, books_of

from fast_litellm_shm import Budget
from fast_litellm_shm.durable import StateFile
from fast_litellm_shm.durable.books import Books, Tending
from fast_litellm_shm.limiters.budget import Reservation
from fast_litellm_shm.limits import dollars

DAY = 86_400
KEYS = ("a", "b")
LIMITS = [10**9, 10**10, 55 * 10**9]  # nano-dollars
AHEAD = 4 * 10**9
_numbers = itertools.count()
_key, _amount = st.sampled_from(KEYS), st.integers(0, 3 * 10**9)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), _key, _amount),
        st.tuples(st.just("reserve"), _key, st.integers(1, 10**7)),
        st.tuples(st.just("settle"), _key, _amount),
        st.tuples(st.just("release"), _key, st.just(0)),
        st.tuples(st.sampled_from(("charge", "refund")), _key, _amount),
        st.tuples(st.just("add"), _key, st.integers(-2 * 10**9, 4 * 10**9)),
        st.tuples(st.just("reset"), _key, st.just(0)),
        st.tuples(st.just("change"), st.just(""), st.integers(0, 2)),
        st.tuples(
            st.sampled_from(("save", "stop", "cut", "remove", "day")), st.just(""), st.just(0)
        ),
    ),
    max_size=40,
)  # fmt: skip


@dataclass
class Of:
    """What is so of a key: least and most that may count as spent."""

    least: int = 0
    most: int = 0
    added: int = 0
    # What a removed segment had leased: who still has it gives it back at a stop, unless another
    # segment has taken the key over.
    back: int = 0
    held: list[tuple[Reservation, int]] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        return sum(amount for _, amount in self.held)


class Story:
    def __init__(self, host: Host) -> None:
        self.host, self.at, self.of = host, 1, {key: Of() for key in KEYS}
        self.budget = self._made()

    @property
    def limit(self) -> int:
        return LIMITS[self.at]

    def _made(self) -> Budget:
        made = Budget(
            dollars(self.limit), "day", name="team", segment=self.host.segment,
            durable=StateFile(self.host.folder),
        )  # fmt: skip
        self.host.links.append(books_of(made).link)
        self.instance = self.host.segment.geometry().instance
        return made

    def step(self, what: str, key: str, number: int) -> None:
        of = self.of.get(key, Of())
        if what in ("stop", "cut", "remove", "day"):
            self._end(what)
        else:
            getattr(self, f"_{what}")(of, key, number)
        if what in ("charge", "refund", "add", "reset") or (what == "reserve" and number):
            of.back = 0
        for name, of in self.of.items():
            usage = self.budget.usage(name)
            spent = int(usage.spent * 10**9)
            assert of.least <= spent <= of.most, (name, of, usage)
            assert int(usage.limit * 10**9) == self.limit + of.added
            of.least = of.most = spent  # as this segment has it from now on
            assert int(usage.reserved * 10**9) == of.reserved

    def _reserve(self, of: Of, key: str, number: int) -> None:
        found = self.budget.reserve(key, dollars(number))
        used = of.most + of.reserved + number
        assert bool(found) == (used <= self.limit + of.added), (used, number)
        if found:
            of.held.append((found, number))

    def _settle(self, of: Of, _: str, number: int) -> None:
        if of.held:
            held, _amount = of.held.pop()
            held.settle(dollars(number))
            of.least, of.most = of.least + number, of.most + number

    def _release(self, of: Of, *_: Any) -> None:
        if of.held:
            of.held.pop()[0].release()

    def _charge(self, of: Of, key: str, number: int) -> None:
        self.budget.charge(key, dollars(number))
        of.least, of.most = of.least + number, of.most + number

    def _refund(self, of: Of, key: str, number: int) -> None:
        self.budget.refund(key, dollars(number))
        of.least, of.most = max(of.least - number, 0), max(of.most - number, 0)

    def _add(self, of: Of, key: str, number: int) -> None:
        self.budget.add(key, dollars(number) if number >= 0 else -dollars(-number))
        of.added = max(of.added + number, 0)

    def _reset(self, of: Of, key: str, _: int) -> None:
        if not of.held:  # what is reserved is not forgotten by those that hold it
            self.budget.reset(key)
            of.least = of.most = of.added = 0

    def _change(self, _of: Of, _: str, number: int) -> None:
        self.at = number
        self.budget = self._made()

    def _save(self, *_: Any) -> None:
        books_of(self.budget).link.save()

    def _end(self, what: str) -> None:
        for of in self.of.values():
            # What is reserved, and a lease: a hundredth, or what a call had left over.
            of.most += of.reserved + (0 if what == "stop" else AHEAD)
            of.least += of.reserved
            if what == "stop":
                of.least = max(of.least - of.back, 0)
            of.back = of.back + of.reserved + AHEAD if what == "remove" else 0
            if what == "day":
                of.least = of.most = of.added = 0
        held = [of.held for of in self.of.values()]
        for of in self.of.values():
            of.held = []
        if what == "stop":
            self.host.reboot(1)
        elif what == "remove":
            self.host.remove_segment()
        else:
            self.host.lose_power(DAY if what == "day" else 1)
        self.budget = self._made()
        del held  # of a segment that is gone


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_stories(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    folder, name = tmp_path_factory.mktemp("state"), unique_name(f"money{next(_numbers)}")
    with pytest.MonkeyPatch.context() as patch:
        stories: list[Story] = []

        def at_once(_: Tending, books: Any, budget: Any, raw: bytes) -> None:
            books.give_back(budget, raw)

        tend = Books.tend

        def of_this_segment(self: Books, *given: Any) -> None:
            if self._mine == str(stories[-1].instance):
                tend(self, *given)

        patch.setattr(Books, "tend", of_this_segment)
        patch.setattr(Tending, "later", at_once)
        try:
            with Host(name, str(folder), patch) as host:
                stories.append(story := Story(host))
                for each in steps:
                    story.step(*each)
        finally:
            remove(name)
