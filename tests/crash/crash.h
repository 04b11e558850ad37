/* crash.h - what the files of the harness share. One translation unit, as the library is: main.c. */
#ifndef CRASH_H
#define CRASH_H

#include "tracee.h"

#define PER (UINT64_C(3600) * 1000000000)
#define NOW \
  (100 * PER + PER / 4) /* segment time that operations are given; a quarter into a window */
#define LATER (NOW + 4 * PER) /* when nothing is consumed any more */
#define LONG_AGO (NOW - 10 * PER)
#define WALL_BEGAN (500000 * PER) /* the time of day at segment time 0, in some operations */
#define KEY "k"
#define LEVELS 3

/* What an operation answered. T's lies in shared memory. */
typedef struct {
  int done; /* it has answered; what follows is whole */
  int status;
  uint64_t number;
  uint32_t pid; /* of the process that joined */
  const void *mapping; /* where T has the segment, if S has not opened it; and its size */
  uint64_t mapped;
  fshm_decision decision;
  fshm_permit permit, total;
  fshm_place place;
} outcome_t;

/* What must hold: for each family of operations a set of checks, which call broken(). T is the process that
 * is stopped and killed, S the harness itself, which has joined the segment as well. */
typedef struct {
  void (*begin)(void); /* T stands at its beginning, the first time: learn how things are */
  void (*end)(void); /* T has done the operation undisturbed: learn what it leads to */
  void (*contend)(void); /* T is stopped and lives: S does the same */
  void (*survive)(void); /* T is dead: S works on */
  void (*raced)(const outcome_t *mine); /* T was stopped, S did the same, T went on to its end */
  void (*overtake)(
      void); /* where the operation has an `overtake`: does that, and what is to be noted before */
} holds_t;

/* What stands in the table at the beginning, and what the operation is like. */
enum {
  TENANTS = 1, /* slots that expired, of other keys, everywhere else */
  STALE = 2, /* pending slots of other keys everywhere else: their claimers are dead */
  CROWDED = 4, /* live keys everywhere else; with one of the next: but in one slot, or two */
  ONE_LEFT = 8,
  TWO_LEFT = 16,
  TENANT_FIRST = 32, /* in the lowest slot a key that expires at NOW */
  PENDING_LOW = 64, /* a dead claimer's pending slot of the key, in the lowest slot */
  PENDING_HIGH = 128, /* the same, in the highest */
  EXPIRED = 256, /* what the key had is long ago */
  EXPIRING = 512, /* it expires at NOW */
  STAGGERED = 1024, /* the first process reads a time just after NOW, the second just before */
  REAL_TIME = 2048, /* the operation asks the clock */
  ROUGH = 4096, /* S acquires, instead of the same: the operation is about what T has charged */
  UNJOINED = 8192, /* T is not a member yet */
  FILES = 16384, /* about the segment as a file: S has not opened it; made anew for each boundary */
  PREDECESSOR = 32768, /* what dead processes hold, the last owner of T's process index held */
  FREED = 65536, /* the permits that S does not hold have slots, which are free */
  ARMED = 1 << 17, /* S sleeps in the queue of the key */
  DEAD_OWNERS = 1 << 18, /* the spare slots of limits are owned by dead processes */
  LOW_FREED = 1 << 19, /* as FREED, but S holds the highest of all */
  UNCHANGED = 1 << 20, /* the limits are not changed to `next` yet: the operation does that */
  REFUSES = 1
      << 22, /* of a token lease: the server's report is stored, and its refusal of the cost */
  SLOW = 1 << 24, /* S changes to limits that nothing fits */
  HELD_BACK = 1
      << 23, /* the key lives under limits of before, since it has consumed more than the present ones admit */
  UNUSED_RULE = 1
      << 26, /* no other key lives under the limits: their rule goes with the next sweep */
  SHARING = 1 << 27, /* keys without room share counters; what the key has consumed is in one */
  COUNTED = 1
      << 28, /* a process remembers a look at the permits: what is freed and taken is counted */
  PLANNED = 1 << 29, /* the limits are those of a plan */
  OTHER_PLAN = 1 << 30, /* and what the key has consumed, it has under the plan `next` */
  COMES_ROUND_NEXT = 1 << 25, /* the incarnation of T's process index comes round with T */
  MOST_BEHIND = 1
      << 21 /* `most` is below what is held, as limits_lower_most() may leave it when the limits
                         * are raised between its look and its swap */
};

/* Operations that are not an enum fshm_op. */
enum {
  OTHER_OP = 100,
  TAKE,
  RELEASE,
  IDLE_MARK,
  COUNT_HELD,
  REAP,
  REAP_BY_FORCE,
  QUEUE, /* of the wait queue; T is not in it at the end */
  QUEUE_JOIN, /* T is in it at the end */
  QUEUE_STAY, /* the same; whatever S does, T is answered as if it were alone */
  QUEUE_SERVE,
  QUEUE_ASK, /* T asks for what S keeps, and is in it at the end */
  QUEUE_ASKED, /* S asks; T looks who does */
  QUEUE_WATCH, /* the same, when it was told */
  JOIN,
  LOWER,
  FIRST_JOIN,
  CREATE,
  ATTACH,
  REMOVE,
  MEMO,
  MEMO_COUNT,
  COUNT_CALL,
  METRIC_OPEN,
  METRIC,
  FEATURE_ERROR,
  FEATURE_RESET,
  DEPLOYMENT_OPEN,
  DEPLOYMENT_RECORD,
  REQUEST,
  LEAD,
  HIT,
  CLEAR,
  TOKEN_LEASE_SPEND,
  TOKEN_LEASE_PUT,
  TOKEN_LEASE_TAKE,
  LEARN,
  REFUSE,
  LEASE_TAKE,
  LEASE_SET,
  LEASE_ALONE, /* from a state that this has left */
  LEASE_DROP, /* the same, from any other */
  ADAPTIVE_TAKE,
  ADAPTIVE_REFUSED,
  ADAPTIVE_SERVED,
  ADAPTIVE_SET,
  MONEY_RESERVE,
  MONEY_CHARGE, /* reserves what stays spent if it dies */
  MONEY_SETTLE,
  MONEY_ADD,
  MONEY_GRANT,
  MONEY_WITHDRAW,
  LOOK_AT_CLOCK
};

typedef struct operation {
  const char *name;
  void (*make)(void); /* the starting state, by S */
  void (*prepare)(void); /* in the process that will do the operation */
  void (*run)(outcome_t *out); /* the operation: the same code in T and S */
  const holds_t *holds;
  void (*overtake)(void); /* what S does while T is stopped, in place of the same; NULL: the same */
  void (*meddle)(void); /* S does this at T's first change of a slot; boundaries begin there */
  fshm_limit limits[FSHM_MAX_LIMITS], next[FSHM_MAX_LIMITS]; /* next: what they are changed to */
  uint32_t count, next_count;
  bool side; /* the limit comes with the call: the key has a slot of its own (side_who) */
  bool levels; /* each limit is that of a level: of limiters[i], the innermost first */
  uint32_t flags, capacity; /* capacity 0: the least, one line of slots */
  uint32_t op, cost, prior; /* prior: tokens charged, or permits that S holds, at the beginning */
  uint32_t dead; /* permits that a dead process held */
  int status; /* what it answers */
  uint32_t before, after, full; /* how much fits before it, after it, and at most */
} operation_t;

/* The segment under test, and what this process has in it. Restored for each boundary. */
typedef struct {
  fshm_segment *s;
  fshm_limiter *l, *others, *totals, *permits, *permit_leases;
  fshm_limiter *limiters[LEVELS]; /* of several levels; world.l is the innermost */
  fshm_limiter *refused, *known; /* of a token lease, or NULL: fshm_spend() */
  fshm_permit permit, total;
  fshm_place place, theirs; /* in the wait queue: of S, and of T */
  fshm_permit waited; /* that S has got in its turn */
  int ends[2]; /* of the pipe of S's place; 0 = a thread of S sleeps */
  fshm_charged reserved[FSHM_MAX_LIMITS];
  uint32_t asleep; /* what S saw of its place before it slept */
  uint64_t now, clock; /* clock: ns, where time stands; 0 = the system's */
  uint64_t wall; /* with it, the clock of the day shows so much more */
} world_t;

/* Where we are, for reports. */
typedef struct {
  const char *stage;
  size_t k, j; /* instruction; of a schedule: the accesses of the first and of the second */
  bool schedule;
  uint64_t pc;
  bool failed; /* at this boundary */
  bool later; /* it is long after: other keys have expired */
} position_t;

typedef struct {
  uint64_t boundaries, races, schedules, failures;
  uint64_t
      strayed; /* boundaries that were not on the recorded path: by a loop more or less, mostly */
  double seconds;
  bool done;
} totals_t;

typedef struct {
  const char *only;
  int64_t at; /* -1 = all */
  uint64_t every, above; /* --every: of operations of more than so many instructions */
  uint64_t share, shares; /* of the accesses at which the first of a pair is preempted */
  int jobs;
} options_t;

#endif
