/* Random stories of budgets against a sequential model: reservations, settlements, additions, charges and refunds, changes
 * of the budget, grants, resets, processes that die, and windows that end.
 *
 *   test_budget_stories [STEPS [SEED]]
 */
#define ROUNDS_OF_MONEY \
  1 /* nobody else is here, so none is lost; and what follows the last one is tried too */
#include "../../csrc/unity.c"

#include "check.h"

#define KEYS 40 /* more than a process can reserve of at once, in some lines */
#define HELD 64
#define MOST (UINT64_C(1) << 40)

typedef struct {
  uint64_t end; /* ns since 1970: when the window ends that these are of */
  uint64_t spent, added, granted;
  bool warned;
} account_t;
typedef struct {
  int key;
  uint64_t amount, end, resets;
  fshm_budget b;
} held_t;

static account_t accounts[KEYS];
static held_t held[HELD];
static int held_n;
static uint64_t budget_n, period, now, resets;
static fshm_segment *s;
static fshm_limiter *l;

/* By the C library's calendar. */
static uint64_t window_end(uint64_t wall) {
  const time_t t = (time_t)(wall / 1000000000);
  struct tm at;
  (void)gmtime_r(&t, &at);
  at.tm_sec = at.tm_min = 0;
  if (period == HOUR_NS) {
    at.tm_hour++;
  } else {
    at.tm_hour = 0;
    if (period == DAY_NS) at.tm_mday++;
    if (period == WEEK_NS) at.tm_mday += 7 - (at.tm_wday + 6) % 7;
    if (period >= MONTH_NS) at.tm_mday = 1, at.tm_mon++;
    if (period == YEAR_NS) at.tm_mon = 12;
  }
  return (uint64_t)timegm(&at) * 1000000000;
}
static uint64_t wall_now(void) { return now + load_relaxed(&s->header->wall_base); }

static account_t *account(int key) {
  account_t *a = &accounts[key];
  const uint64_t end = window_end(wall_now());
  if (a->end != end) *a = (account_t){.end = end};
  return a;
}
static uint64_t reserved(int key) {
  uint64_t sum = 0;
  for (int i = 0; i < held_n; i++)
    if (held[i].key == key && held[i].resets == resets && !held[i].b.direct) sum += held[i].amount;
  return sum;
}
static void add_to(uint64_t *amount, int64_t by) {
  *amount = by < 0 ? minus(*amount, (uint64_t)-by) : *amount + (uint64_t)by;
}

static uint64_t name_of(int key, char *out) { return (uint64_t)sprintf(out, "key-%d", key); }

static void check_key(int key) {
  char name[16];
  fshm_budget b;
  const uint64_t length = name_of(key, name);
  const account_t *a = account(key);
  CHECK_EQ(fshm_budget_look(l, name, length, now, &b), FSHM_OK);
  CHECK_EQ(b.spent, a->spent);
  CHECK_EQ(b.reserved, reserved(key));
  CHECK_EQ(b.limit, budget_n + a->added);
  CHECK_EQ(b.granted, a->granted);
  CHECK_EQ(b.left_ns, a->end - wall_now());
}

static void set_budget(uint64_t n) {
  const fshm_limit limits[4] = {{n, period, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, period, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, period, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, period, 0, FSHM_MONEY, 0}};
  budget_n = n;
  fshm_limiter *next;
  CHECK_EQ(fshm_limiter_open_at(s, "team", 4, limits, 4, now, &next), FSHM_OK);
  if (l) fshm_limiter_close(l);
  l = next;
}

static uint64_t random_amount(int key) {
  const account_t *a = account(key);
  const uint64_t left = minus(budget_n + a->added, a->spent + reserved(key));
  switch (random_below(6)) {
    case 0:
      return left; /* all that is left, or just too much */
    case 1:
      return left + 1;
    case 2:
      return random_below(4);
    default:
      return random_scaled(1, budget_n);
  }
}

/* FSHM_ASK: of what was granted, some may go back. */
static void settle(const held_t *h, uint64_t actual) {
  char name[16];
  const int status =
      fshm_budget_settle(l, name, name_of(h->key, name), &h->b, h->amount, actual, now);
  CHECK(status == FSHM_OK || (h->b.kept && status == FSHM_ASK));
}

static void step_reserve(int key) {
  char name[16];
  const uint64_t length = name_of(key, name);
  const uint32_t flags = random_below(4) ? 0 : FSHM_BUDGET_CHARGE;
  const uint32_t leased = random_below(4) ? 0 : FSHM_BUDGET_GRANTED;
  held_t h = {.key = key, .amount = random_amount(key), .resets = resets};
  account_t *a = account(key);
  const uint64_t used = a->spent + reserved(key) + h.amount;
  const bool beyond = used > budget_n + a->added;
  const int fits = leased && used > a->granted ? (beyond && a->granted ? FSHM_DENIED : FSHM_ASK)
                                               : (beyond ? FSHM_DENIED : FSHM_ALLOWED);
  h.end = a->end;
  CHECK_EQ(fshm_budget_reserve(l, name, length, h.amount, flags | leased, now, &h.b), fits);
  if (h.b.status != FSHM_ALLOWED) return;
  CHECK(!flags || h.b.direct);
  if (h.b.direct) a->spent += h.amount;
  if (held_n < HELD) {
    held[held_n++] = h;
    return;
  }
  settle(&h, 0);
  if (h.b.direct) a->spent -= h.amount;
}

static void step_settle(bool spent) {
  if (!held_n) return;
  const int i = (int)random_below((uint64_t)held_n);
  const held_t h = held[i];
  const uint64_t actual = spent ? random_amount(h.key) : 0;
  account_t *a = account(h.key);
  held[i] = held[--held_n];
  settle(&h, actual);
  if (!h.b.direct || h.resets != resets)
    a->spent += actual;
  else if (h.end == a->end)
    add_to(&a->spent, (int64_t)actual - (int64_t)h.amount);
  else
    a->spent += minus(actual, h.amount);
}

/* A process reserves, and maybe settles; then it dies. */
static void step_death(int key) {
  char name[16];
  const uint64_t length = name_of(key, name), amount = random_amount(key);
  const uint64_t actual = random_below(amount + 1);
  const bool charge = random_below(2), settles = random_below(2);
  account_t *a = account(key);
  const bool fits = a->spent + reserved(key) + amount <= budget_n + a->added;
  (void)fflush(NULL);
  const pid_t pid = fork();
  if (pid < 0) abort();
  if (!pid) {
    fshm_budget b;
    if (fshm_budget_reserve(l, name, length, amount, charge ? FSHM_BUDGET_CHARGE : 0, now, &b) ==
            FSHM_ALLOWED &&
        settles)
      (void)fshm_budget_settle(l, name, length, &b, amount, actual, now);
    (void)kill(getpid(), SIGKILL);
  }
  CHECK_EQ(waitpid(pid, NULL, 0), pid);
  look_for_dead(s);
  if (fits) a->spent += settles ? actual : charge ? amount : 0;
}

static void step(void) {
  char name[16];
  const int key = (int)random_below(random_below(2) ? 3 : KEYS);
  const uint64_t length = name_of(key, name), what = random_below(100);
  account_t *a = account(key);
  if (what < 35) {
    step_reserve(key);
  } else if (what < 60) {
    step_settle(true);
  } else if (what < 66) {
    step_settle(false);
  } else if (what < 70) {
    const uint64_t amount = random_amount(key);
    CHECK_EQ(fshm_budget_add(l, name, length, 0, (int64_t)amount, now), FSHM_OK);
    a->spent += amount;
  } else if (what < 75) {
    const uint64_t amount = random_amount(key);
    CHECK_EQ(fshm_budget_add(l, name, length, 0, -(int64_t)amount, now), FSHM_OK);
    a->spent = minus(a->spent, amount);
  } else if (what < 80) {
    const int64_t by = (int64_t)random_below(budget_n + 1) - (int64_t)(budget_n / 2);
    CHECK_EQ(fshm_budget_add(l, name, length, 1, by, now), FSHM_OK);
    add_to(&a->added, by);
  } else if (what < 84) {
    const uint64_t to = random_below(2 * budget_n + 1), which = random_below(3) ? 3 : 0;
    const bool present = random_below(4);
    const uint64_t window = a->end / MINUTE - !present;
    CHECK_EQ(fshm_budget_raise(l, name, length, (uint32_t)which, to, window, now),
             present ? FSHM_OK : FSHM_DENIED);
    uint64_t *amount = which ? &a->granted : &a->spent;
    if (present) *amount = max_u64(*amount, to);
  } else if (what < 87) {
    CHECK_EQ(fshm_budget_once(l, name, length, now), a->warned ? FSHM_DENIED : FSHM_OK);
    a->warned = true;
  } else if (what < 92) {
    set_budget(random_scaled(1, MOST));
  } else if (what < 93) {
    step_death(key);
  } else if (what < 94 && random_below(20) == 0) {
    CHECK_EQ(fshm_reset_all(l), FSHM_OK);
    memset(accounts, 0, sizeof accounts);
    resets++;
  } else {
    const uint64_t most = random_below(4) ? period / 50 : 2 * period;
    const uint64_t pause = random_below(random_below(30) ? MINUTE : most);
    if (now + pause < 4 * YEAR_NS) now += pause; /* a segment lasts 4.5 years */
  }
  check_key(key);
}

int main(int argc, char **argv) {
  static const uint64_t periods[] = {HOUR_NS, DAY_NS, WEEK_NS, MONTH_NS, YEAR_NS};
  const int steps = argc > 1 ? atoi(argv[1]) : fewer(20000);
  if (argc > 2) random_state = strtoull(argv[2], NULL, 10);
  for (int i = 0; i < 5; i++) {
    s = fresh_segment(1000);
    l = NULL;
    memset(accounts, 0, sizeof accounts);
    held_n = 0;
    now = segment_now(s) + 2 * DAY_NS;
    period = periods[i];
    set_budget(UINT64_C(50000000000));
    for (int k = 0; k < steps / 5 && !failed; k++) {
      step();
      if (k % 50 == 0)
        for (int key = 0; key < KEYS; key++) check_key(key);
    }
    if (failed) (void)fprintf(stderr, "of %d steps\n", steps);
    fshm_limiter_close(l);
    fshm_close(s);
  }
  return done();
}
