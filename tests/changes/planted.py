"""Faults planted in a copy of csrc/: the stories have to find each of them.

    python tests/changes/planted.py [NAME...]

A fault is replacements of text, each of which occurs once. The program (tests/c/test_stories.c)
is built with each copy, and tells stories until the first that fails. Before, it tells as many with
csrc/ as it is, and none may fail: else a fault that is found would say nothing.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = int(os.environ.get("PLANTED_STORIES", "200000"))  # at most, for each
DEADLINE = 300.0  # seconds for one; ordinarily one is found in a second


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]  # text that occurs once, and what it becomes


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a settlement gives back what was not charged",
        "limiter.c",
        (
            (
                "    costs[i] = more ? actual[i] - charged[i] : charged[i] - actual[i];\n",
                "    costs[i] = more ? actual[i] - charged[i] : charged[i];\n",
            ),
        ),
    ),
    Fault(
        "a denial by the second limit charges the first",
        "limiter.c",
        (
            (
                "      if (unlikely(!kept)) continue;\n      return FSHM_DENIED;\n",
                "      if (unlikely(!kept)) continue;\n"
                "      return force(c, FSHM_CHARGE, 0, &looks[0]), FSHM_DENIED;\n",
            ),
        ),
    ),
    Fault(
        "finding 1: a window forgets what exceeds n",
        "meter.h",
        (
            (
                "  uint64_t count = min_u64(w.count, WINDOW_MAX_N);\n",
                "  uint64_t count = min_u64(w.count, r->n);\n",
            ),
        ),
    ),
    Fault(
        "finding 1: what exceeds a lowered n becomes debt",
        "meter.h",
        (
            (
                "  return meter_used(old, state, now) <= rule_capacity(r) ||\n"
                "         meter_over(r, *converted) <= meter_over(old, state);\n",
                "  return true;\n",
            ),
        ),
    ),
    Fault(
        "finding 2: a bucket is read under other limits than it was written under",
        "meter.h",
        (
            (
                "  if (tat <= now || (r->num == old->num && r->den == old->den)) return state;\n",
                "  if (tat <= now || old->num) return state;\n",
            ),
        ),
    ),
    Fault(
        "finding 2: a rule's slot is given away while states refer to it",
        "limits.c",
        (
            (
                "    if (named >> slot & 1 || w->labels[slot]) continue;\n",
                "    if (named >> slot & 1) continue;\n",
            ),
        ),
    ),
    Fault(
        "a refund is taken from another window than the charge's",
        "meter.h",
        (
            (
                "w.end < its || w.end - its > unit) return state;",
                "w.end < its || unit == 0) return state;",
            ),
        ),
    ),
    Fault(
        "a refund gives back what has drained since the rate changed",
        "meter.h",
        (("    back = min_u64(back, left);\n", ""),),
    ),
    Fault(
        "a limit goes on from one that was there before, and the one it replaces has no heir",
        "limits.c",
        (
            (
                "__builtin_popcount(left) <= __builtin_popcount(there & ~taken)",
                "left == 0",
            ),
        ),
    ),
)


def plant(fault: Fault | None, folder: pathlib.Path) -> None:
    shutil.copytree(ROOT / "csrc", folder)
    if not fault:
        return
    path = folder / fault.file
    text = path.read_text()
    for old, new in fault.edits:
        if text.count(old) != 1:
            raise SystemExit(f"{fault.name}: its text occurs {text.count(old)} times, not once")
        text = text.replace(old, new)
    path.write_text(text)


def caught(fault: Fault | None) -> str:
    """Empty, or what went wrong. Without a fault, nothing may be caught."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        plant(fault, folder / "csrc")
        program = folder / "test_stories"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        includes = [f"-I{folder / 'csrc'}", f"-I{ROOT / 'tests/c'}"]
        flags = ["-std=c11", "-O1", "-D_GNU_SOURCE", "-pthread", "-w", *includes]
        source = ROOT / "tests/c/test_stories.c"
        command = [*compiler, *flags, str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return f"does not compile\n{built.stderr}"
        try:
            run = subprocess.run(
                [program, str(STORIES)],
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE,
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {DEADLINE} s"
        found = re.search(r"^story (\d+) of seed \d+ failed: ", run.stderr, re.MULTILINE)
        if not fault:
            return "" if run.returncode == 0 else f"fails without a fault\n{run.stderr}"
        if run.returncode != 1 or not found:
            return f"was not found in {STORIES} stories\n{run.stdout}{run.stderr}"
        print(f"{fault.name}: found in story {found[1]}", flush=True)
        return ""


def main() -> int:
    if sound := caught(None):
        print(sound, file=sys.stderr)
        return 1
    wanted = [f for f in FAULTS if f.name in sys.argv[1:] or len(sys.argv) == 1]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(caught, wanted))
    for fault, answer in zip(wanted, answers, strict=True):
        if answer:
            print(f"{fault.name}: {answer}", file=sys.stderr)
    failures = sum(map(bool, answers))
    print(f"{len(answers) - failures} passed, {failures} failed")
    return failures > 0 or not answers


if __name__ == "__main__":
    sys.exit(main())
