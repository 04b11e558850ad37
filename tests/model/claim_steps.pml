/* claim_steps.pml - the steps of one process, in the order of a call, each below what it stands for. */

/* hash_table.c table_claim: for (int round = 0; round < ROUNDS; round++) { -- after any number of rounds
 * hash_table.c table_claim: } return CLAIM_LOST; -- and look again
 * limiter.c take_one: while (likely(again(c))) { -- 20,000 times: here, without end
 * limiter.c take_one: } return FSHM_CONTENDED; -- as one that is killed
 * limiter.c put_first: return status; */
inline lost(me) {
  forget_claim(me);
  hindered_by_the_dead = IS_ALONE(me);
  assert(!hindered_by_the_dead);
  if
  :: p[me].pc = SURVEY
  :: p[me].pc = FIND
  fi
}

/* limiter.c take_one: if (likely(status == CLAIMED)) { c->at = c->now + l->verdict.retry; return FSHM_ALLOWED; }
 * limiter.c put_first: if (status == CLAIMED) f->pair.who = who; */
inline finish(me) {
  forget_claim(me);
  p[me].now = 0;
#if CALLS
  p[me].calls++;
  if
  :: p[me].calls < CALLS && !IS_ALONE(me) -> p[me].pc = BEGIN
  :: else -> p[me].pc = DONE
  fi
#else
  p[me].pc = (IS_ALONE(me) -> DONE : BEGIN)
#endif
}

/* fshm_clock() of clock.c: of any two, one is earlier by less than CLOCKS_DIFFER; the latest of all is the model's */
inline read_clock(into) {
  if
  :: into = clock
  :: clock > 1 -> into = clock - 1
  fi
}

/* limiter.c begin_hashed: c->now = c->at = now ? min_u64(now, TIME_MAX - 1) : segment_now(c->s); */
inline begin_call(me) {
  read_clock(p[me].now);
  p[me].pc = FIND
}

/* limiter.c take_one: int fresh = renewed(c); if (unlikely(fresh != FSHM_OK)) return fresh;
 *   if (unlikely(c->snapshot.count != 1)) return RESHAPED; -- the limits do not change here
 * limiter.c take_one: look_inline(c, 0, c->costs[0], l);
 * limiter.c take_one: if (unlikely(c->stale)) continue; -- as above
 * limiter.c look_inline: table_find_inline(c->s, c->hash, fingerprint(c, i), &l->slot);
 * -- one candidate a step, from the home of the key, all of them
 * hash_table.c table_find_further: if (likely(!line_has(s, slot, who))) continue;
 * -- a line is passed by where a look at each of its slots found another key: the same look, of four
 * candidates in any order. Else each is looked at again, and that is the look that counts here
 * hash_table.h confirmed_at: if (load_relaxed(&s->slots[slot].who) != who) return false;
 * -- with the next in one step, unless HINTS is defined
 * hash_table.h confirmed_at: *pair = likely(!s->read_only) ? pair_load(&s->slots[slot]) : pair_peek(&s->slots[slot]);
 * return pair->who == who && !IS_PENDING(pair->when); */
#if defined(HINTS)
#define IS_THE_PAIR(step) (p[me].pc == step)
#else
#define IS_THE_PAIR(step) true
#endif
inline find(me) {
  load(me, SLOT(me, p[me].i), v);
  if
#if defined(HINTS)
  :: p[me].pc == FIND && WHO(v) == p[me].who -> p[me].pc = FIND_PAIR
#endif
  :: IS_THE_PAIR(FIND_PAIR) && WHO(v) == p[me].who && !IS_PENDING(v) ->
     p[me].slot = SLOT(me, p[me].i);
     p[me].pair = v;
     p[me].i = 0;
     verdict(me)
  :: else ->
     p[me].i++;
     p[me].pc = FIND;
     if
     :: p[me].i == SLOTS || (STOPS_AT_EMPTY && v == EMPTY) -> p[me].i = 0; p[me].pc = SURVEY
     :: else
     fi
  fi
}

/* algorithms.h bucket_take: uint64_t tat = max_u64(state & TIME_MAX, at), increment = bucket_increment(r, cost);
 * algorithms.h bucket_take: if (tat - at > room) v.retry = at - now + (tat - at - room);
 * limiter.c take_one: if (l->verdict.retry && !may_wait(c, op, 0, l)) {
 * if (unlikely(l->moved) && op != FSHM_PEEK && !keep_moved(c, 0, l)) continue; return FSHM_DENIED; } -- limits stay
 * limiter.c take_one: if (looks_only(op)) return FSHM_ALLOWED; -- no reservations, and no looking only */
inline verdict(me) {
  if
  :: EXPIRES(p[me].pair) > p[me].now + (BURST - 1) * INTERVAL -> finish(me)
  :: else -> p[me].pc = CHARGE
  fi
}

/* limiter.c take_one: int status = put(c, 0, l, l->verdict.next, FSHM_ACQUIRE);
 * limiter.c put: found_t *f = &l->slot; if (unlikely(c->stale)) return CLAIM_LOST; -- as above
 * limiter.c put: if (likely(f->pair.who)) { pair_t seen = f->pair, to = {l->who, next};
 * limiter.c put: if (next == seen.when && l->who == seen.who) return CLAIMED; -- of a cost of 0
 * limiter.c put: return pair_cas(&c->s->slots[f->slot], &seen, to) ? CLAIMED : CLAIM_LOST; }
 * algorithms.h bucket_take: uint64_t next = plus_time(tat, increment); */
inline charge(me) {
  v = (EXPIRES(p[me].pair) > p[me].now -> EXPIRES(p[me].pair) : p[me].now) + INTERVAL;
  swap(p[me].slot, p[me].pair, CONFIRMED(p[me].who, v));
  if
  :: ok -> admit(p[me].who, p[me].now); finish(me)
  :: else -> lost(me); p[me].pc = FIND
  fi
}

/* limiter.c put: if (state_ends(c->s, 0, next) <= c->now || !c->costs[i]) return CLAIMED; -- of a cost of 0, and of refunds
 * limiter.c put: return put_first(c, i, l, op);
 * limiter.c put_first: first_t first = {c, i, op, &l->verdict, false}; uint64_t who = fingerprint(c, i);
 *   found_t *f = &l->slot;
 * limiter.c put_first: int status = table_claim(c->s, c->hash, who, c->now, first_state, &first, &f->slot);
 * hash_table.c survey: survey_t v; memset(&v, 0, sizeof v);
 *   unsigned used[2] = {0, 0}, seen[2] = {0, 0}; found_t free_in[2] = {{0, {0, 0}}, {0, {0, 0}}};
 *   const uint64_t over = minus(now, CLOCKS_DIFFER);
 *   for (unsigned window = 0; window < probe_windows(s); window++) {
 *   uint64_t line = probe_start(s, hash, window); unsigned others = 0, room = 0, stale = 0;
 *   found_t unconfirmed = {0, {0, 0}};
 *   for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
 *   uint64_t slot = line * SLOTS_PER_LINE;
 *   for (unsigned k = 0; k < SLOTS_PER_LINE; k++) { -- one candidate a step
 * hash_table.c survey: if (room && !load_relaxed(&s->slots[slot + k].who)) { room++; continue; }
 * -- empty, and not the first that is free: the step below, of which the pair is not kept
 * hash_table.c survey: pair_t pair = pair_load(&s->slots[slot + k]); bool pending = IS_PENDING(pair.when); */
inline forget_free(me) { p[me].free_slot = NO_SLOT; p[me].free = 0 }
inline forget_stale(me) { p[me].stale_slot = NO_SLOT; p[me].stale = 0 }
inline survey(me) {
  load(me, SLOT(me, p[me].i), v);
  if
  /* hash_table.c survey: bool ours = same_key(pair.who, who); if (ours && !pending) { v.confirmed = true; return v; }
   * hash_table.c table_claim: if (v.confirmed) return CLAIM_LOST; */
  :: WHO(v) == p[me].who && !IS_PENDING(v) -> forget_claim(me); p[me].pc = FIND
  :: else ->
     if
     /* hash_table.c survey: if (ours) {
      *   if (!v.pending || slot + k < v.match.slot) v.match = (found_t){slot + k, pair};
      *   v.pending = true; */
     :: WHO(v) == p[me].who ->
        if
        :: SLOT(me, p[me].i) < p[me].mine_slot -> p[me].mine_slot = SLOT(me, p[me].i); p[me].mine = v
        :: else
        fi;
        forget_free(me); /* and the stale one: not chosen beside a pending of the key */
        forget_stale(me)
     /* hash_table.c survey: } else if (pending && pair.who) {
      *   if (!stale++) unconfirmed = (found_t){slot + k, pair};
      *   others++; -- how full a window is does not count here; see `free` */
     :: WHO(v) != p[me].who && IS_LAST_RESORT(v) ->
        if
        :: p[me].stale_slot == NO_SLOT && p[me].free_slot == NO_SLOT && p[me].mine_slot == NO_SLOT ->
           p[me].stale_slot = SLOT(me, p[me].i); p[me].stale = v
        :: else
        fi
     /* hash_table.c survey: } else if (!pair.who || state_ends(s, pair.who, pair.when) <= over) {
      *   if (!room++) free_in[window] = (found_t){slot + k, pair}; -- the first, or any later one: whatever the probe_windows, and their order */
     :: WHO(v) != p[me].who && !IS_PENDING(v) && (v == EMPTY || EXPIRES(v) + MARGIN <= p[me].now) ->
        if
        :: p[me].mine_slot == NO_SLOT ->
           p[me].free_slot = SLOT(me, p[me].i); p[me].free = v;
           forget_stale(me)
        :: p[me].free_slot != NO_SLOT || p[me].mine_slot != NO_SLOT
        fi
     /* hash_table.c survey: } else { others++; } } }
      *   if (unlikely(room + stale <= SCARCE) && probe_windows(s) == 2 && !in_share(s, line, who, room + stale, over)) continue;
      *   used[window] = others; seen[window] = room;
      *   if (stale && !v.has_stale) v.stale = unconfirmed;
      *   v.has_stale |= stale > 0; } -- shares only refuse more: whoever is refused has done nothing */
     :: else
     fi;
     p[me].i++;
     if
     :: p[me].i == SLOTS || (STOPS_AT_EMPTY && v == EMPTY) -> choose(me)
     :: else
     fi
  fi
}

/* hash_table.c table_claim: found_t room; survey_t v = !round && home_has_room(s, hash, &room)
 *   ? (survey_t){.has_free = true, .free = room} : survey(s, hash, who, now);
 * -- whether the home window has room does not count here: a survey, or any slot that is empty
 * hash_table.c home_has_room: *free = (found_t){home + k, {0, 0}}; return k < SLOTS_PER_LINE && used < NEARLY_FULL; */
inline survey_or_room(me) {
  k = 0;
  do
  :: p[me].i == 0 && k < SLOTS && slots[k] == EMPTY ->
     p[me].slot = k; p[me].pair = EMPTY;
#if defined(NO_FENCE)
     p[me].pc = EARLY;
#else
     p[me].pc = PUBLISH;
#endif
     k = 0;
     break
  :: k < SLOTS -> k++
  :: k == SLOTS -> k = 0; survey(me); break
  od
}

/* hash_table.c survey: unsigned window = 0;
 *   if (!seen[0] || (seen[1] && used[0] >= NEARLY_FULL && used[1] < used[0])) window = 1;
 *   v.has_free = seen[window] > 0; v.free = free_in[window]; return v;
 * hash_table.c table_claim: if (!v.pending) { if (!v.has_free && !v.has_stale) return CLAIM_FULL;
 *   v.match = v.has_free ? v.free : v.stale; -- v.match is (slot, pair) here, until it is published */
inline choose(me) {
  p[me].i = 0;
  if
  :: p[me].mine_slot != NO_SLOT -> p[me].pc = LOOK; p[me].slot = 0
  :: p[me].mine_slot == NO_SLOT && p[me].free_slot == NO_SLOT && p[me].stale_slot == NO_SLOT -> refuse(me)
  :: else ->
     p[me].slot = (p[me].free_slot != NO_SLOT -> p[me].free_slot : p[me].stale_slot);
     p[me].pair = (p[me].free_slot != NO_SLOT -> p[me].free : p[me].stale);
#if defined(NO_FENCE)
     p[me].pc = EARLY
#else
     p[me].pc = PUBLISH
#endif
  fi;
  forget_free(me);
  forget_stale(me)
}

/* limiter.c put_first: if (unlikely(status == CLAIM_FULL) && semaphore_free_dead(c->s, c->hash, who, c->now))
 *   status = CLAIM_LOST; -- there are no permits here
 * limiter.c put_first: if (unlikely(first.refused) && status == CLAIM_LOST && !c->stale) status = CLAIM_FULL;
 *   if (unlikely(status == CLAIM_FULL) && may_share(c, i, op)) status = put_shared(c, i, l, op); -- shared.pml
 * limiter.c put_first: if (status == CLAIM_LOST) c->tries += CLAIM_TRIES - 1; -- here, without end
 * limiter.c take_one: if (status == CLAIM_FULL) return FSHM_FULL; */
inline refuse(me) {
  if
  :: IS_ALONE(me) -> /* only where every candidate is another key's, and may not be reused yet */
     k = 0;
     do
     :: k < SLOTS ->
        hindered_by_the_dead = slots[k] == EMPTY || IS_PENDING(slots[k]) || WHO(slots[k]) == p[me].who ||
                               EXPIRES(slots[k]) + MARGIN <= p[me].now;
        assert(!hindered_by_the_dead);
        k++
     :: else -> break
     od;
     k = 0
  :: else
  fi;
  finish(me)
}

#if defined(NO_FENCE)
/* Not in the code: the loads of the look may be performed before the publication is visible, as on a
 * processor where a store conditional does not order later loads. Each is, or is not. */
inline read_early(me) {
  if
  :: early[me].pair[p[me].i] = slots[SLOT(me, p[me].i)]
  :: true
  fi;
  p[me].i++;
  if
  :: p[me].i == SLOTS -> p[me].i = 0; p[me].pc = PUBLISH
  :: else
  fi
}
#endif

/* hash_table.c table_claim: pair_t mine = {who, PENDING(add_relaxed(&s->header->ticket, 1))};
 * hash_table.c table_claim: if (!pair_cas(&s->slots[v.match.slot], &v.match.pair, mine)) continue;
 * v.match.pair = mine; }
 * -- the ticket in the same step: nobody else can know it before */
inline publish(me) {
  take_ticket();
  v = PENDING(p[me].who, ticket);
#if defined(PLAIN_PUBLICATION) || defined(BUFFERED_PUBLICATION)
  ok = slots[p[me].slot] == p[me].pair;
  if
  :: ok ->
     buffer_slot[me] = p[me].slot; buffer[me] = v;
#if defined(BUFFERED_PUBLICATION)
     buffer_seen[me] = p[me].pair
#endif
  :: else
  fi;
#else
  swap(p[me].slot, p[me].pair, v);
#endif
  p[me].pair = 0;
  if
  :: ok ->
     p[me].mine_slot = p[me].slot;
     p[me].mine = v;
     p[me].slot = 0;
     begin_look(me);
#if defined(NO_LOOK)
     p[me].pc = CLOCK;
#endif
#if defined(STATE_AT_PUBLICATION)
     read_clock(p[me].fresh);
     p[me].fresh = (p[me].fresh > p[me].now -> p[me].fresh : p[me].now)
#endif
  :: else -> lost(me)
  fi
}

/* hash_table.c confirm: pair_t empty = {0, 0}, pair, expect; int budget = ROUNDS;
 *   again: atomic_thread_fence(memory_order_seq_cst);
 * -- no step of its own: whatever locked instruction came before has drained the store buffer. NO_FENCE
 * shows what happens where a swap is not a barrier. */
inline begin_look(me) {
  p[me].i = 0;
  p[me].pc = LOOK
}

/* hash_table.c confirm: for (unsigned window = 0; window < probe_windows(s); window++) {
 *   uint64_t line = probe_start(s, hash, window);
 *   for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
 *   uint64_t slot = line * SLOTS_PER_LINE; -- the lines in any order
 * hash_table.c confirm: if (likely(!line_has(s, slot, who))) continue;
 * -- a line is passed by where a look at each of its slots, all of them after the publication, found another
 * key: four steps of below in any order. Else each is looked at again, and that is the look that counts here
 * hash_table.c confirm: for (unsigned k = 0; k < SLOTS_PER_LINE; k++) { -- one candidate a step
 * hash_table.c confirm: if (slot + k == mine.slot) continue;
 * hash_table.c confirm: while (is_at(s, slot + k, who)) {
 * -- with the next in one step, unless HINTS is defined
 * hash_table.c confirm: pair = pair_load(&s->slots[slot + k]); if (!same_key(pair.who, who)) break; */
inline look(me) {
  if
  :: SLOT(me, p[me].i) == p[me].mine_slot -> next_candidate(me)
  :: else ->
     load(me, SLOT(me, p[me].i), v);
#if defined(NO_FENCE)
     if
     :: early[me].pair[p[me].i] != NOT_READ -> v = early[me].pair[p[me].i]
     :: else
     fi;
     early[me].pair[p[me].i] = NOT_READ;
#endif
     if
#if defined(HINTS)
     :: p[me].pc == LOOK && WHO(v) == p[me].who -> p[me].pc = LOOK_PAIR
#endif
     :: IS_THE_PAIR(LOOK_PAIR) && WHO(v) == p[me].who -> seen_elsewhere(me)
     :: else ->
        p[me].pc = LOOK;
        if
        :: STOPS_AT_EMPTY && v == EMPTY -> p[me].i = SLOTS - 1
        :: else
        fi;
        next_candidate(me)
     fi
  fi
}

inline next_candidate(me) {
  p[me].i++;
  if
  :: p[me].i == SLOTS -> p[me].i = 0; p[me].pc = CLOCK
  :: else
  fi
}

inline seen_elsewhere(me) {
  p[me].slot = SLOT(me, p[me].i);
  p[me].pair = v;
  if
#if defined(WAIT_FOR_PENDING)
  :: IS_PENDING(v) -> p[me].pc = LOOK; p[me].slot = 0; p[me].pair = 0
#endif
  /* hash_table.c confirm: if (budget-- <= 0) return CLAIM_LOST; -- at any time; not to one who is alone */
  :: !IS_ALONE(me) -> lost(me)
  /* hash_table.c confirm: expect = mine.pair; if (!IS_PENDING(pair.when)) { */
  :: !IS_PENDING(v) && !EVICTS_CONFIRMED -> p[me].pc = RETREAT
  /* hash_table.c confirm: if (slot + k < mine.slot) { */
  :: IS_PENDING(v) && p[me].slot < p[me].mine_slot -> p[me].pc = HELP
  :: (IS_PENDING(v) && p[me].slot > p[me].mine_slot) || (!IS_PENDING(v) && EVICTS_CONFIRMED) ->
     p[me].pc = EVICT
  fi
}

/* hash_table.c confirm: (void)pair_cas(&s->slots[mine.slot], &expect, empty); return CLAIM_LOST; }
 * -- the next round of table_claim() */
inline retreat(me) {
  swap(p[me].mine_slot, p[me].mine, EMPTY);
  lost(me)
}

/* hash_table.c confirm: (void)pair_cas(&s->slots[mine.slot], &expect, empty);
 *   mine = (found_t){slot + k, pair}; goto again; } */
inline help(me) {
  swap(p[me].mine_slot, p[me].mine, EMPTY);
  p[me].mine_slot = p[me].slot;
  p[me].mine = p[me].pair;
  p[me].slot = 0; p[me].pair = 0;
  begin_look(me)
}

/* hash_table.c confirm: expect = pair; if (pair_cas(&s->slots[slot + k], &expect, empty)) break; } } } } */
inline evict(me) {
  swap(p[me].slot, p[me].pair, EMPTY);
  p[me].slot = 0; p[me].pair = 0;
  p[me].pc = LOOK;
  if
  :: ok || EVICTS_ONCE -> next_candidate(me)
  :: else
  fi
}

/* hash_table.c confirm: expect = mine.pair; pair_t confirmed = {who, first(context)};
 * hash_table.c confirm: if (unlikely(confirmed.when == NO_STATE)) {
 * (void)pair_cas(&s->slots[mine.slot], &expect, empty); return CLAIM_NOT; } -- limits stay
 * hash_table.c table_claim: if (status == CLAIM_NOT) break; -- as above
 * limiter.c first_state: first_t *f = context; call_t *c = f->c; const rule_t *r = &c->snapshot.rules[f->i];
 * limiter.c first_state: uint64_t now = fresh_now(c), cost = c->costs[f->i];
 * limiter.c fresh_now: return c->fixed ? c->now : max_u64(segment_now(c->s), c->now); */
inline first_state(me) {
#if defined(STATE_OF_THE_CALL)
  p[me].fresh = p[me].now;
#elif !defined(STATE_AT_PUBLICATION)
  read_clock(p[me].fresh);
  p[me].fresh = (p[me].fresh > p[me].now -> p[me].fresh : p[me].now);
#endif
  p[me].pc = CONFIRM
}

/* limiter.c first_state: if (outdated(c)) { c->stale = true; return NO_STATE; } -- limits stay
 * limiter.c first_state: if (unlikely(shares(c, now))) return first_shared(f, now); if (f->op >= FROM_SHARED) return NO_STATE;
 * -- nobody shares a counter here: shared.pml
 * limiter.c first_state: if (unlikely(r->kind == FSHM_CALENDAR)) calendar_ready(c->s, &c->snapshot.rules[f->i]);
 * -- time here does not step
 * limiter.c first_state: if (f->op >= FSHM_CHARGE) { rule_t fine = *r;
 *   if (planned(c) && r->kind == FSHM_WINDOW) fine = planned_window(r, 0, now, cost);
 *   return as_kept_by(c, f->i, forced(c, f->op, f->i, &fine, 0, now)); } -- no debts here
 * limiter.c first_state: v.next = as_kept_by(c, f->i, v.next); -- as it is, but for plans
 * limiter.c first_state: v.retry = f->verdict->retry; *f->verdict = v; return v.next;
 * limiter.c first_state: verdict_t v = rule_take(r, 0, now, max_u64(c->at, now), cost);
 * hash_table.c confirm: if (!pair_cas(&s->slots[mine.slot], &expect, confirmed)) return CLAIM_LOST;
 *   *where = mine.slot; return CLAIMED;
 * hash_table.c table_claim: int status = confirm(s, hash, who, v.match, first, context, slot); if (status == CLAIMED) return CLAIMED; */
inline confirm(me) {
  swap(p[me].mine_slot, p[me].mine, CONFIRMED(p[me].who, p[me].fresh + INTERVAL));
  if
  :: ok -> admit(p[me].who, p[me].fresh); finish(me)
  :: else -> lost(me)
  fi
}
