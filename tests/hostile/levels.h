/* levels.h - the calls of several levels, of limits that are learned, and of a clock that tests move. Part of calls.h. */
#ifndef LEVELS_H
#define LEVELS_H

static void use_levels(user_t *u, const char *key, uint64_t n, uint64_t now, unsigned what) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {n, 1, what % 7, 0};
  fshm_level levels[FSHM_MAX_LEVELS];
  fshm_decision d;
  uint32_t count = 0;
  for (unsigned i = 0; i < LIMITERS; i++) { /* permits too, which have no rate */
    if (!u->limiters[i] || !(what >> i & 1)) continue;
    levels[count++] = (fshm_level){.limiter = u->limiters[i],
                                   .key = key,
                                   .key_length = 1,
                                   .costs = what & 64 ? costs : NULL,
                                   .passes_full = i & 1};
  }
  if (!count) return;
  static const uint32_t ops[] = {FSHM_ACQUIRE, FSHM_PEEK, FSHM_CHARGE, FSHM_REFUND};
  MUST(fshm_levels_apply(levels, count, ops[what % 4], now, &d) < count);
  check_decision(u, &d);
  for (uint32_t i = 0; i < count; i++) MUST(levels[i].decision.status <= FSHM_ALLOWED);
}

static void use_learned(user_t *u, const char *key, uint64_t n, uint64_t now, unsigned what) {
  const fshm_limit most = {20, 0, 0, FSHM_PERMITS, 0},
                   word = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0};
  const fshm_adaptive settings = {1 + what % 10, 1, 20, what & 1, 1024 + what % 3072};
  const fshm_sample sample = {n, n >> what % 40, what % 30, what >> 1 & 1};
  fshm_limiter *permits, *learned;
  fshm_learned found;
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  if (u->s->read_only) return;
  int status = fshm_limiter_open(u->s, "learns", 6, &most, 1, &permits);
  check_status(u, status);
  if (!permits) return;
  status = fshm_limiter_open_beside(u->s, "learned", 7, &word, 1, &learned);
  check_status(u, status);
  if (!learned) {
    fshm_limiter_close(permits);
    return;
  }
  check_status(
      u, fshm_adaptive_admit(permits, learned, &settings, key, 1, now, &permit, &d, &in_flight));
  check_decision(u, &d);
  check_status(
      u, fshm_adaptive_end(permits, learned, &settings, key, 1, &sample, what & 8 ? n : 0, now));
  (void)fshm_permit_release(permits, &permit);
  check_status(u, fshm_adaptive_pause(permits, learned, key, 1, what & 16 ? n : 0, now));
  status = fshm_adaptive_look(learned, key, 1, now, &found);
  check_status(u, status);
  if (status == FSHM_OK) MUST(found.limit <= FSHM_MAX_ADAPTIVE && found.phase <= FSHM_PHASE_STEADY);
  for (uint64_t slot = 0; slot < u->s->slot_count; slot++) {
    status = fshm_adaptive_at(u->s, slot, now, &found);
    if (status == FSHM_OK) MUST(found.limit <= FSHM_MAX_ADAPTIVE);
  }
  if (what & 32) check_status(u, fshm_adaptive_forget(permits, learned, &settings, key, 1));
  fshm_limiter_close(learned);
  fshm_limiter_close(permits);
}

/* No file moves the clock here, and there is no other segment. */
static void use_clock(user_t *u, uint64_t n, unsigned what) {
  fshm_segment *other;
  fshm_error e;
  int how;
  MUST(fshm_open_group("no.such.segment", 0, 0600, what & 1 ? FSHM_OPEN_READ_ONLY : 0, (uint32_t)n,
                       &other, &e) != FSHM_OK);
  MUST(!other);
  MUST(fshm_clock_share(u->s, -1, 0) != FSHM_OK);
  MUST(fshm_clock_move(u->s, (int)(what % 6), n) != FSHM_OK);
  MUST(!fshm_clock_moved(u->s, &how));
}

#endif
