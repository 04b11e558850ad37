"""Processes that insert the same new keys at the same instant, while the cells of old ones expire.

A round has new keys, and all processes go through them in the same order from the same instant. Who
comes second finds the key and is faster, so it catches up: they meet at the same key again and
again. The keys of the round before expire in just that moment, so that two processes often do not
see the same cell as the first free one.
"""

from __future__ import annotations

from fast_litellm_shm import RateLimiter, Segment, Window
from support.workers import meet, now

ROUND, WINDOW = 1_000_000, 1_000_000  # ns; equal: one round expires as the next begins
CHUNKS, KEYS = 10, 20  # chunks of a round, keys of a chunk
CAPACITY = CHUNKS * KEYS  # just room enough, so that cells are scarce

# round and chunk, time before it, time after it, whether each of its keys was admitted
Turn = tuple[tuple[int, int], int, int, bytes]


def race(name: str, origin: int, seconds: float, parties: int) -> list[Turn]:
    """All chunks that this process took part in."""
    meet(name, parties)
    limiter = RateLimiter(Window(1, WINDOW / 1e9), name="race", segment=Segment(name))
    out: list[Turn] = []
    end = now() + int(seconds * 1e9)
    while now() < end:
        number = (now() - origin) // ROUND + 1
        chunks = [[f"{number}-{c}-{i}" for i in range(KEYS)] for c in range(CHUNKS)]
        while now() < origin + number * ROUND:
            pass
        for c, keys in enumerate(chunks):
            before, admitted = now(), limiter.acquire_many(keys).allowed
            out.append(((number, c), before, now(), admitted.tobytes()))
    return out


def judge(turns: list[Turn]) -> tuple[int, int]:
    """How many keys were raced for, and how many of them were admitted twice in one window. A chunk
    counts where all its turns lie within less than a window: its keys have seen only one."""
    chunks: dict[tuple[int, int], list[Turn]] = {}
    for turn in turns:
        chunks.setdefault(turn[0], []).append(turn)
    raced = doubled = 0
    for chunk in chunks.values():
        span = max(turn[2] for turn in chunk) - min(turn[1] for turn in chunk)
        if len(chunk) < 2 or span >= WINDOW:
            continue
        sums = [sum(of_key) for of_key in zip(*(turn[3] for turn in chunk), strict=True)]
        raced += sum(1 for count in sums if count)
        doubled += sum(1 for count in sums if count > 1)
    return raced, doubled
