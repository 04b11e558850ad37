"""The crash harness finds what it is there to find: faults are planted in a copy of the library's
source, and it must fail, and name the operation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds: far above what a build or a run takes on a busy machine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the harness traces x86-64 Linux processes",
)


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]  # exact source text, which occurs once, and what it becomes
    operation: str  # that is tried, and must fail
    symptom: str  # in what the harness says


# In limits.c, of publish(): both calls of raise_most() behind the swap of `current`.
MOST_AFTER_SWAP = (
    (
        "    raise_most(e, present, has); /* before anybody can see the set */\n"
        "    raise_most(e, rules, count);\n",
        "",
    ),
    (
        "      /* Named slots need no owner;",
        "      raise_most(e, present, has);\n"
        "      raise_most(e, rules, count);\n"
        "      /* Named slots need no owner;",
    ),
)

# In wallet.c, of change_all().
PUT_OF_ALL = "        status = keyed_put(&c->k, c->k.hash, &f, c->k.who, next, first_change, c);\n"

FAULTS = [
    Fault(
        "a counter beside the permits",
        "lease.c",
        (
            (
                "  for (int pass = 0; pass < 2; pass++) { /* the second asks who is dead */\n",
                "  _Atomic uint32_t *counter = &h->s->header->bells[255];\n"
                "  if (atomic_fetch_add(counter, 1) >= n) {\n"
                "    (void)atomic_fetch_sub(counter, 1);\n"
                "    *held = n;\n"
                "    return FSHM_DENIED;\n"
                "  }\n"
                "  for (int pass = 0; pass < 2; pass++) {\n",
            ),
            (
                "  if (!give_back(&h, p)) return 0;\n",
                "  if (!give_back(&h, p)) return 0;\n"
                "  (void)atomic_fetch_sub(&h.s->header->bells[255], 1);\n",
            ),
        ),
        "permit-free",
        "can be taken",
    ),
    Fault(
        "a claim without its second look",
        "cells.c",
        (("      if (cell + k == mine.cell) continue;\n", "      continue;\n"),),
        "pair-same-key-tenant",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "a spin lock around the swap",
        "limiter.c",
        (
            (
                "    return pair_cas(&c->s->cells[f->cell], &seen, to) ? CLAIMED : CLAIM_LOST;\n",
                "    while (atomic_exchange(&c->s->header->bells[255], 1)) continue;\n"
                "    bool done = pair_cas(&c->s->cells[f->cell], &seen, to);\n"
                "    atomic_store(&c->s->header->bells[255], 0);\n"
                "    return done ? CLAIMED : CLAIM_LOST;\n",
            ),
        ),
        "check-bucket",
        "not finished within",
    ),
    Fault(
        "a charge that is not undone",
        "limiter.c",
        (("undo(c, k, &looks[k], before[k]);", "(void)before[k];"),),
        "multi-undo",
        "is not undone",
    ),
    Fault(
        "limits that are named before they are written",
        "limits.c",
        (
            (
                "    store_relaxed(&e->slots[slot].count, count);\n"
                "    for (uint32_t i = 0; i < count; i++)\n"
                "      for (unsigned k = 0; k < RULE_WORDS; k++)\n"
                "        store_relaxed(&e->slots[slot].rules[i][k], rules[i].words[k]);\n",
                "",
            ),
            (
                "      /* Named slots need no owner;",
                "      store_relaxed(&e->slots[slot].count, count);\n"
                "      for (uint32_t i = 0; i < count; i++)\n"
                "        for (unsigned k = 0; k < RULE_WORDS; k++)\n"
                "          store_relaxed(&e->slots[slot].rules[i][k], rules[i].words[k]);\n"
                "      /* Named slots need no owner;",
            ),
        ),
        "limits-change",
        "limits",
    ),
    Fault(
        "a process that takes a slot without a new generation",
        "process.c",
        (
            (
                "atomic_fetch_add(&p->generation, 1) + 1",
                "atomic_load(&p->generation)",
            ),
        ),
        "join-after-holder",
        "T is stopped, and 0 can be taken, not 2",
    ),
    Fault(
        "a confirmation that does not compare the ticket",
        "cells.c",
        (
            (
                "  expect = mine.pair;\n  pair_t confirmed",
                "  expect = pair_load(&s->cells[mine.cell]);\n"
                "  if (expect.who != mine.pair.who) return CLAIM_LOST;\n"
                "  pair_t confirmed",
            ),
        ),
        "pair-same-key-bucket",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "no second look at a table full of dead permits",
        "lease.c",
        (("return any || cells_room(s, hash, who, now);", "return any;"),),
        "insert-over-dead-permits",
        "1 were admitted, not 2",
    ),
    Fault(
        "a segment that is named before it is filled",
        "image.c",
        (
            (
                "  int status = fill(fd, capacity, mode, flags, e);\n"
                "  if (status == FSHM_OK && publish_file(",
                "  int status = FSHM_OK;\n  if (publish_file(",
            ),
            (
                "  int saved = errno;\n  if (!unnamed)",
                "  if (status == FSHM_OK) status = fill(fd, capacity, mode, flags, e);\n"
                "  int saved = errno;\n  if (!unnamed)",
            ),
        ),
        "create",
        "S is answered",
    ),
    Fault(
        "a lock file that is announced before it is named",
        "process.c",
        (
            ("&s->header->lock_file, &known, st->st_ino,\n", "&s->header->lock_file, &known, 1,\n"),
            (
                "    known = st->st_ino;\n  if (!wrong && known",
                "    store_relaxed(&s->header->lock_file, known = st->st_ino);\n"
                "  if (!wrong && known",
            ),
        ),
        "first-join",
        "the next to come cannot join",
    ),
    Fault(
        "who owns a slot counts as the owner of what it held before",
        "process.c",
        (("ALIVE(slot)) && !has_ended(", "OWNED(slot)) && !has_ended("),),
        "join-after-holder",
        "T is stopped, and 0 can be taken, not 2",
    ),
    Fault(
        "a leader that is not asked whether it lives",
        "process.c",
        (("word && process_alive(s, slot) ? slot", "word ? slot"),),
        "lead-after-dead",
        "somebody leads at the beginning",
    ),
    Fault(
        "limits of permits that are set before it is said how many may be held",
        "limits.c",
        MOST_AFTER_SWAP,
        "permits-lower",
        "can be taken, not 0",
    ),
    Fault(
        "the same beside a taker",
        "limits.c",
        MOST_AFTER_SWAP,
        "pair-publish-admit",
        "more than the limit that it has seen",
    ),
    Fault(
        "a release that does not compare the owner",
        "lease.c",
        (
            (
                "&h.identity) || (p->when & IDENTITY_MASK) != h.identity) return 0;\n"
                "  if (!give_back",
                "&h.identity)) return 0;\n  if (!give_back",
            ),
        ),
        "permit-release",
        "a forked child has released its parent's permit",
    ),
    Fault(
        "a path that goes by the clock",
        "limiter.c",
        (
            (
                "  out->version = CURRENT_VERSION(c->plan.current);\n",
                "  out->version = CURRENT_VERSION(c->plan.current);\n"
                "  if (fshm_clock() >> 8 & 1)\n"
                '    __asm__ volatile(".rept 100\\nnop\\n.endr");\n'
                "  else\n"
                '    __asm__ volatile(".rept 100\\nnop\\n.endr");\n',
            ),
        ),
        "check-bucket",
        "are not on the recorded path",
    ),
    Fault(
        "a slot that is taken before the head knows it",
        "moving.c",
        (
            (
                "  int status = head_put(m, h, turn_after(m, h->turn, ahead[1]));\n",
                "  int status = CLAIMED;\n",
            ),
            (
                "  if (status == CLAIM_FULL) return FSHM_FULL;\n",
                "  if (status == CLAIMED)\n"
                "    status = head_put(m, h, turn_after(m, h->turn, ahead[1]));\n"
                "  if (status == CLAIM_FULL) return FSHM_FULL;\n",
            ),
        ),
        "moving-next",
        "it shows",
    ),
    Fault(
        "tokens of a hit that failed are kept",
        "moving.c",
        (("    if (status != FSHM_ALLOWED) return_tokens(m, tokens, count);\n", ""),),
        "pair-moving-several",
        "tokens",
    ),
    Fault(
        "a token is put over whatever the slot holds",
        "moving.c",
        (
            (
                "  slot_claim_t first = {m, slot, token_state(m, m->k.now), left};\n",
                "  found_t now;\n"
                "  (void)slot_look(m, slot, &now);\n"
                "  if (now.pair.who) *f = now;\n"
                "  slot_claim_t first = {m, slot, token_state(m, m->k.now), left};\n",
            ),
        ),
        "pair-moving-only",
        "what fits",
    ),
    Fault(
        "a clear that forgets the head first",
        "moving.c",
        (
            (
                "  head_t h = head_look(&m);\n  for",
                "  head_t h = head_look(&m);\n"
                "  if (h.cell.pair.who) cells_clear(m.k.s, h.cell.cell, h.cell.pair.who);\n  for",
            ),
        ),
        "moving-clear",
        "it shows",
    ),
    Fault(
        "a batch goes into what was looked at before",
        "wallet.c",
        (
            (
                PUT_OF_ALL,
                "        cells_find(c->k.s, c->k.hash, c->k.who, &f),\n" + PUT_OF_ALL,
            ),
        ),
        "wallet-put",
        "are left after both",
    ),
    Fault(
        "what is taken out is left as well",
        "wallet.c",
        (("  return state - wallet_left(state, now);\n", "  (void)now;\n  return state;\n"),),
        "wallet-take",
        "are left",
    ),
    Fault(
        "a slot beyond what was lowered stands, since few are held",
        "lease.c",
        (("    if (slot >= most) return false;\n", ""),),
        "pair-lease-shrink",
        "more than is allowed",
    ),
    Fault(
        "slots are not looked at before an allowance is clean again",
        "allowance.c",
        (
            (
                "  return lease_count(permits, key, length, allowance) == 0;\n",
                "  (void)permits, (void)key, (void)length;\n  return true;\n",
            ),
        ),
        "lease-put-lowered",
        "can be held",
    ),
    Fault(
        "what is taken without a grant is forgotten by the next",
        "allowance.c",
        (("  if (!allowance_clean(word) && !before) return false;", "  "),),
        "pair-lease-alone",
        "what is allowed",
    ),
    Fault(
        "a spin lock around what the grantor told",
        "wallet.c",
        (
            (
                "  change_t c = {.change = change_learn, .context = &known};\n"
                "  return change_all(l, key, key_length, now, &c, NULL);\n",
                "  change_t c = {.change = change_learn, .context = &known};\n"
                "  while (atomic_exchange(&l->segment->header->bells[255], 1)) continue;\n"
                "  int status = change_all(l, key, key_length, now, &c, NULL);\n"
                "  atomic_store(&l->segment->header->bells[255], 0);\n"
                "  return status;\n",
            ),
        ),
        "learn-first",
        "not finished within",
    ),
    Fault(
        "a refusal that is forgotten before it is written",
        "wallet.c",
        (
            (
                "  change_t c = {.change = change_refuse, .context = &refusal};\n",
                "  const refusal_t none = {costs, 0};\n"
                "  change_t c = {.change = change_refuse, .context = &none};\n"
                "  (void)change_all(refused, key, key_length, now, &c, NULL);\n"
                "  c.context = &refusal;\n",
            ),
        ),
        "refuse",
        "limit 0: 0 for",
    ),
    Fault(
        "a sum of a metric that is not added at once",
        "metric.c",
        (
            (
                "  (void)add_relaxed(&h->sum, ns * weight);\n",
                "  store_relaxed(&h->sum, load_relaxed(&h->sum) + ns * weight);\n",
            ),
        ),
        "metric-record",
        "time: 5000, of 2 records",
    ),
    Fault(
        "no cooldown is ever set",
        "route.c",
        (("  if (cooldown_ns && failures_of(next) > allowed_fails) {", "  if (false) {"),),
        "deployment-record-failure",
        "cools down for 0 ns",
    ),
]


def plant(fault: Fault, folder: Path) -> None:
    shutil.copytree(ROOT / "csrc", folder)
    path = folder / fault.file
    text = path.read_text()
    for before, after in fault.edits:
        assert text.count(before) == 1, f"{fault.file} has not exactly one: {before}"
        text = text.replace(before, after)
    path.write_text(text)


def build(folder: Path) -> Path:
    harness = folder / "crash" / "harness"
    make = [
        "make",
        "-s",
        "CFLAGS=-O1",  # at -O0 paths differ by some instructions between runs
        f"BUILD={folder}",
        f"CRASH_CSRC={folder / 'csrc'}",
        str(harness),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
    made = subprocess.run(
        make,
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert made.returncode == 0, made.stderr
    return harness


def run(harness: Path, *options: str) -> tuple[int, str]:
    ran = subprocess.run(
        [harness, "--jobs", "1", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    plant(fault, tmp_path / "csrc")
    harness = build(tmp_path)
    code, said = run(harness, "--only", fault.operation, "--every", "50")
    assert code == 1, said
    assert f"FAILED {fault.operation}" in said
    assert fault.symptom in said
    assert re.search(r"\n\d+ passed, [1-9]\d* failed\n", said)
    # What it says about repeating it is so.
    again = re.search(r"CRASH='(--only \S+ --at \d+)'", said)
    if again and "--at 0" not in again[1]:
        code, said = run(harness, *again[1].split())
        assert code == 1, said
        assert f"FAILED {fault.operation}" in said
