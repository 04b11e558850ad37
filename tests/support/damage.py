"""Write over a segment, as something else on the host might."""

from __future__ import annotations

import mmap
import random
import struct
import time
from pathlib import Path

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.segment import path_of

# csrc/core/layout.h: the header's size, and of its words; a limiter's entry, and of its words.
HEADER = 11520
SECRET, DAMAGE = 216, 248
ENTRY, CURRENT, SET, LIMITS = 1344, 16, 24, 320


def write_word(segment: Segment, at: int, value: int) -> None:
    """One word of the file."""
    with open(segment.path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack("=Q", value))


def entry_of(segment: Segment, limiter: int) -> int:
    """Where the entry of a limiter lies in the file."""
    return int(segment.geometry().limiters_offset) + ENTRY * limiter


def damage_limits(segment: Segment, limiter: int) -> None:
    """All rules of a limiter."""
    for at in range(LIMITS, ENTRY, 8):
        write_word(segment, entry_of(segment, limiter) + at, 2**64 - 1)


def scribble(name: str, regions: list[tuple[int, int]], seed: int, seconds: float) -> int:
    """Write over these parts of the file for so long, and put the whole of it back from time to
    time, so that calls get far again. Returns how many strokes."""
    chance = random.Random(seed)
    good = Path(path_of(name)).read_bytes()
    strokes, end = 0, time.monotonic() + seconds
    with open(path_of(name), "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        while time.monotonic() < end:
            for _ in range(chance.randrange(1, 50)):
                start, stop = chance.choice(regions)
                at = chance.randrange(start, stop - 64) & ~7
                what = chance.randrange(6)
                if what == 0:
                    memory[at : at + 8] = chance.randbytes(8)
                elif what == 1:
                    memory[at : at + 8] = struct.pack("=Q", chance.getrandbits(64) >> what * 9)
                elif what == 2:
                    memory[at] = chance.getrandbits(8)
                elif what == 3:
                    memory[at] = memory[at] ^ (1 << chance.randrange(8))
                elif what == 4:
                    other = chance.randrange(len(good) - 64) & ~63
                    memory[at & ~63 : (at & ~63) + 64] = memory[other : other + 64]
                else:
                    memory[at : at + 64] = bytes([chance.choice((0, 255))]) * 64
                strokes += 1
            if chance.random() < 0.1:
                upto = chance.choice((HEADER, len(good)))
                memory[:upto] = good[:upto]
            time.sleep(chance.random() * 0.002)
        memory[:HEADER] = good[:HEADER]  # so that what lies beside it is found when it is removed
    return strokes
