"""Quota: one admission for a whole LLM call: requests and tokens a minute, and calls in
parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import keyed, settings
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import Decision, Permit, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limits import FixedWindow, InFlight, LimitSpec

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.quota import Granted, ClusterQuota

# Where the limits are those of many hosts, what holds a permit and knows what was charged.
Held: TypeAlias = "Permit | Granted"

_NUMBERS, _PERMIT = ffi.typeof("uint64_t[4]"), ffi.typeof("fshm_permit *")


_MOST_A_MINUTE, _MOST_PARALLEL = 2**31 - 1, 100_000


def _most(limit: LimitSpec | InFlight) -> LimitSpec | InFlight:
    return (
        InFlight(_MOST_PARALLEL) if isinstance(limit, InFlight) else FixedWindow(_MOST_A_MINUTE, 60)
    )


def _check_tokens(where: str, tokens: object) -> None:
    if type(tokens) is int and 0 <= tokens < 2**63:
        return
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{where}: tokens must be an int, not {tokens!r}")
    if tokens < 0:
        raise ValueError(f"{where}: tokens must be 0 or more, not {tokens}")
    if tokens >= 2**63:
        raise ValueError(f"{where}: tokens must be below 2**63, not {tokens}")


class Admission:
    """The answer of :meth:`Quota.admit`: true when admitted, until it is released.

    When false: ``reason`` says which limit, ``retry_after`` when to come back (seconds; None:
    never; 0.0: when a call in flight ends), ``in_flight`` how many there are.
    """

    __slots__ = ("_charged", "_key", "_permit", "_quota", "_released", "_requests", "allowed")

    def __init__(
        self, quota: Quota, key: str | bytes, permit: Held, tokens: int, requests: int = 1
    ) -> None:
        self._quota, self._key, self._permit = quota, key, permit
        self._charged, self._requests = tokens, requests
        self.allowed = self._permit.decision.allowed
        self._released = not self.allowed

    @property
    def decision(self) -> Decision:
        """The Decision behind it: remaining, retry_after, reset_after, limit."""
        return self._permit.decision

    @property
    def retry_after(self) -> float | None:
        """Seconds until it would be admitted; 0.0 where that hangs on a call in flight."""
        return self._permit.decision.retry_after

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many."""
        return self._permit.in_flight

    @property
    def reason(self) -> str:
        """ "Request allowed", or which limit denied: "rpm", "tpm" or "max_parallel"."""
        return "Request allowed" if self.allowed else self._quota._limit_name(self._permit)

    def settle(self, tokens: int) -> None:
        """Book the true number of tokens: more than estimated is charged, and may go into debt,
        which the next requests wait out; less is given back, as long as its minute lasts. Can be
        called again, with a later number."""
        _check_tokens("settle", tokens)
        if self.allowed and tokens != self._charged and self._quota._tpm >= 0:
            self._quota._settle(self._key, self._charged, tokens, self._permit)
            self._charged = tokens

    def _count_request(self) -> None:
        """It was one request more, which may go into debt."""
        if self.allowed and self._quota._names[0] == "rpm":
            before = self._quota._costs(self._charged, self._requests)
            after = self._quota._costs(self._charged, self._requests + 1)
            self._quota._book(self._key, before, after, self._permit)
            self._requests += 1

    def cancel(self) -> None:
        """The call will not be made after all: give back the request, the tokens and the parallel
        slot, as long as their minute lasts. Harmless after a release, and twice."""
        if self._released:
            return
        try:
            tokens, self._charged = self._charged, 0  # once, wherever an exception strikes
            requests, self._requests = self._requests, 0
            self._quota._undo(self._key, tokens, requests, self._permit)
        finally:  # a slot that is kept for what failed would be kept for good
            self.release()

    def release(self) -> bool:
        """The call is over: give the parallel slot back. Twice is harmless. False where there was
        nothing to give back any more."""
        if self._released:
            return False
        given_back = self._permit.release()
        self._released = True  # after it: an exception may strike in between
        return given_back or "max_parallel" not in self._quota._names

    def __bool__(self) -> bool:
        return not self._released

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    async def __aenter__(self) -> Admission:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "admitted" if self else "released" if self.allowed else f"denied by {self.reason}"
        return f"Admission({state}, key={self._key!r})"


class Quota:
    """Requests a minute, tokens a minute and calls in parallel, for each key, over all workers.

    rpm, tpm: windows of 60 seconds that begin at a key's first request; 1 .. 2,147,483,647.
    max_parallel: 1 .. 100,000. At least one of them. name: processes that use the same name share.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: all
    three hold over all hosts that name the same server; False: this host alone; default: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``.

    A denial consumes nothing of any of the three. A worker that dies gives its parallel slots back,
    and leaves what it charged charged. The gateway's way of use::

        with quota.admit(key, tokens=estimate) as admission:
            if not admission:
                return too_many_requests(admission.reason, admission.retry_after)
            answer = call()
            admission.settle(tokens=answer.usage.total_tokens)
    """

    def __init__(
        self,
        rpm: int | None = None,
        tpm: int | None = None,
        max_parallel: int | None = None,
        *,
        name: str,
        segment: Segment | None = None,
        on_full: str = "share",
        cluster: Cluster | str | Literal[False] | None = None,
        # For the LiteLLM plugin: quotas of one name may differ in their numbers, not in which of
        # them they have. Keys of different numbers are different keys. On this host alone.
        _numbered: bool = False,
    ) -> None:
        found: list[LimitSpec | InFlight] = []
        names = []
        for label, value in (("rpm", rpm), ("tpm", tpm)):
            if value is None:
                continue
            try:
                found.append(FixedWindow(value, per=60))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Quota: {label}: {error}") from None
            names.append(label)
        if max_parallel is not None:
            found.append(limits.in_flight("Quota", "max_parallel", max_parallel))
            names.append("max_parallel")
        if not found:
            raise ValueError("Quota needs at least one of rpm, tpm and max_parallel")
        self._names = tuple(names)
        self._tpm = names.index("tpm") if tpm is not None else -1
        self._ones = (1,) * len(names)
        self._rest = self._ones[self._tpm + 1 :]
        self._parts: ClusterQuota | None = None
        self._checked: Any = None  # the limits whose kinds are known to be ours
        if not _numbered and settings.names_server(cluster):
            self._join(tuple(found), name, segment, on_full, cluster)
        if self._parts is None:
            own = tuple(found)
            self._shared = SharedLimits(
                tuple(map(_most, own)) if _numbered else own,
                name=name,
                segment=segment,
                on_full=on_full,
                numbered=own if _numbered else None,
            )
        self._numbered = _numbered
        numbers = (each.n for each in found)
        self._tail = keyed.tail_of(names, numbers).encode() if _numbered else b""
        self._here: Literal[False] | None = False if cluster is False else None
        self._arguments = (rpm, tpm, max_parallel, name, on_full)

    def _join(
        self,
        found: tuple[LimitSpec | InFlight, ...],
        name: str,
        segment: Segment | None,
        on_full: str,
        cluster: Cluster | str | Literal[False] | None,
    ) -> None:
        from fast_litellm_shm.cluster import settings as cluster_settings
        from fast_litellm_shm.cluster.quota import ClusterQuota

        server = cluster_settings.found(cluster)
        if server is not None:
            self._parts = ClusterQuota(found, name, segment, on_full, server)

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._arguments[3]

    @property
    def segment(self) -> Segment:
        """The segment it lives in."""
        return self._shared.segment if self._parts is None else self._parts.segment

    @property
    def over_hosts(self) -> bool:
        """Whether its limits are those of many hosts."""
        return self._parts is not None

    def admit(self, key: str | bytes, tokens: int = 0) -> Admission:
        """Admit a call that is estimated at ``tokens`` tokens, or say why not."""
        _check_tokens("admit", tokens)
        return self._admit(key, tokens, 1)

    def _admit(self, key: str | bytes, tokens: int, requests: int) -> Admission:
        """The same, of a call that counts as so many requests, and one parallel slot."""
        costs = self._costs(tokens, requests)
        if self._parts is not None:
            return Admission(self, key, self._parts.admit(key, costs), tokens, requests)
        counted = self._raw(key) if self._tail else key
        return Admission(self, key, self._shared._admit(counted, costs), tokens, requests)

    async def admit_async(self, key: str | bytes, tokens: int = 0) -> Admission:
        """:meth:`admit` for asyncio: where the limits are those of many hosts and the server must
        be asked, that is done in a thread; else nothing is awaited. Cancelled, it consumes nothing
        and holds nothing. What is done with the Admission waits for nobody, so that an event loop
        can do it::

            async with await quota.admit_async(key, tokens=estimate) as admission:
        """
        _check_tokens("admit_async", tokens)
        return await self._admit_async(key, tokens, 1)

    def _raw(self, key: str | bytes) -> bytes:
        """As which the segment knows it."""
        return key_bytes(key) + self._tail

    async def _admit_async(self, key: str | bytes, tokens: int, requests: int) -> Admission:
        if self._parts is None:
            return self._admit(key, tokens, requests)
        costs = self._costs(tokens, requests)
        permit = await self._parts.admit_async(key, costs)
        return Admission(self, key, permit, tokens, requests)

    def in_flight(self, key: str | bytes) -> int:
        """Calls of the key in flight, of living processes of this host."""
        raw = self._raw(key)
        if self._parts is not None:
            return self._parts.in_flight(raw)
        return int(lib.fshm_in_flight(self._shared._handle, raw, len(raw)))

    def remaining(self, key: str | bytes) -> dict[str, int]:
        """What is left of each limit now, by name: rpm, tpm, max_parallel. Over many hosts the
        server is asked where that is needed."""
        out = self._left(key, ask=True)
        if "max_parallel" in self._names:
            most = self._limits[-1].n
            out["max_parallel"] = max(most - self.in_flight(key), 0)
        return out

    def _left(self, key: str | bytes, ask: bool = False) -> dict[str, int]:
        """remaining() without max_parallel, which has to look at each of its slots. ask: where
        this host does not know, else it is what it has last heard."""
        raw, left = self._raw(key), ffi.new(_NUMBERS)
        self._check_kinds()  # or the numbers would be those of other limits
        if self._parts is not None:
            return dict(zip(self._names, self._parts.left(key, ask), strict=False))
        count = lib.fshm_remaining(self._shared._handle, raw, len(raw), 0, left)
        if count < 0:
            self._shared._failed(count)
        return dict(zip(self._names[:count], left, strict=False))

    @property
    def _limits(self) -> tuple[Any, ...]:
        return self._shared.limits if self._parts is None else self._parts.limits

    def _check_kinds(self) -> None:
        """Of the limits as they are now: other ones are another tuple."""
        found = self._limits
        if len(found) != len(self._names):
            raise exceptions.SegmentError(
                f"Quota {self.name!r}: another process gave this name other kinds of limits than "
                f"{', '.join(self._names)}; give all workers the same, or another name"
            )
        self._checked = found

    def _costs(self, tokens: int, requests: int = 1) -> tuple[int, ...]:
        if self._parts is not None or self._shared.limits is not self._checked:
            self._check_kinds()
        if requests != 1:
            cost = {"rpm": requests, "tpm": tokens, "max_parallel": 1}
            return tuple(cost[name] for name in self._names)
        return self._ones if self._tpm < 0 else (*self._ones[: self._tpm], tokens, *self._rest)

    def _settle(self, key: str | bytes, charged: int, actual: int, permit: Held) -> None:
        self._book(key, self._costs(charged), self._costs(actual), permit)

    def _undo(self, key: str | bytes, tokens: int, requests: int, permit: Held) -> None:
        self._book(key, self._costs(tokens, requests), (0,) * len(self._names), permit)

    def _book(
        self, key: str | bytes, charged: tuple[int, ...], actual: tuple[int, ...], permit: Held
    ) -> None:
        if self._parts is not None:
            self._parts.book(key, charged, actual, permit)  # type: ignore[arg-type]
            return
        raw = self._raw(key)
        before, after = ffi.new(_NUMBERS, charged), ffi.new(_NUMBERS, actual)
        held = ffi.cast(_PERMIT, permit._address)  # type: ignore[union-attr]
        status = lib.fshm_settle(self._shared._handle, raw, len(raw), before, after, held, 0)
        if status != lib.FSHM_ALLOWED:
            self._shared._failed(status)

    def _limit_name(self, permit: Held) -> str:
        index = getattr(permit, "index", permit.decision.limit_index)
        return self._names[index] if index < len(self._names) else "limit"

    def __reduce__(self) -> tuple[Any, ...]:
        cluster = self._parts.cluster if self._parts is not None else self._here
        return (_rebuild, (*self._arguments, self.segment, cluster, self._numbered))

    def __repr__(self) -> str:
        shown = ", ".join(limits.describe(limit) for limit in self._limits)
        return f"Quota({shown}, name={self.name!r})"


def _rebuild(
    rpm: int | None,
    tpm: int | None,
    max_parallel: int | None,
    name: str,
    on_full: str,
    segment: Segment,
    cluster: Cluster | Literal[False] | None,
    numbered: bool = False,
) -> Quota:
    limits_ = (rpm, tpm, max_parallel)
    given: dict[str, Any] = {"name": name, "segment": segment, "on_full": on_full}
    return Quota(*limits_, **given, cluster=cluster, _numbered=numbered)
