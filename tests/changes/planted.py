"""Faults planted in a copy of csrc/: the stories, or another program of tests/c, have to find each.

    python tests/changes/planted.py [NAME...]

A fault is replacements of text, each of which occurs once. The program is built with each copy;
test_stories.c tells stories until the first that fails. Before, each program runs with csrc/ as it
is, and nothing may fail: else a fault that is found would say nothing.
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
STORIES_TOLD = "test_stories"
DEADLINE = 300.0  # seconds for one; ordinarily one is found in a second

# What says that a fault is found: of another program, and of stories.
FOUND = (r"/(\w+\.c:\d+: not so: .*)", r"^(story \d+) of seed \d+ failed: ")


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]  # text that occurs once, and what it becomes
    program: str = STORIES_TOLD  # of tests/c, that has to find it


# In money.c, of fshm_budget_settle().
RELEASED = "release_here(l->segment, process, reserved->id, reserved->entry, amount);"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "a plan reads a bucket's state by its own rule, whichever plan wrote it",
        "limits/limiter.c",
        (
            (
                "  const bool former = unlikely(record != own) && "
                "record_rule(c->s, record, &old, &slack);\n",
                "  const bool former = false;\n",
            ),
        ),
        "test_plans",
    ),
    Fault(
        "what rounding adds to an arrival time is not taken off",
        "limits/plans.h",
        (("  *slack = u - 1;\n", "  *slack = 0;\n"),),
        "test_plans",
    ),
    Fault(
        "the interval of a coarser unit is not longer than the limit's",
        "limits/plans.h",
        (("& ~(u - 1)) + u;\n", "& ~(u - 1));\n"),),
        "test_plans",
    ),
    Fault(
        "a charge of a plan's window makes debt",
        "limits/plans.h",
        (("  fine.n = min_u64((UINT64_C(1) << bits) - 1, WINDOW_MAX_N);\n", ""),),
        "test_plans",
    ),
    Fault(
        "a reset forgets overrides",
        "limits/plans.c",
        (("  if (WHO_PLACE(pair.who) == PLACE_NONE || ", "  if ("),),
        "test_plans",
    ),
    Fault(
        "a settlement gives back what was not charged",
        "limits/limiter.c",
        (
            (
                "    costs[i] = more ? actual[i] - charged[i] : charged[i] - actual[i];\n",
                "    costs[i] = more ? actual[i] - charged[i] : charged[i];\n",
            ),
        ),
    ),
    Fault(
        "a denial by the second limit charges the first",
        "limits/limiter.c",
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
        "limits/algorithms.h",
        (
            (
                "  uint64_t count = min_u64(w.count, WINDOW_MAX_N);\n",
                "  uint64_t count = min_u64(w.count, r->n);\n",
            ),
        ),
    ),
    Fault(
        "finding 1: what exceeds a lowered n becomes debt",
        "limits/algorithms.h",
        (
            (
                "  return rule_used(old, state, now) <= rule_capacity(r) ||\n"
                "         rule_over(r, *converted) <= rule_over(old, state);\n",
                "  return true;\n",
            ),
        ),
    ),
    Fault(
        "a request for nothing makes a debt of what exceeds a lowered n",
        "limits/limiter.c",
        (("(!l->verdict.retry && (cost || sooner))", "!l->verdict.retry"),),
    ),
    Fault(
        "finding 2: a bucket is read under other limits than it was written under",
        "limits/algorithms.h",
        (
            (
                "  if (tat <= now || (r->num == old->num && r->den == old->den)) return state;\n",
                "  if (tat <= now || old->num) return state;\n",
            ),
        ),
    ),
    Fault(
        "finding 2: a rule's index is given away while states refer to it",
        "limits/limit_changes.c",
        (
            (
                "    if (named >> rule_index & 1 || w->labels[rule_index]) continue;\n",
                "    if (named >> rule_index & 1) continue;\n",
            ),
        ),
    ),
    Fault(
        "a refund is taken from another window than the charge's",
        "limits/algorithms.h",
        (
            (
                "w.end < its || w.end - its > unit) return state;",
                "w.end < its || unit == 0) return state;",
            ),
        ),
    ),
    Fault(
        "a refund gives back what has drained since the rate changed",
        "limits/algorithms.h",
        (("    back = min_u64(back, left);\n", ""),),
    ),
    Fault(
        "a limit goes on from one that was there before, and the one it replaces has no heir",
        "limits/limit_changes.c",
        (
            (
                "__builtin_popcount(left) <= __builtin_popcount(there & ~taken)",
                "left == 0",
            ),
        ),
    ),
    Fault(
        "a refund drains at the slower of both rates",
        "limits/algorithms.h",
        (
            (
                "      const uint64_t from = faster ? put->at : now, since = minus(now, from);\n",
                "      const uint64_t from = now + 0 * faster, since = minus(now, from);\n",
            ),
        ),
        "test_algorithm_change",
    ),
    Fault(
        "a refund forgets that a faster rule was in force between",
        "limits/limit_changes.c",
        (
            (
                "fastest = min_u64(fastest, bucket_pace(&rule));\n",
                "continue;\n",
            ),
        ),
    ),
    Fault(
        "a sweep frees a fast rule and does not say so",
        "limits/limit_changes.c",
        (("    if (!note_freed(e, rule_index, version)) continue;\n", ""),),
        "test_limits",
    ),
    Fault(
        "permits are counted by limits that have changed meanwhile",
        "permits/semaphore.c",
        (("    if (load_relaxed(&e->current) != snapshot->current) continue;\n", ""),),
        "test_turns",
    ),
    Fault(
        "an undo brings back a rule that a sweep has freed",
        "limits/limiter.c",
        (
            (
                "    if (!shared && ours && (before.who == l->who || !before.who)) {\n"
                "      found.who = l->who;\n",
                "    if (!shared && ours) {\n      found.who = before.who ? before.who : l->who;\n",
            ),
        ),
        "test_turns",
    ),
    Fault(
        "a rule is named for an earlier version than it was",
        "limits/limit_changes.c",
        (
            (
                "    if (owner >= (RULE_USED | version) ||\n",
                "    if (owner == (RULE_USED | version) ||\n",
            ),
        ),
        "test_turns",
    ),
    Fault(
        "a sweep goes by the time that it began at, and by newer limits",
        "limits/limit_changes.c",
        (("      if (!w->fixed) w->now", "      if (false) w->now"),),
        "test_turns",
    ),
    Fault(
        "a sweep of the version of who was killed",
        "limits/limit_changes.c",
        (
            (
                "  uint64_t version = CURRENT_VERSION(CURRENT_VERSION(current) + 1);\n"
                "  version += !version;\n  uint64_t rest",
                "  uint64_t version = CURRENT_VERSION(current);\n  uint64_t rest",
            ),
        ),
        "test_turns",
    ),
    Fault(
        "the last rule of a limit that is there no more may go",
        "limits/limit_changes.c",
        (("  unsigned kept = last_rules(&w);\n", "  unsigned kept = 0;\n"),),
        "test_limits",
    ),
    Fault(
        "a taker that gives up does not say how many are held",
        "permits/semaphore.c",
        (
            (
                "  *held = 1; /* our own permit, which is given back;",
                "  /* ours, that is given back;",
            ),
        ),
        "test_turns",
    ),
    Fault(
        "a process that joins is called dead",
        "stats/deployments.c",
        (("!load_relaxed(&p->pid) ||", ""),),
        "test_money",
    ),
    Fault(
        "the last round ends without an answer",
        "limits/money.c",
        (("      round--; ", "      "),),
        "test_budget_stories",
    ),
    Fault(
        "a settlement is spent twice",
        "limits/money.c",
        (("money_add(&m, 0, (int64_t)actual, ADD,", "money_add(&m, 0, 2 * (int64_t)actual, ADD,"),),
        "test_budget_stories",
    ),
    Fault(
        "what was charged for a reservation is taken back twice",
        "limits/money.c",
        (
            (
                "(int64_t)actual - (int64_t)amount, CORRECT",
                "(int64_t)actual - 2 * (int64_t)amount, CORRECT",
            ),
        ),
        "test_budget_stories",
    ),
    Fault(
        "a reservation is given back twice",
        "limits/money.c",
        (
            (
                "  if (!reserved->direct) release_here(",
                f"  if (!reserved->direct) {RELEASED}\n  if (!reserved->direct) release_here(",
            ),
        ),
        "test_budget_stories",
    ),
    Fault(
        "a reservation is given back from the entry of another one",
        "limits/money.c",
        (("[entry % RESERVED_WAYS]", "[entry * 0]"),),
        "test_money",
    ),
    Fault(
        "a reset that a correction does not know of",
        "limits/money.c",
        (("(a.window != window || money_id(m) != id)", "a.window != window"),),
        "test_money",
    ),
    Fault(
        "a refund below nothing",
        "limits/money.c",
        (("  if (by < 0) return minus(amount, (uint64_t)-by);\n", ""),),
        "test_budget_stories",
    ),
    Fault(
        "a grant of another window",
        "limits/money.c",
        (
            ("    if (how == RAISE && m->p.rules[0].unit != window) return FSHM_DENIED;\n", ""),
            (
                "      return likely(!m->window) || m->p.rules[0].unit == m->window ? FSHM_OK : "
                "FSHM_DENIED;\n",
                "      return FSHM_OK;\n",
            ),
        ),
        "test_budget_stories",
    ),
    *(
        Fault(f"{what} that ends a minute late", "limits/calendar.h", ((old, new),), program)
        for what, old, new, program in (
            (
                "an hour",
                "(floor_div(local, 60) + 1) * 60;",
                "(floor_div(local, 60) + 1) * 60 + 1;",
                "test_calendar",
            ),
            (
                "a day",
                "return (days + 1) * 1440;",
                "return (days + 1) * 1440 + 1;",
                "test_budget_stories",
            ),
            (
                "a month",
                "days_of(year, month + 1)) * 1440;",
                "days_of(year, month + 1)) * 1440 + 1;",
                "test_budget_stories",
            ),
        )
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


def caught(fault: Fault | None, told_by: str) -> str:
    """Empty, or what went wrong. Without a fault, nothing may be caught."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        plant(fault, folder / "csrc")
        shutil.copytree(ROOT / "tests/c", folder / "tests/c")
        program = folder / told_by
        compiler = shlex.split(os.environ.get("CC", "cc"))
        includes = [f"-I{folder / 'csrc'}", f"-I{folder / 'tests/c'}"]
        flags = ["-std=c11", "-O1", "-D_GNU_SOURCE", "-pthread", "-w", *includes]
        source = folder / f"tests/c/{told_by}.c"
        command = [*compiler, *flags, str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return f"does not compile\n{built.stderr}"
        try:
            run = subprocess.run(
                [program, *([str(STORIES)] if told_by == STORIES_TOLD else [])],
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE,
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {DEADLINE} s"
        found = re.search(FOUND[told_by == STORIES_TOLD], run.stderr, re.MULTILINE)
        if not fault:
            return "" if run.returncode == 0 else f"fails without a fault\n{run.stderr}"
        if run.returncode != 1 or not found:
            return f"was not found\n{run.stdout}{run.stderr}"
        print(f"{fault.name}: found: {found[1]}", flush=True)
        return ""


def main() -> int:
    wanted = [f for f in FAULTS if f.name in sys.argv[1:] or len(sys.argv) == 1]
    for program in sorted({f.program for f in wanted}):
        if sound := caught(None, program):
            print(sound, file=sys.stderr)
            return 1
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda fault: caught(fault, fault.program), wanted))
    for fault, answer in zip(wanted, answers, strict=True):
        if answer:
            print(f"{fault.name}: {answer}", file=sys.stderr)
    failures = sum(map(bool, answers))
    print(f"{len(answers) - failures} passed, {failures} failed")
    return failures > 0 or not answers


if __name__ == "__main__":
    sys.exit(main())
