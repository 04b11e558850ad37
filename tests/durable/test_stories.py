"""Stories of calls, changes and reboots, against a sequential model that counts tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.names import remove, unique_name
from support.reboots import Host, leases_of

from fast_litellm_shm import FixedWindow, RateLimiter, SlidingWindow
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.limits import LimitSpec

DAY = 86_400
LONG = 1500 * DAY  # after that nothing counts, debt or not
WINDOWS = [FixedWindow(n, per=DAY) for n in (1, 7, 40, 250, 1000)]
SLIDING = [SlidingWindow(n, per=DAY) for n in (7, 200)]
CALENDAR = [
    FixedWindow(7, per="month", timezone="Europe/Berlin"), FixedWindow(200, per="day"),
    FixedWindow(1000, per="week", timezone="Asia/Tokyo"), FixedWindow(40, per=DAY),
]  # fmt: skip
KEYS = ("a", "b")
_numbers = itertools.count()

_key, _cost = st.sampled_from(KEYS), st.integers(0, 60)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), _key, _cost),
        st.tuples(st.just("acquire"), _key, st.just(1)),
        st.tuples(st.just("refund"), _key, _cost),
        st.tuples(st.just("settle"), _key, st.integers(-30, 30)),
        st.tuples(st.just("reset"), _key, st.just(0)),
        st.tuples(st.just("change"), st.just(""), st.integers(0, 4)),
        st.tuples(st.sampled_from(("save", "stop", "cut", "remove")), st.just(""), st.just(0)),
        st.tuples(st.just("wait"), st.just(""), st.just(0)),
    ),
    max_size=40,
)  # fmt: skip


@dataclass
class Model:
    """What is used of each key. lost: of it, what power cuts have cost."""

    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KEYS, 0))

    def acquire(self, key: str, cost: int, n: int) -> bool:
        fits = self.used[key] + cost <= n or cost == 0
        self.used[key] += cost * fits
        return fits

    def give_back(self, key: str, tokens: int) -> None:
        self.used[key] = max(self.used[key] - tokens, 0)


class Story:
    def __init__(self, host: Host, limits: list[LimitSpec]) -> None:
        self.host, self.limits, self.at = host, limits, 0
        self.model = Model()
        self.limiter = self._limiter()

    @property
    def limit(self) -> Any:
        return self.limits[self.at]

    def _limiter(self) -> RateLimiter:
        return self.host.limiter(self.limit)

    def leased(self, key: str) -> int:
        return leases_of(self.limiter).look(key.encode())[0][0]

    def step(self, what: str, key: str, number: int) -> None:
        if what == "acquire":
            # A refusal is remembered for a moment, though the limits may have changed since.
            leases_of(self.limiter).unrefuse(key.encode())
            found = self.limiter.acquire(key, number)
            fits = self.model.acquire(key, number, self.limit.n)
            assert found.allowed == fits, (key, number, self.model.used, self.limit)
            assert self.leased(key) <= max(self.limit.n // 100, 1)
        elif what == "refund":
            self.limiter.refund(key, number)
            self.model.give_back(key, number)
        elif what == "settle":
            self._settle(key, number)
        elif what == "reset":
            self.limiter.reset(key)
            self.model.used[key] = 0
        elif what == "change":
            self.step("save", "", 0)  # what is leased may be spent after a change
            self.at = number % len(self.limits)
            self.limiter = self._limiter()
        elif what == "save":
            leases_of(self.limiter).connection.save()  # type: ignore[attr-defined]
        else:
            self._stop(what)

    def _settle(self, key: str, beyond: int) -> None:
        leases, raw = leases_of(self.limiter), key.encode()
        if not leases.states.known(raw)[1][0]:
            leases.ask(lib.FSHM_PEEK, key, 2**40)  # after a reboot: learns when its window ends
        more, less = max(beyond, 0), min(max(-beyond, 0), max(self.model.used[key], 0))
        end = leases.states.now() + leases.states.known(raw)[1][0]
        leases.settle(Settlement(leases, raw, (more,), (less,), (end,)), later=False)
        self.model.used[key] += more - less

    def _stop(self, what: str) -> None:
        down = LONG if what == "wait" else 0.0
        if what == "stop":
            self.host.reboot(down)
        else:
            for key in KEYS:  # what was leased counts as used
                self.model.used[key] += self.leased(key)
            if what == "remove":
                self.host.remove_segment()
            else:
                self.host.lose_power(down)
        if what == "wait":
            self.model = Model()
        self.limiter = self._limiter()


def tell(host: Host, limits: list[LimitSpec], steps: list[tuple[str, str, int]]) -> None:
    story = Story(host, limits)
    for each in steps:
        story.step(*each)
    for key in KEYS:
        leases_of(story.limiter).unrefuse(key.encode())
        left = max(story.limit.n - story.model.used[key], 0)
        assert story.limiter.acquire(key, left or 1).allowed == (left > 0)


@pytest.mark.parametrize(
    "limits", [WINDOWS, SLIDING, CALENDAR], ids=["windows", "sliding", "calendar"]
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_stories(
    tmp_path_factory: pytest.TempPathFactory, limits: list[LimitSpec],
    steps: list[tuple[str, str, int]],
) -> None:  # fmt: skip
    folder, name = tmp_path_factory.mktemp("state"), unique_name(f"story{next(_numbers)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Background, "refill", lambda *_: None)  # a lease changes by calls alone
        try:
            with Host(name, str(folder), patch) as host:
                tell(host, limits, steps)
        finally:
            remove(name)
