"""What the server last said of a key's sliding windows. The two counts are kept apart, since the
previous one fades and the present one stays. A server that has lost its state gets them back."""

from __future__ import annotations

from collections.abc import Sequence

from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.side_limiters import REPORTED
from fast_litellm_shm.cluster.algorithms import Answer, Rule
from fast_litellm_shm.cluster.single_flight import beside
from fast_litellm_shm.limits import FixedWindow

KIND = 2  # of a Rule
_BITS = 16
_MOST = 2**20 - 1  # a window that counts to this keeps its end in units of 2**20 ns
_PREVIOUS, _PRESENT = b"p", b"c"


def packed(count: int) -> int:
    """A count as 16 bits and a power of two, rounded up: exact to 65,535."""
    power = max(count.bit_length() - _BITS, 0)
    kept = -(-count >> power)
    if kept >> _BITS:
        power, kept = power + 1, kept >> 1
    return min(power << _BITS | kept, _MOST)


def unpacked(code: int) -> int:
    power = code >> _BITS
    return (code - (power << _BITS)) << power


class SlidingCounts:
    """Of one limiter. Two keys for each of its keys: one has the previous count, until the present
    window ends; the other has the present one, until it has faded, a ``per`` later. No admission of
    this host reads them."""

    def __init__(self, limiter: SharedLimits) -> None:
        self._states = beside(limiter, REPORTED, [FixedWindow(_MOST)] * lib.FSHM_MAX_LIMITS)

    def keep(self, raw: bytes, rules: Sequence[Rule], found: Answer, sent: int) -> None:
        """The previous count first: a reader that sees the old present count beside it takes that
        one, which is the same, for the previous one."""
        both = list(zip(rules, found.limits, strict=True))
        previous = [(each.previous, each.left_ns) for _, each in both]
        present = [(each.current, each.left_ns + rule.per_us * 1000) for rule, each in both]
        for prefix, counts in ((_PREVIOUS, previous), (_PRESENT, present)):
            used = [
                packed(count) if rule.kind == KIND else 0
                for rule, (count, _) in zip(rules, counts, strict=True)
            ]
            self._states.learn(prefix + raw, used, [left for _, left in counts], sent)

    def recall(
        self, raw: bytes, rules: Sequence[Rule], used: Sequence[int], left: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """``used``, previous and ``left`` (us) for a request, where these two are known of all
        limits; of sliding windows they are replaced."""
        present, present_left = self._known(_PRESENT + raw)
        previous, previous_left = self._known(_PREVIOUS + raw)
        counts, before, lefts = list(used)[: len(rules)], [0] * len(rules), list(left)
        for i, rule in enumerate(rules):
            if rule.kind != KIND:
                continue
            over = present_left[i] - rule.per_us
            if present[i] and over <= 0:  # a window has ended since
                counts[i], before[i], lefts[i] = 0, present[i], present_left[i]
            else:
                counts[i], before[i] = present[i], previous[i]
                lefts[i] = over if present[i] else previous_left[i]
        return tuple(counts), tuple(before), tuple(lefts)

    def _known(self, key: bytes) -> tuple[list[int], list[int]]:
        used, left = self._states.known(key)
        return [unpacked(each) for each in used], [each // 1000 for each in left]
