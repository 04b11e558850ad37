"""What is said to the server about permits in flight and what it answers: the arguments of
permits.lua, and how long a host may use what it was given."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import NamedTuple

from fast_litellm_shm.native import lib

SOURCE = importlib.resources.files(__package__).joinpath("permits.lua").read_text("utf-8")
# The server counts a host for 10 s after it was last heard (TTL of permits.lua). The host uses what
# it has for 8 s after it asked, and fshm_allowance_put() may round that up by a second.
USED_NS = 8_000_000_000


class Answer(NamedTuple):
    """``known``: the word was the newest; else nothing was done. ``allowance``: of the host, from
    when it asked. ``total``: of all hosts. ``calm_ns``: refused, and for how long that is worth no
    other question; 0: not refused."""

    known: bool
    allowance: int
    total: int
    hosts: int
    calm_ns: int


class Request(NamedTuple):
    """One call of the script. ``told``: the host's allowance, or what it holds where that is more.
    ``want``: permits beyond it; 0: renew, or give back."""

    limiter: bytes
    key: bytes
    n: int
    word: int
    told: int
    want: int

    @property
    def source(self) -> str:
        return SOURCE

    @property
    def operation(self) -> str:
        return "permits"

    @property
    def asked(self) -> int:
        return self.want

    def arguments(self, host: bytes, channel: str) -> list[bytes | str | int]:
        end = self.word >> lib.FSHM_ALLOWANCE_BITS & (1 << (57 - lib.FSHM_ALLOWANCE_BITS)) - 1
        low = self.word & (1 << lib.FSHM_ALLOWANCE_BITS) - 1
        return [host, channel, self.limiter, self.key, self.n, end, low, self.told, self.want]

    def state_key(self, prefix: str) -> bytes:
        """As that of a rate, but for what comes before the braces."""
        limiter = self.limiter.replace(b"%", b"%25").replace(b"/", b"%2F")
        return b"%b:permits:{%b/%b}" % (prefix.encode(), limiter, self.key)

    def answer(self, raw: Sequence[int]) -> Answer:
        known, allowance, total, hosts, calm = (int(each) for each in raw)
        return Answer(bool(known), allowance, total, hosts, calm * 1000)

    def granted(self, found: Answer) -> int:
        return max(found.allowance - self.told, 0) if found.known else 0
