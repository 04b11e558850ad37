"""Faults planted in a copy of csrc/: the check of histories has to find each of them.

    python tests/linear/planted.py [NAME...]

A fault is one replacement of text that occurs exactly once. The program is built with each copy,
and run on the kind of histories that the fault belongs to, until the first failure.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
HISTORIES = int(os.environ.get("PLANTED_HISTORIES", "20000"))  # at most, for each
FOUND = (
    ": not linearisable",
    ": decided by limits",
    ": not served in order",
    ": a process did not come",  # to its end: it sleeps for ever
)
DEADLINE = 120.0  # seconds for one; ordinarily one is found in a second


@dataclass(frozen=True)
class Fault:
    name: str
    kind: str  # of histories
    file: str
    old: str
    new: str
    also: tuple[str, str, str] | None = None  # a second one: file, text, what it becomes


SWAP = "    return pair_cas(&c->s->slots[f->slot], &seen, to) ? CLAIMED : CLAIM_LOST;\n"
TAKE = "  if (unlikely(!pair_cas(&h->s->slots[f.slot], &f.pair, mine))) return PERMIT_UNKNOWN;\n"
NO_ROOM = "    if (l->verdict.retry && !may_wait(c, op, 0, l)) {\n"
UNDO = "    for (uint32_t k = i - 1; k-- > 0;) undo(c, k, &looks[k], before[k]);\n"
PUT = "  return token_lease_put(state, now, lease->tokens, lease->kept, lease->until_ns);\n"
LOST = "      status = next == m.state ? CLAIMED : put_changed(&c, i, &found, next, &first);\n"
LOST_TWICE = (
    LOST + "      if (status == CLAIM_LOST) {\n"
    "        table_find(c.s, c.hash, fingerprint(&c, i), &found.slot);\n"
    "        (void)put_changed(&c, i, &found, next, &first);\n      }\n"
)
LOAD = "  bool readable = limits_load_inline(l->segment, l->index, &c->snapshot);\n"
OUTDATED = "  return unlikely(entry_current(c->s, c->index) != c->snapshot.current);\n"
LOAD_SELDOM = (
    "  static snapshot_t kept;\n  static const fshm_limiter *of;\n  bool readable = true;\n"
    "  const uint64_t seen = entry_current(l->segment, l->index);\n"
    "  if (of == l && !((seen ^ kept.current) >> VERSION_BITS))\n    c->snapshot = kept;\n"
    "  else\n    readable = limits_load_inline(l->segment, l->index, &c->snapshot);\n"
    "  kept = c->snapshot;\n  of = l;\n"
)
FREE = "state_ends(s, pair.who, pair.when) <= over"
WAKES = "  if (unlikely(wait_any(h.s, p->group))) wake_next(h.s, p);\n"
GIVEN_BACK = "  if (!give_back(&h, p)) return 0;\n"

FAULTS = (
    Fault(
        "a lost swap counts as done",
        "window",
        "limits/limiter.c",
        SWAP,
        "    (void)pair_cas(&c->s->slots[f->slot], &seen, to);\n    return CLAIMED;\n",
    ),
    Fault(
        "load and store in place of the swap",
        "bucket",
        "limits/limiter.c",
        SWAP,
        "    (void)pair_load(&c->s->slots[f->slot]);\n"
        "    store_relaxed(&c->s->slots[f->slot].when, to.when);\n    return CLAIMED;\n",
    ),
    Fault(
        "a denial charges",
        "sliding",
        "limits/limiter.c",
        NO_ROOM,
        NO_ROOM + "      if (op == FSHM_ACQUIRE) (void)force(c, FSHM_CHARGE, 0, l);\n",
    ),
    Fault(
        "a lost swap is a denial",
        "window",
        "limits/limiter.c",
        "    if (status == CLAIM_FULL) return FSHM_FULL;\n  }\n  return FSHM_CONTENDED;\n",
        "    return status == CLAIM_FULL ? FSHM_FULL : FSHM_DENIED;\n  }\n"
        "  return FSHM_CONTENDED;\n",
    ),
    Fault("what was charged is not undone", "several", "limits/limiter.c", UNDO, ""),
    Fault(
        "undone by putting back what was there",
        "several",
        "limits/limiter.c",
        "    const bool ours = found.slot.pair.when == l->verdict.next "
        "&& found.slot.pair.who == l->who;\n",
        "    const bool ours = true;\n",
    ),
    Fault(
        "a claim is confirmed without looking again",
        "keys",
        "core/hash_table.c",
        "      if (slot + k == mine.slot) continue;\n",
        "      if (slot + k <= s->slot_count) continue;\n",
    ),
    Fault(
        "a live key's slot is given away",
        "keys",
        "core/hash_table.c",
        FREE,
        "state_expires(pair.when) <= now + 5000",
    ),
    Fault(
        "a first state as of the time before the claim",
        "claims",
        "limits/limiter.c",
        "  uint64_t now = fresh_now(c), cost = c->costs[f->i];\n",
        "  uint64_t now = c->now, cost = c->costs[f->i];\n",
    ),
    Fault(
        "a look at limits that have changed counts",
        "changes-bucket",
        "limits/limiter.c",
        "  } while (unlikely(c->stale) && again(c));\n",
        "  } while (0);\n",
    ),
    Fault(
        "a lost swap of a permit counts as taken",
        "permits",
        "permits/semaphore.c",
        TAKE,
        "  (void)pair_cas(&h->s->slots[f.slot], &f.pair, mine);\n",
    ),
    Fault(
        "a dead process's permits stay",
        "permits",
        "permits/semaphore.c",
        "(!liveness || owner_alive(h->s, f.pair.when, liveness))",
        "true",
    ),
    Fault("a release wakes none", "queue", "permits/semaphore.c", WAKES, ""),
    Fault(
        "a release wakes before the permit is free",
        "queue",
        "permits/semaphore.c",
        WAKES,
        "",
        ("permits/semaphore.c", GIVEN_BACK, WAKES + GIVEN_BACK),
    ),
    Fault(
        "a caller that leaves the queue wakes none",
        "queue",
        "permits/wait_queue.c",
        "  if (more || atomic_load(&s->waiters[p->entry].wake) != p->woken) "
        "wait_wake_more(s, p->key);\n",
        "  (void)more;\n",
    ),
    Fault(
        "the reach is the same again after a caller came",
        "queue",
        "permits/wait_queue.c",
        "&seen, ((seen >> 32) + 1) << 32 | reach",
        "&seen, (seen >> 32) << 32 | reach",
    ),
    Fault(
        "priorities count for nothing",
        "queue",
        "permits/wait_order.h",
        "  if (band_a != band_b) return band_a > band_b;\n",
        "  (void)band_a, (void)band_b;\n",
    ),
    Fault(
        "who came last is first",
        "queue",
        "permits/wait_order.h",
        "return a->since < b->since;",
        "return a->since > b->since;",
    ),
    Fault(
        "services count for nothing",
        "queue",
        "permits/wait_order.h",
        "    if (ahead) return ahead < 0;\n",
        "    (void)ahead;\n",
    ),
    Fault(
        "a permit is kept when the rate limits have no room",
        "admit",
        "permits/semaphore.c",
        "if (out->status != FSHM_ALLOWED && permit->held) (void)fshm_permit_release(l, permit);",
        "",
    ),
    Fault(
        "a lost swap of a batch counts as put",
        "token-lease",
        "limits/limiter.c",
        SWAP,
        "    (void)pair_cas(&c->s->slots[f->slot], &seen, to);\n    return CLAIMED;\n",
    ),
    Fault(
        "what is told to be taken out is what a lost swap saw",
        "token-lease",
        "limits/limiter.c",
        "      if (before) before[i] = m.state;\n",
        "      if (before && c.tries == 1) before[i] = m.state;\n",
    ),
    Fault(
        "a token lease is spent after its end",
        "token-lease",
        "leasing/token_lease.c",
        "key, key_length, costs, now, &spent, put);\n",
        "key, key_length, costs,\n"
        "                   minus(now ? now : segment_now(leases->segment), 200), &spent, put);\n",
    ),
    Fault(
        "tokens beyond the present limit's bits are forgotten",
        "changes-window",
        "limits/algorithms.h",
        "  uint64_t count = min_u64(w.count, WINDOW_MAX_N);\n",
        "  uint64_t count = min_u64(w.count, (UINT64_C(1) << bit_length(r->n)) - 1);\n",
    ),
    Fault(
        "a request for nothing is denied by what the limit was before",
        "changes-kind",
        "limits/limiter.c",
        "  const bool fits = !cost && (r->kind != FSHM_BUCKET || used <= most);\n",
        "  const bool fits = !cost && (old.kind != FSHM_BUCKET || used <= most);\n",
    ),
    Fault(
        "a rule's index goes to another without a sweep",
        "changes-bucket",
        "limits/limit_changes.c",
        "    if ((holder & RULE_USED) || (holder && owner_lives(s, holder))) continue;\n",
        "    bool named = false;\n"
        "    const uint64_t set = load_relaxed(&e->set);\n"
        "    for (uint32_t k = 0; k < SET_COUNT(set); k++) named |= SET_RULE(set, k) == i;\n"
        "    if (named || (!(holder & RULE_USED) && holder && owner_lives(s, holder))) continue;\n",
    ),
    Fault(
        "the limits are not looked at after the slot",
        "changes-bucket",
        "limits/call.h",
        OUTDATED,
        "  (void)c;\n  return false;\n",
    ),
    Fault(
        "a call goes by the limits of the call before, until the next sweep",
        "changes-window",
        "limits/limiter.c",
        LOAD,
        LOAD_SELDOM,
        (
            "limits/call.h",
            OUTDATED,
            "  return (entry_current(c->s, c->index) ^ c->snapshot.current) >> VERSION_BITS;\n",
        ),
    ),
    Fault(
        "a decision tells the version of the last one by the same limits",
        "changes-window",
        "limits/limiter.c",
        "  out->version = CURRENT_VERSION(c->snapshot.current);\n",
        "  static uint64_t told;\n  static rule_t by;\n"
        "  if (memcmp(&by, &c->snapshot.rules[0], sizeof by)) "
        "told = CURRENT_VERSION(c->snapshot.current);\n"
        "  by = c->snapshot.rules[0];\n  out->version = told;\n",
    ),
    Fault(
        "a sweep by the limits that it began with",
        "changes-sweeps",
        "limits/limit_changes.c",
        "    if (entry_current(w->s, w->index) != w->snapshot.current) {\n",
        "    if (false) {\n",
    ),
    Fault(
        "a permit beyond the present limit stands uncounted",
        "changes-permits",
        "permits/semaphore.c",
        "    if (unlikely(number >= snapshot->permits && !said)) {\n",
        "    if (unlikely(number > MAX_PERMITS)) {\n",
    ),
    Fault(
        "a batch prolongs what is left",
        "token-lease",
        "leasing/token_lease.c",
        PUT,
        PUT.replace("lease->kept", "UINT64_MAX"),
    ),
    Fault(
        "a batch is put in twice where its swap was lost",
        "token-lease",
        "limits/limiter.c",
        LOST,
        LOST_TWICE,
    ),
    Fault(
        "a spend of several token leases is not undone",
        "token-leases",
        "limits/limiter.c",
        UNDO,
        "",
    ),
    Fault(
        "a slot that went to another token lease is written to",
        "token-lease-keys",
        "limits/limiter.c",
        "    pair_t seen = f->pair, to = {l->who, next};\n",
        "    pair_t seen = pair_load(&c->s->slots[f->slot]), to = {l->who, next};\n",
    ),
)


def plant(fault: Fault, folder: pathlib.Path) -> None:
    shutil.copytree(ROOT / "csrc", folder)
    first = (fault.file, fault.old, fault.new)
    for file, old, new in (first, *([fault.also] if fault.also else [])):
        text = (folder / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{fault.name}: its text occurs {text.count(old)} times, not once")
        (folder / file).write_text(text.replace(old, new))


def caught(fault: Fault) -> str:
    """Empty, or what went wrong."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        plant(fault, folder / "csrc")
        program = folder / "linearize"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        flags = ["-std=c11", "-O1", "-D_GNU_SOURCE", f"-I{folder / 'csrc'}", "-pthread", "-w"]
        command = [*compiler, *flags, str(HERE / "linearize.c"), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return f"does not compile\n{built.stderr}"
        try:
            run = subprocess.run(
                [program, "-f", "-k", fault.kind, "-n", str(HISTORIES)],
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE,
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {DEADLINE} s"
        if run.returncode != 1 or not any(word in run.stderr for word in FOUND):
            return f"was not found in {HISTORIES} histories\n{run.stdout}{run.stderr}"
        found = run.stderr.split(": history ")[1].split(" of ")[0]
        print(f"{fault.name}: found in history {found} of {fault.kind}", flush=True)
        return ""


def main() -> int:
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
