/* upstreams.h - models of an upstream, over virtual time, for test_adaptive.c: clients that always have another call to
 * make, and a limit that the clients do not know. */
#ifndef UPSTREAMS_H
#define UPSTREAMS_H

#define MOST_CALLS 4000

typedef struct {
  uint32_t hidden; /* calls that it serves at a time */
  uint32_t queue; /* calls that wait there beyond; the next one is refused */
  uint64_t duration; /* ns that serving takes, as a mean */
  uint32_t
      spread; /* 0: always the same; 1: 0.3 to 1.7 of it; 2: log-normal, sigma 0.7, as of a language model */
  uint64_t refusal; /* ns until a refusal is there */
  uint32_t demand; /* callers */
  bool
      rate; /* it begins hidden / duration calls a second, one second's at once, and refuses any other */
} upstream_t;

typedef struct {
  uint64_t end, started;
  uint32_t in_flight;
  bool refused;
} in_call_t;

typedef struct {
  upstream_t up;
  fshm_adaptive how;
  learned_t words;
  uint64_t now;
  in_call_t calls[MOST_CALLS];
  uint64_t free_at[MOST_CALLS]; /* of each of its servers */
  uint32_t count, accepted;
  double tokens;
  uint64_t filled;
  uint32_t highest; /* limit */
} simulated_t;

typedef struct {
  double use, refused, latency; /* shares of the hidden limit and of all calls; of the duration */
} measured_t;

static double uniform(void) { return (double)(random_u64() >> 11) * 0x1p-53; }

static double power_of_e(double x) { /* without libm */
  double power = 1 + x / 1024;
  for (int i = 0; i < 10; i++) power *= power;
  return power;
}

static uint64_t serving(const upstream_t *up) {
  const double sum = uniform() + uniform() + uniform() + uniform() - 2; /* sigma 0.58 */
  double factor = up->spread == 1 ? 1 + 0.35 * sum : 1;
  if (up->spread == 2) factor = power_of_e(sum * 0.7 / 0.577) / power_of_e(0.7 * 0.7 / 2);
  return (uint64_t)((double)up->duration * factor);
}

static void simulate_begin(simulated_t *s, fshm_adaptive how, upstream_t up) {
  memset(s, 0, sizeof *s);
  s->up = up;
  s->how = how;
  s->now = UINT64_C(1000000000);
  s->words.words[LEARNED_LIMIT] = limit_word_first(how.initial, s->now);
}

static bool has_token(simulated_t *s) {
  const double a_second = s->up.hidden * 1e9 / (double)s->up.duration;
  s->tokens += (double)(s->now - s->filled) / 1e9 * a_second;
  s->filled = s->now;
  if (s->tokens > a_second) s->tokens = a_second;
  if (s->tokens < 1) return false;
  s->tokens -= 1;
  return true;
}

static void simulate_call(simulated_t *s) {
  in_call_t c = {0, s->now, s->count + 1, s->accepted >= s->up.hidden + s->up.queue};
  if (s->up.rate) c.refused = !has_token(s);
  if (c.refused) {
    c.end = s->now + s->up.refusal;
  } else if (s->up.rate) {
    c.end = s->now + serving(&s->up);
    s->accepted++;
  } else {
    uint32_t first = 0;
    for (uint32_t i = 1; i < s->up.hidden; i++)
      if (s->free_at[i] < s->free_at[first]) first = i;
    c.end = max_u64(s->free_at[first], s->now) + serving(&s->up);
    s->free_at[first] = c.end;
    s->accepted++;
  }
  s->calls[s->count++] = c;
}

/* So long, with as many calls in flight as the limit allows. */
static measured_t simulate(simulated_t *s, uint64_t ns) {
  const uint64_t end = s->now + ns, began = s->now;
  double served = 0, refused = 0, latency = 0;
  while (s->now < end) {
    const uint32_t limit = learned_limit(s->words.words[LEARNED_LIMIT]);
    s->highest = limit > s->highest ? limit : s->highest;
    while (s->count < limit && s->count < s->up.demand && s->count < MOST_CALLS) simulate_call(s);
    uint32_t next = 0;
    for (uint32_t i = 1; i < s->count; i++)
      if (s->calls[i].end < s->calls[next].end) next = i;
    const in_call_t c = s->calls[next];
    s->calls[next] = s->calls[--s->count];
    s->now = max_u64(s->now, c.end);
    if (!c.refused) s->accepted--;
    refused += c.refused;
    served += !c.refused;
    if (!c.refused) latency += (double)(s->now - c.started);
    const fshm_sample sample = {c.started, s->now - c.started, c.in_flight, c.refused};
    adaptive_next(&s->how, &s->words, &sample, s->now);
  }
  return (measured_t){served * (double)s->up.duration / ((double)(s->now - began) * s->up.hidden),
                      refused / (served + refused), latency / served / (double)s->up.duration};
}

#endif
