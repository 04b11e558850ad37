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


# In limit_changes.c, of publish(): the swap that names the rules.
SWAP_OF_LIMITS = "    bool ok = pair_cas(&e->current, &seen, next);\n"
RAISE_MOST = "raise_most(e, (uint32_t)max_u64(permits_in(present, has), permits_in(rules, count)))"
MOST_AFTER_SWAP = (
    (f"    if (!{RAISE_MOST})\n      break;\n", ""),
    (SWAP_OF_LIMITS, f"{SWAP_OF_LIMITS}    if (ok) (void){RAISE_MOST};\n"),
)

# In limiter.c, of limiter_change().
PUT_OF_ALL = (
    "      status =\n"
    "          next == m.state ? CLAIMED : "
    "put_changed(&c, i, &found, as_kept_by(&c, i, next), &first);\n"
)
LEARN = "limiter_change(l, key, key_length, now, change_learn, &known, NULL, &at);\n"
REFUSE = "limiter_change(refused, key, key_length, now, change_refuse, &refusal, NULL, &at);\n"
FILL = "      if (indexes[i] < 0) fill_rule(e, (unsigned)mine[i], &rules[i], version);\n"
NOT_OURS = (
    "    for (uint32_t i = 0; i < count; i++)\n"
    "      if (indexes[i] < 0) mine[i] = -1;\n"
    "    if (!ok) continue;\n"
)

# In money.c, of fshm_budget_settle().
RELEASE_RESERVED = (
    "  if (!reserved->direct) "
    "release_here(l->segment, process, reserved->id, reserved->entry, amount);\n"
)
TRY_HOME = "  const int status = try_home(h, number, out);\n"

FAULTS = [
    Fault(
        "a counter beside the permits",
        "permits/semaphore.c",
        (
            (
                TRY_HOME,
                "  _Atomic uint64_t *counter = &h->s->header->queues[WAIT_GROUPS - 1];\n"
                "  if (atomic_fetch_add(counter, 1) >= n) {\n"
                "    (void)atomic_fetch_sub(counter, 1);\n"
                "    *held = n;\n"
                "    return FSHM_DENIED;\n"
                "  }\n" + TRY_HOME,
            ),
            (
                "  if (!give_back(&h, p)) return 0;\n",
                "  if (!give_back(&h, p)) return 0;\n"
                "  (void)atomic_fetch_sub(&h.s->header->queues[WAIT_GROUPS - 1], 1);\n",
            ),
        ),
        "permit-free",
        "can be taken",
    ),
    Fault(
        "a caller that leaves the queue and wakes none",
        "permits/wait_queue.c",
        (
            (
                "  if (more || atomic_load(&s->waiters[p->entry].wake) != p->woken) "
                "wait_wake_more(s, p->key);\n",
                "  (void)more;\n",
            ),
        ),
        "queue-leave-woken",
        "a permit is free, and S",
    ),
    Fault(
        "a release that wakes none",
        "permits/semaphore.c",
        (("  if (unlikely(wait_any(h.s, p->group))) wake_next(h.s, p);\n", ""),),
        "queue-release",
        "a permit is free, and S",
    ),
    Fault(
        "a place that counts as abandoned while it is taken",
        "permits/wait_queue.c",
        (("    store_relaxed(&e->seen, now);\n    /* From free", "    /* From free"),),
        "queue-join-after-dead",
        "S has lost its place",
    ),
    Fault(
        "a dead caller that is before the others",
        "permits/wait_queue.c",
        (("is_past(seen, now, LATE_NS, AHEAD_NS)", "is_past(seen, now, ABANDONED_NS, AHEAD_NS)"),),
        "queue-turn-first",
        "a caller that",
    ),
    Fault(
        "a service that is read and written apart",
        "permits/wait_queue.c",
        (
            (
                "    if (pair_cas(&s->slots[f.slot], &seen, to)) return true;\n",
                "    seen = pair_load(&s->slots[f.slot]);\n"
                "    if (pair_cas(&s->slots[f.slot], &seen, to)) return true;\n",
            ),
        ),
        "queue-served",
        "of two services",
    ),
    Fault(
        "a caller that keeps a wake-up although another is first",
        "permits/wait_queue.c",
        (
            (
                "    if (woken || p->units || p->was_first) wait_wake_more(s, p->key);\n",
                "",
            ),
        ),
        "queue-turn-woken",
        "a permit is free, and S",
    ),
    Fault(
        "a line whose first caller goes, and wakes none",
        "permits/wait_queue.c",
        (("  if (more)\n    wait_wake_more(s, p->key);\n  else\n", "  if (!more)\n"),),
        "queue-requeue-woken",
        "a permit is free, and S",
    ),
    Fault(
        "a reap that wakes none",
        "permits/semaphore.c",
        (("  if (freed) wait_wake_all(s);\n", ""),),
        "queue-reap",
        "a permit is free, and S",
    ),
    Fault(
        "a reach that is the same again after a caller came",
        "permits/wait_queue.c",
        (("&seen, ((seen >> 32) + 1) << 32 | reach", "&seen, (seen >> 32) << 32 | reach"),),
        "queue-leave-last",
        "0 wait",
    ),
    Fault(
        "a damaged reach that stays",
        "permits/wait_queue.c",
        (
            (
                "  if (reach_of(s, group) <= nth) raise_reach(s, group, nth + 1);",
                "  (void)group, (void)nth;",
            ),
        ),
        "queue-turn-unreached",
        "a permit is free, and S",
    ),
    Fault(
        "a thread that watches is woken before the place is",
        "permits/wait_queue.c",
        (
            (
                "  (void)atomic_fetch_add(&e->wake, what);\n  if (!load_relaxed(&e->polled)) {\n",
                "  if (!load_relaxed(&e->polled)) {\n    (void)atomic_fetch_add(&e->wake, what);\n",
            ),
            (
                "      wake_sleeper(&s->watchers[process]);\n  }\n  /* seq_cst: pairs",
                "      wake_sleeper(&s->watchers[process]);\n"
                "    (void)atomic_fetch_add(&e->wake, what);\n  }\n  /* seq_cst: pairs",
            ),
        ),
        "queue-release-polled",
        "the thread that watches sleeps",
    ),
    Fault(
        "others are told that a caller asks before it does",
        "permits/semaphore.c",
        (
            ("  if (!place->owner || !wait_place_asks(h.s, place)) return;\n", ""),
            (
                "    place->asked = 1;\n  }\n",
                "    place->asked = 1;\n  }\n  (void)wait_place_asks(h.s, place);\n",
            ),
        ),
        "queue-ask",
        "S hears it 0 times",
    ),
    Fault(
        "a caller that asks, and is heard by two",
        "permits/wait_queue.c",
        (
            (
                "  return atomic_compare_exchange_strong(&e->asked, &asked, 0);\n",
                "  if (load_relaxed(&e->asked) != asked) return 0;\n"
                "  store_relaxed(&e->asked, 0);\n  return 1;\n",
            ),
        ),
        "queue-asked",
        "2 processes hear it",
    ),
    Fault(
        "a place that keeps what its last caller has asked",
        "permits/wait_queue.c",
        (("    store_relaxed(&e->asked, 0);\n    p->woken", "    p->woken"),),
        "queue-ask",
        "a new caller has asked",
    ),
    Fault(
        "a claim without its second look",
        "core/hash_table.c",
        (("      if (slot + k == mine.slot) continue;\n", "      continue;\n"),),
        "pair-same-key-tenant",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "a spin lock around the swap",
        "limits/limiter.c",
        (
            (
                "    return pair_cas(&c->s->slots[f->slot], &seen, to) ? CLAIMED : CLAIM_LOST;\n",
                "    while (atomic_exchange(&c->s->header->queues[WAIT_GROUPS - 1], 1)) continue;\n"
                "    bool done = pair_cas(&c->s->slots[f->slot], &seen, to);\n"
                "    atomic_store(&c->s->header->queues[WAIT_GROUPS - 1], 0);\n"
                "    return done ? CLAIMED : CLAIM_LOST;\n",
            ),
        ),
        "check-bucket",
        "not finished within",
    ),
    Fault(
        "a charge that is not undone",
        "limits/limiter.c",
        (("undo(c, k, &looks[k], before[k]);", "(void)before[k];"),),
        "multi-undo",
        "is not undone",
    ),
    Fault(
        "levels that are not undone",
        "limits/levels.c",
        (("    for (uint32_t k = n; k < count; k++) undo_level(&calls[k]);\n", ""),),
        "levels-undo",
        "is not undone",
    ),
    Fault(
        "a level without room for its key, and the others stay charged",
        "limits/levels.c",
        (("for (uint32_t k = n; k < count; k++) undo", "for (uint32_t k = n; k <= n; k++) undo"),),
        "levels-full",
        "left after S",
    ),
    Fault(
        "limits that are named before they are written",
        "limits/limit_changes.c",
        (
            (FILL, ""),
            (
                SWAP_OF_LIMITS,
                SWAP_OF_LIMITS + "    for (uint32_t i = 0; ok && i < count; i++)\n" + FILL,
            ),
        ),
        "limits-change",
        "limits",
    ),
    Fault(
        "a process that takes an index without a new incarnation",
        "core/process.c",
        (
            (
                "atomic_fetch_add(&p->incarnation, 1) + 1",
                "atomic_load(&p->incarnation)",
            ),
        ),
        "join-after-holder",
        "T is stopped, and 0 can be taken, not 2",
    ),
    Fault(
        "a confirmation that does not compare the ticket",
        "core/hash_table.c",
        (
            (
                "  expect = mine.pair;\n  pair_t confirmed",
                "  expect = pair_load(&s->slots[mine.slot]);\n"
                "  if (expect.who != mine.pair.who) return CLAIM_LOST;\n"
                "  pair_t confirmed",
            ),
        ),
        "pair-same-key-bucket",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "who leaves a shared counter does not write it",
        "limits/shared_counters.c",
        (
            (
                "if (pair_cas(&c->s->slots[f.slot], &seen, f.pair)) break;",
                "f.pair.who = seen.who;\n    break;",
            ),
        ),
        "pair-shared-leave",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "a shared counter is charged without a look for the key's slot",
        "limits/shared_counters.c",
        (("if (table_has(c->s, c->hash, fingerprint(c, i))) return CLAIM_LOST;", ""),),
        "pair-shared-leave",
        "one token: they are answered 1 and 1",
    ),
    Fault(
        "no second look at a table full of dead permits",
        "permits/semaphore.c",
        (("return any || table_room(s, hash, who, now);", "return any;"),),
        "insert-over-dead-permits",
        "1 were admitted, not 2",
    ),
    Fault(
        "a segment that is named before it is filled",
        "core/image.c",
        (
            (
                "  int status = fill(fd, capacity, mode, flags, group, e);\n"
                "  if (status == FSHM_OK && publish_file(",
                "  int status = FSHM_OK;\n  if (publish_file(",
            ),
            (
                "  int saved = errno;\n  if (!unnamed)",
                "  if (status == FSHM_OK) status = fill(fd, capacity, mode, flags, group, e);\n"
                "  int saved = errno;\n  if (!unnamed)",
            ),
        ),
        "create",
        "S is answered",
    ),
    Fault(
        "a lock file that is announced before it is named",
        "core/lock_file.c",
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
        "the owner of an index counts as the owner of what it held before",
        "core/process.c",
        (("ALIVE(process)) && !has_ended(", "OWNED(process)) && !has_ended("),),
        "join-after-holder",
        "T is stopped, and 0 can be taken, not 2",
    ),
    Fault(
        "a leader that is not asked whether it lives",
        "core/leader.c",
        (("word && process_alive(s, process) ? process", "word ? process"),),
        "lead-after-dead",
        "somebody leads at the beginning",
    ),
    Fault(
        "limits of permits that are set before it is said how many may be held",
        "limits/limit_changes.c",
        MOST_AFTER_SWAP,
        "permits-lower",
        "can be taken, not 0",
    ),
    Fault(
        "the same beside a taker",
        "limits/limit_changes.c",
        MOST_AFTER_SWAP,
        "pair-publish-admit",
        "more than the limit that it has seen",
    ),
    Fault(
        "a release that does not compare the owner",
        "permits/semaphore.c",
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
        "a release that is not counted for those who remember a look",
        "permits/semaphore.c",
        (("  (void)changes_freed(h.s, p->group, PERMIT_NUMBER(p->when));\n", ""),),
        "permit-release-remembered",
        "release is over, and S is denied",
    ),
    Fault(
        "a path that goes by the clock",
        "limits/limiter.c",
        (
            (
                "  out->version = CURRENT_VERSION(c->snapshot.current);\n",
                "  out->version = CURRENT_VERSION(c->snapshot.current);\n"
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
        "a position that is taken before the head knows it",
        "limits/moving_window.c",
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
        "limits/moving_window.c",
        (("    if (status != FSHM_ALLOWED) return_tokens(m, tokens, count);\n", ""),),
        "pair-moving-several",
        "tokens",
    ),
    Fault(
        "a token is put over whatever the position holds",
        "limits/moving_window.c",
        (
            (
                "  token_claim_t first = {m, position, token_state(m, m->k.now), left};\n",
                "  found_t now;\n"
                "  (void)position_look(m, position, &now);\n"
                "  if (now.pair.who) *f = now;\n"
                "  token_claim_t first = {m, position, token_state(m, m->k.now), left};\n",
            ),
        ),
        "pair-moving-only",
        "what fits",
    ),
    Fault(
        "a clear that forgets the head first",
        "limits/moving_window.c",
        (
            (
                "  head_t h = head_look(&m);\n  for",
                "  head_t h = head_look(&m);\n"
                "  if (h.slot.pair.who) table_clear(m.k.s, h.slot.slot, h.slot.pair.who);\n  for",
            ),
        ),
        "moving-clear",
        "it shows",
    ),
    Fault(
        "a batch goes into what was looked at before",
        "limits/limiter.c",
        (
            (
                PUT_OF_ALL,
                "      table_find(c.s, c.hash, fingerprint(&c, i), &found.slot);\n" + PUT_OF_ALL,
            ),
        ),
        "token-lease-put",
        "are left after both",
    ),
    Fault(
        "what is taken out is left as well",
        "leasing/token_lease.c",
        (("  return state - token_lease_left(state, now);\n", "  (void)now;\n  return state;\n"),),
        "token-lease-take",
        "are left",
    ),
    Fault(
        "a permit beyond the lowered lease stands, since few are held",
        "permits/semaphore.c",
        (("    if (number >= most) return false;\n", ""),),
        "pair-lease-shrink",
        "more than is allowed",
    ),
    Fault(
        "permits are not looked at before a lease is clean again",
        "leasing/permit_lease.c",
        (
            (
                "  return semaphore_count(permits, key, length, leased) == 0;\n",
                "  (void)permits, (void)key, (void)length;\n  return true;\n",
            ),
        ),
        "lease-put-lowered",
        "can be held",
    ),
    Fault(
        "what is taken without a grant is forgotten by the next",
        "leasing/permit_lease.c",
        (("if (!permit_lease_clean(word) && !before)", "if (false)"),),
        "pair-lease-alone",
        "what is allowed",
    ),
    Fault(
        "a spin lock around what the grantor told",
        "leasing/token_lease.c",
        (
            (
                "  return " + LEARN,
                "  while (atomic_exchange(&l->segment->header->queues[WAIT_GROUPS - 1], 1))\n"
                "    continue;\n"
                "  int status = "
                + LEARN
                + "  atomic_store(&l->segment->header->queues[WAIT_GROUPS - 1], 0);\n"
                "  return status;\n",
            ),
        ),
        "learn-first",
        "not finished within",
    ),
    Fault(
        "a refusal that is forgotten before it is written",
        "leasing/token_lease.c",
        (
            (
                "  return " + REFUSE,
                "  const refusal_t none = {costs, 0};\n  (void)"
                + REFUSE.replace("&refusal", "&none")
                + "  return "
                + REFUSE,
            ),
        ),
        "refuse",
        "limit 0: 0 for",
    ),
    Fault(
        "a sum of a metric that is not added at once",
        "stats/histogram.c",
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
        "stats/deployments.c",
        (("  if (cooldown_ns && failures_of(next) > allowed_fails)\n", "  if (false)\n"),),
        "deployment-record-failure",
        "cools down for 0 ns",
    ),
    Fault(
        "how many may be held is lowered where its number is the same again",
        "limits/limits.c",
        (
            (
                "    (void)atomic_compare_exchange_strong("
                "&s->limiters[index].most, &most, lower);\n",
                "    for (uint64_t now = limits_most(s, index); MOST_OF(now) == MOST_OF(most);)\n"
                "      if (atomic_compare_exchange_strong("
                "&s->limiters[index].most, &now, lower))\n"
                "        break;\n",
            ),
        ),
        "change-permits-as-before",
        "are in flight, and",
    ),
    Fault(
        "a permit beyond the present limit stands uncounted",
        "permits/semaphore.c",
        (
            (
                "    if (unlikely(number >= snapshot->permits && !said)) {\n",
                "    if (unlikely(number > MAX_PERMITS && !said)) {\n",
            ),
        ),
        "change-permits-beyond",
        "3 are held, and the last was granted under 2",
    ),
    Fault(
        "the limits are not looked at after the slot",
        "limits/call.h",
        (
            (
                "  return unlikely(entry_current(c->s, c->index) != c->snapshot.current);\n",
                "  (void)c;\n  return false;\n",
            ),
        ),
        "change-acquire-many",
        "T is answered 1, and it does not fit",
    ),
    Fault(
        "a sweep that leaves pending slots",
        "limits/limit_changes.c",
        (
            (
                "    bool over =\n        IS_PENDING(pair.when) || ",
                "    if (IS_PENDING(pair.when)) return true;\n    bool over =\n        ",
            ),
        ),
        "change-claim-unused",
        "after both",
    ),
    Fault(
        "a sweep in the same epoch",
        "limits/limit_changes.c",
        (
            (
                "{rest | ((current + (UINT64_C(1) << VERSION_BITS)) & epochs) | version",
                "{rest | (current & epochs) | version",
            ),
        ),
        "change-acquire-epochs-untouched",
        "key 0",
    ),
    Fault(
        "a rule's index is freed though a state refers to it",
        "limits/limit_changes.c",
        (
            (
                "if (named >> rule_index & 1 || w->labels[rule_index]) continue;",
                "if (named >> rule_index & 1) continue;",
            ),
        ),
        "change-sweeps",
        "key ",
    ),
    Fault(
        "a sweep by the limits that it began with",
        "limits/limit_changes.c",
        (
            (
                "    if (entry_current(w->s, w->index) != w->snapshot.current) {\n",
                "    if (false) {\n",
            ),
        ),
        "change-sweeps",
        "index is free",
    ),
    Fault(
        "a rule that takes another's slots does not count as in use",
        "limits/limit_changes.c",
        (("if (owner < later &&", "if (!later &&"),),
        "change-sweeps-none-fits",
        "key 0",
    ),
    Fault(
        "a rule is taken back though another has named it",
        "limits/limit_changes.c",
        (
            (
                NOT_OURS,
                NOT_OURS.replace(
                    "      if (indexes[i] < 0) mine[i] = -1;\n",
                    "      if (indexes[i] < 0) {\n"
                    "        uint64_t filled = RULE_USED | version;\n"
                    "        if (ok || !atomic_compare_exchange_strong(\n"
                    "                &e->owners[mine[i]], &filled,\n"
                    "                                                  owner))\n"
                    "          mine[i] = -1;\n"
                    "      }\n",
                ),
            ),
        ),
        "limits-change",
        "its index is not in use",
    ),
    Fault(
        "a token of a moving window is given back under another name",
        "limits/moving_window.c",
        (
            (
                "    pair_t mine = {token_who(m, tokens[i].position), tokens[i].state}",
                "    pair_t mine = {nth_who(m->k.who, tokens[i].position), tokens[i].state}",
            ),
        ),
        "moving-several-again",
        "tokens after both",
    ),
    Fault(
        "a settlement that gives back before it spends",
        "limits/money.c",
        (
            (
                "  /* Spent first: killed in between, it is spent, and what was reserved is given "
                "back. */\n",
                RELEASE_RESERVED,
            ),
            ("  if (status < 0) return status;\n" + RELEASE_RESERVED, ""),
        ),
        "budget-settle",
        "are left while T is stopped",
    ),
    Fault(
        "a reservation that is not measured again",
        "limits/money.c",
        (
            (
                "               out->spent + out->reserved <= money_most(out, leased, shared) &&\n",
                "               out->spent <= money_most(out, leased, shared) &&\n",
            ),
        ),
        "pair-budget-last",
        "what fits",
    ),
    Fault(
        "the dead keep what they had reserved",
        "limits/money.c",
        (("      if (load_relaxed(&p->dead) != incarnation &&\n", "      if (incarnation &&\n"),),
        "budget-reserve",
        "are reserved by the dead",
    ),
    Fault(
        "a reservation under the limits of before",
        "limits/money.c",
        (("out->status == FSHM_OK && m.p.current == current &&\n", "out->status == FSHM_OK &&\n"),),
        "pair-budget-lower",
        "both",
    ),
    Fault(
        "a reservation of before a reset",
        "limits/money.c",
        (("id = out->id = money_id(&m);", "id = out->id += out->id ? 0 : money_id(&m);"),),
        "pair-budget-reset",
        "both",
    ),
    Fault(
        "what was added is looked at once",
        "limits/money.c",
        (("    if (unlikely(added)) /*", "    if (unlikely(!current)) /*"),),
        "pair-budget-take-back",
        "both",
    ),
    Fault(
        "a correction in the next window",
        "limits/money.c",
        (("(a.window != window || money_id(m) != id)", "money_id(m) != id"),),
        "pair-budget-correct-window",
        "the next window",
    ),
    Fault(
        "what is withdrawn can be reserved",
        "limits/money.c",
        (
            (
                "  return seen.who == granted->f.pair.who && seen.when >= granted->f.pair.when;\n",
                "  return seen.who == granted->f.pair.who;\n",
            ),
        ),
        "pair-budget-withdraw",
        "what is reserved and not granted",
    ),
    Fault(
        "a grant in the next window",
        "limits/money.c",
        (
            ("    if (how == RAISE && m->p.rules[0].unit != window) return FSHM_DENIED;\n", ""),
            (
                "      return likely(!m->window) || m->p.rules[0].unit == m->window ? FSHM_OK : "
                "FSHM_DENIED;\n",
                "      return FSHM_OK;\n",
            ),
        ),
        "pair-budget-raise-window",
        "the next window has a grant",
    ),
    Fault(
        "a clock that is set back, and nothing kept of what it has shown",
        "core/wall.c",
        (
            ("    if (base < before) {\n", "    if (base > before) {\n"),
            ("    raise_to(&h->wall_floor, wall);\n", "    (void)0;\n"),
        ),
        "wall-set-back",
        "the time of day went back",
    ),
    Fault(
        "a clock that was wrong, and is believed",
        "core/wall.c",
        (("          WALL_WRONG)", "          400 * WALL_WRONG)"),),
        "wall-set-right",
        "later than it should be",
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


# PLANTED=1/2: the second of every two faults. All by default.
_first, _step = map(int, os.environ.get("PLANTED", "0/1").split("/"))


@pytest.mark.parametrize(
    "fault", FAULTS[_first::_step], ids=lambda fault: fault.name.replace(" ", "-")
)
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
        for _ in range(5):  # the path of a join is some instructions longer for some pids
            code, said = run(harness, *again[1].split())
            if code:
                break
        assert code == 1, said
        assert f"FAILED {fault.operation}" in said
