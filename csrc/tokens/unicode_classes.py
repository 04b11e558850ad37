"""Makes unicode_classes.h: the class of every code point, as tiktoken's regular expressions see it.

tiktoken's regex crate brings Unicode tables of its own, of a version that need not be Python's. So
the classes are asked of tiktoken: with the pattern \\p{Lu}, capital letters alone yield tokens.

    python csrc/tokens/unicode_classes.py > csrc/tokens/unicode_classes.h

tests/tokens/test_unicode.py compares the table with the installed tiktoken.
"""

import re

import tiktoken

BLOCK = 64  # code points: those that differ in the last byte of their UTF-8 only
CLASSES = {  # name -> what it matches; in the order of their numbers. Everything else: CLASS_OTHER
    "UPPER": r"[\p{Lu}\p{Lt}]",
    "LOWER": r"\p{Ll}",
    "BOTH": r"[\p{Lm}\p{Lo}]",
    "MARK": r"\p{M}",
    "NUMBER": r"\p{N}",
    "SPACE": r"[\s--[\r\n]]",
    "NEWLINE": r"[\r\n]",
}
_CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
_PART = 0x8000


def _matched(pattern: str) -> set[int]:
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    found: set[int] = set()
    for at in range(0, len(_CODE_POINTS), _PART):
        text = "".join(map(chr, _CODE_POINTS[at : at + _PART]))
        found.update(map(ord, encoding.decode(encoding.encode_ordinary(text))))
    return found


def classes() -> bytes:
    """The number of the class of each code point: 0 where no pattern matches."""
    out = bytearray(0x110000)
    for number, pattern in enumerate(CLASSES.values(), 1):
        for c in _matched(pattern):
            assert out[c] == 0, f"U+{c:04X} is in two classes"
            out[c] = number
    return bytes(out)


def unicode_version() -> str:
    """The newest version that tiktoken's tables know."""
    newest = ""
    for version in (f"{major}.0" for major in range(10, 40)):
        try:
            if _matched(rf"\p{{Age={version}}}"):
                newest = version
        except ValueError:
            break
    return newest


def _rows(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers))
    return "\n".join(f"    {line}" for line in re.findall(r"(.{1,95}(?:,|$)) ?", text))


def header(table: bytes, version: str) -> str:
    blocks: dict[bytes, int] = {}
    which = [
        blocks.setdefault(table[at : at + BLOCK], len(blocks)) for at in range(0, 0x110000, BLOCK)
    ]
    assert len(blocks) < 1 << 16
    names = "".join(f"  CLASS_{name}, /* {what} */\n" for name, what in CLASSES.items())
    cells = [number for block in blocks for number in block]
    return f"""\
/* unicode_classes.h - classes of code points, Unicode {version}. Made by unicode_classes.py. */
#ifndef FSHM_UNICODE_CLASSES_H
#define FSHM_UNICODE_CLASSES_H

#include <stdint.h>

#define UNICODE_VERSION "{version}"

enum {{
  CLASS_OTHER,
{names}}};

/* The class of c is class_blocks[class_block[c / 64] * 64 + c % 64]. */
/* clang-format off */
static const uint16_t class_block[0x110000 / {BLOCK}] = {{
{_rows(which)}
}};
static const uint8_t class_blocks[{len(blocks)} * {BLOCK}] = {{
{_rows(cells)}
}};
/* clang-format on */

#endif"""


if __name__ == "__main__":
    print(header(classes(), unicode_version()))
