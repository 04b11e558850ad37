"""The kept inputs of fuzz.c, in words. ``python tests/hostile/seeds.py`` writes them into corpus/.

What the fuzzer finds is kept there too, under a name that says what it is. A change of the records
in fuzz.c changes what these files mean: write them again then.
"""

from __future__ import annotations

import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"

# Flags, targets and kinds of edits, calls and limiters: fuzz.c and calls.h.
RAW, LARGE, READ_ONLY, TRUNCATE, FIX_CHECK, REMOVE = 1, 2, 4, 8, 16, 32
HASHED, OFF = 64, 128
(HEADER, ENTRY, PRESENT_RULES, WHOLE_ENTRY, PROCESS, PROCESS_STATS) = range(6)
(USED_SLOT, SLOT, KEY_STATS, NAMES, CHANGING_HEADER, ANYWHERE) = range(6, 12)
DEPLOYMENT, MEMO, METRIC, REQUESTS, WAITER = range(12, 17)
SET, XOR, ADD, BYTE, COPY, LINE = range(6)
OPEN, LOOK, APPLY_COSTS, APPLY, IS_ALLOWED, RESERVE, ADMIT, _, REMAINING, RESET_KEY = range(10)
RESET_ALL, LIMITS, IN_FLIGHT, REAP, QUEUE, CLOSE = range(10, 16)
LEARN, PICK = 19, 24
BUCKET, WINDOW, SLIDING, THREE, QUOTA, PERMITS = range(6)
# Words: of an entry; of a rule; of a process; of the header.
ID, MOST, CURRENT, SET_OF, NAME_LENGTH, NAME, OWNERS = 0, 1, 2, 3, 4, 5, 18
KIND, N, PER, BURST, NUM, DEN, UNIT, ROOM = range(8)
RULES, RULE_USED = 16, 1 << 63
CAPACITY, NAMES_WORDS, CONSTANT = 3, 18, 32
NAMES_HEAD = 8  # of the part that changes
PENDING, HELD = 6 << 61, 7 << 61
SLOTS = 12  # of the small image
METRIC_WORDS = 15  # of each; the second: the lengths of its name, and of the component in it


def edit(target: int, position: int, how: int, value: int) -> bytes:
    """One edit of 12 bytes."""
    return struct.pack("<BHBQ", 128 | target, position, how, value % 2**64)


def in_entry(limiter: int, word: int) -> int:
    """The position of a word in a limiter's entry, or in its present rules."""
    return limiter * 256 + word


def call(which: int, limiter: int, what: int = 0, number: int = 1) -> bytes:
    """One call of 4 bytes. number: 0..15 as it is; 250..255: odd ones."""
    return bytes((which, limiter, what, number))


def image(*records: bytes, flags: int = 0) -> bytes:
    """A good image, with records done to it."""
    return bytes((flags,)) + b"".join(records)


def while_open(limiter: int, *records: bytes, flags: int = 0) -> bytes:
    """The limiter is opened, then edited, then every call comes."""
    return image(call(OPEN, limiter, 16), *records, flags=flags)


def slots(*values: int, how: int = SET) -> bytes:
    """The state of every slot in use."""
    return b"".join(edit(USED_SLOT, 4 * i + 1, how, values[i % len(values)]) for i in range(SLOTS))


SEEDS = {
    "good": image(),
    "good-large": image(flags=LARGE),
    "good-read-only": image(flags=READ_ONLY),
    "good-hashed-names": image(flags=HASHED),
    "good-no-names": image(flags=OFF | REMOVE),
    "other-limits": image(*(call(OPEN, i, 15) for i in range(6))),
    "raw-nothing": bytes((RAW,)),
    "raw-magic": bytes((RAW,)) + struct.pack("<QII", 0x314D48534C4C4146, 1, 0x01020304),
    "cut-to-a-page": image(struct.pack("<I", 4096), flags=TRUNCATE),
    "cut-while-open": image(struct.pack("<I", 2**32 - 1), flags=TRUNCATE),
    "cut-to-nothing": image(struct.pack("<I", 0), flags=TRUNCATE),
    "header-capacity": image(edit(HEADER, CAPACITY, SET, 0), flags=FIX_CHECK),
    "header-names-words": image(
        edit(HEADER, NAMES_WORDS, SET, 1 << 40),
        edit(CHANGING_HEADER, NAMES_HEAD, SET, 1 << 28),
        flags=FIX_CHECK,
    ),
    "header-while-open": while_open(BUCKET, *(edit(HEADER, w, SET, 0) for w in range(CONSTANT))),
    "limits-rule-9": image(edit(ENTRY, in_entry(BUCKET, SET_OF), XOR, 9 << 4)),
    "limits-none": while_open(THREE, edit(ENTRY, in_entry(THREE, CURRENT), SET, 0)),
    "limits-count": image(edit(ENTRY, in_entry(THREE, SET_OF), SET, 0xFFF)),
    "limits-one-rule-thrice": while_open(THREE, edit(ENTRY, in_entry(THREE, SET_OF), SET, 0x3)),
    "limits-current": while_open(
        BUCKET,
        edit(ENTRY, in_entry(BUCKET, CURRENT), SET, 2**64 - 1),
        edit(ENTRY, in_entry(WINDOW, CURRENT), ADD, 1 << 37),
        edit(ENTRY, in_entry(THREE, CURRENT), ADD, 1 << 40),
    ),
    "limits-most": while_open(PERMITS, edit(ENTRY, in_entry(PERMITS, MOST), SET, 2**64 - 1)),
    "rules-free": while_open(
        BUCKET,
        *(edit(ENTRY, in_entry(BUCKET, OWNERS + i), SET, 0) for i in range(RULES)),
        *(call(OPEN, BUCKET, variant) for variant in (1, 2)),
    ),
    "rules-taken": while_open(  # by one who cannot be asked after: no rule can be set
        WINDOW,
        *(edit(ENTRY, in_entry(WINDOW, OWNERS + i), SET, 1 << 16 | 0xFFFF) for i in range(RULES)),
        *(call(OPEN, WINDOW, variant) for variant in (1, 2)),
    ),
    "rules-of-later-versions": while_open(
        SLIDING,
        *(
            edit(ENTRY, in_entry(SLIDING, OWNERS + i), SET, RULE_USED | (2**37 - 1))
            for i in range(RULES)
        ),
        *(call(OPEN, SLIDING, variant) for variant in range(8)),
    ),
    "rules-all-used": while_open(
        THREE, *(call(which, THREE, v, 1) for v in range(16) for which in (OPEN, APPLY_COSTS))
    ),
    "rules-places": while_open(
        THREE,
        *(edit(WHOLE_ENTRY, in_entry(THREE, 24 + 8 * i), XOR, 5 << 48) for i in range(RULES)),
        *(call(OPEN, THREE, v) for v in range(16)),
    ),
    "labels": image(
        *(edit(USED_SLOT, 4 * i, XOR, (i % 15 + 1) << 4) for i in range(SLOTS)),
        *(call(OPEN, THREE, v) for v in range(16)),
    ),
    "labels-epochs-places": image(
        *(edit(USED_SLOT, 4 * i, XOR, 0x7FE >> i % 4) for i in range(SLOTS)),
        *(call(OPEN, THREE, v) for v in range(16)),
    ),
    "limits-zero-divisor": while_open(
        BUCKET,
        edit(PRESENT_RULES, in_entry(BUCKET, DEN), SET, 0),
        call(APPLY_COSTS, BUCKET, 0, 3),
    ),
    "limits-sane-but-never-set": image(edit(PRESENT_RULES, in_entry(WINDOW, N), SET, 2**40)),
    "limits-largest": while_open(
        THREE, *(edit(PRESENT_RULES, in_entry(THREE, w), SET, 2**57 - 1) for w in range(N, 8))
    ),
    "limits-permits-many": while_open(
        PERMITS, edit(PRESENT_RULES, in_entry(PERMITS, N), SET, 2**31)
    ),
    "limits-permits-most": while_open(
        QUOTA, edit(ENTRY, in_entry(QUOTA, NAME_LENGTH), SET, 2**64 - 1)
    ),
    "name-length": image(edit(ENTRY, in_entry(WINDOW, NAME_LENGTH), SET, 30000)),
    "name-other": image(edit(ENTRY, in_entry(WINDOW, NAME), XOR, 32)),
    "id-lost": image(edit(ENTRY, in_entry(BUCKET, ID), SET, 0)),
    "process-incarnation": image(*(edit(PROCESS, 64 * i + 5, ADD, 1) for i in range(3))),
    # from 64 KB to 32 GB beyond: some of that is mapped to nothing, wherever the segment lies
    "process-stats-slot": image(
        *(edit(PROCESS_STATS, 8 * i, LINE, (1 << (12 + i * 20 // 32)) << 32) for i in range(32))
    ),
    "slots-pending": image(slots(PENDING | 5)),
    "slots-permits": image(slots(*(HELD | i << 44 | i << 32 for i in range(SLOTS)))),
    "slots-permits-full": while_open(
        PERMITS,
        *(edit(SLOT, 2 * i, SET, i + 1) for i in range(SLOTS)),
        *(edit(SLOT, 2 * i + 1, SET, HELD | i << 44 | i << 32) for i in range(SLOTS)),
    ),
    "slots-late": image(slots(2**57 - 1, 1 << 62 | 2**62 - 1, 2 << 62 | 2**62 - 1)),
    "slots-of-other-kinds": image(slots(1 << 62, how=ADD)),
    "slots-twice": image(*(edit(SLOT, i, COPY, 0) for i in range(2 * SLOTS))),
    "key-stats-limiter": image(*(edit(KEY_STATS, 2 * i, XOR, 0x7FF << 20) for i in range(SLOTS))),
    "key-stats-names": image(*(edit(KEY_STATS, 2 * i + 1, SET, 2**64 - 1) for i in range(SLOTS))),
    "names-long": image(*(edit(NAMES, 8 * i, LINE, 0xFFFF) for i in range(64))),
    "metric-names-long": image(
        *(edit(METRIC, METRIC_WORDS * i + 1, SET, 3 << 32 | 3000) for i in range(9))
    ),
    "metric-components-long": image(
        *(edit(METRIC, METRIC_WORDS * i + 1, SET, 9 << 32 | 9) for i in range(9))
    ),
    "metric-names-of-none": image(
        *(edit(METRIC, METRIC_WORDS * i + 1, SET, 2**32 - 1) for i in range(32))
    ),
    "deployments": image(*(edit(DEPLOYMENT, 8 * i, LINE, 2**64 - 1) for i in range(256))),
    "deployments-nowhere": image(*(call(PICK, 0, 8 * i + 4, 251) for i in range(32))),
    "deployments-one-id": image(*(edit(DEPLOYMENT, 8 * i, SET, 5) for i in range(256))),
    "requests": image(*(edit(REQUESTS, 8 * i, LINE, 2**64 - 1) for i in range(9))),
    "memo": image(*(edit(MEMO, 8 * i, LINE, 2**64 - 1) for i in range(64)), flags=LARGE),
    "refused-most": while_open(BUCKET, *(call(LEARN, BUCKET, what, 251) for what in (2, 66))),
    "token-and-permit-leases": image(
        *(edit(SLOT, 2 * i + 1, SET, 1 << 62 | 31 << 57 | 2**57 - 1) for i in range(200)),
        flags=LARGE,
    ),
    "queues": while_open(
        QUOTA, *(edit(CHANGING_HEADER, 32 + 8 * i, LINE, 2**64 - 1) for i in range(32))
    ),
    "waiters": while_open(
        PERMITS,
        *(call(QUEUE, PERMITS, what, 250 + what) for what in range(4)),
        *(edit(WAITER, 8 * i + word, SET, 2**64 - 1) for i in range(3) for word in range(1, 8)),
        *(call(QUEUE, PERMITS, 2 * what, 250 + what) for what in range(4)),
    ),
    "waiters-ahead": while_open(
        PERMITS,
        *(call(QUEUE, PERMITS, what, 250 + what) for what in range(4)),
        *(edit(WAITER, 8 * i + 5, SET, 2**63) for i in range(4)),
        *(call(QUEUE, PERMITS, 2 * what, 250 + what) for what in range(4)),
    ),
}


def main() -> None:
    """Write them."""
    CORPUS.mkdir(exist_ok=True)
    for name, data in SEEDS.items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
