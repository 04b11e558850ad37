"""Requests about permits in flight and their answers: the arguments of permits.lua, and how long a
host may use its permit leases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster import names

SOURCE = names.source("permits.lua")
# The server counts a host for 10 s after its last contact (TTL of permits.lua). The host uses what
# it has for 8 s after it asked, and fshm_permit_lease_put() may round that up by a second.
USED_NS = 8_000_000_000


class Answer(NamedTuple):
    """``known``: the version was the newest; else nothing was done. ``leased``: how many permits
    the host has since it asked. ``total``: of all hosts. ``back_off_ns``: refused, and not to ask
    again for so long; 0: not refused. ``junk``: the value at the server was not ours, so no host is
    granted more for ten seconds."""

    known: bool
    leased: int
    total: int
    hosts: int
    back_off_ns: int
    junk: bool = False


class Request(NamedTuple):
    """One call of the script. ``version``: of the permit lease. ``reported``: the permits leased to
    the host, or what it holds where that is more. ``want``: permits beyond that; 0: renew, or
    give back."""

    limiter: bytes
    key: bytes
    n: int
    version: int
    reported: int
    want: int

    @property
    def source(self) -> str:
        return SOURCE

    @property
    def operation(self) -> str:
        return "permits"

    def again(self) -> Request:
        """It says what the host holds, so it may be heard twice."""
        return self

    @property
    def asked(self) -> int:
        return self.want

    def arguments(self) -> list[int]:
        """After those of values.lua."""
        bits = lib.FSHM_PERMIT_LEASE_BITS
        end = self.version >> bits & (1 << (57 - bits)) - 1
        low = self.version & (1 << bits) - 1
        return [self.n, end, low, self.reported, self.want]

    def state_key(self, prefix: str) -> bytes:
        return names.state_key(prefix, names.PERMITS, self.limiter, self.key)

    def answer(self, raw: Sequence[int]) -> Answer:
        known, leased, total, hosts, back_off, junk = (int(each) for each in raw)
        return Answer(bool(known), leased, total, hosts, back_off * 1000, bool(junk))

    def granted(self, found: Answer) -> int:
        return max(found.leased - self.reported, 0) if found.known else 0
