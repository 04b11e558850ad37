/* claim_memory.pml - the table, the local variables, store buffers, locked swaps, and the properties. */

#ifndef PROCESSES
#define PROCESSES 3
#endif
#ifndef SLOTS
#define SLOTS 3
#endif
#ifndef CALLS
#define CALLS 1 /* of each process; 0 = for ever */
#endif
#ifndef LAST_TICK
#define LAST_TICK 4
#endif
#ifndef BURST
#define BURST 1
#endif
#ifndef INTERVAL
#define INTERVAL 1 /* ticks for each admission: a key's period is BURST * INTERVAL */
#endif
#ifndef THIRD_KEY
#define THIRD_KEY B /* of the third process; the others charge A */
#endif
#define KEY_OF(me) (me == 2 -> THIRD_KEY : A)
#ifndef HOME_OF_A
#define HOME_OF_A 0 /* where the candidates of a key begin */
#endif
#define HOME_OF_B 1
#define HOME_OF(who) (who == B -> HOME_OF_B : HOME_OF_A)

#define CLOCKS_DIFFER 1 /* ticks; a clock is read as of now or one tick ago */

/* Planted faults that are a condition elsewhere; the others stand where they act. */
#if defined(NO_CLOCKS_DIFFER)
#define MARGIN 0
#else
#define MARGIN CLOCKS_DIFFER
#endif
#if defined(COMPARE_WHO_ONLY)
#define SAME(a, b) (WHO(a) == WHO(b))
#else
#define SAME(a, b) ((a) == (b))
#endif
#if defined(STOP_AT_EMPTY)
#define STOPS_AT_EMPTY true
#else
#define STOPS_AT_EMPTY false
#endif
#if defined(NO_LAST_RESORT)
#define IS_LAST_RESORT(v) false
#elif defined(TAKE_LIVE)
#define IS_LAST_RESORT(v) (v != EMPTY)
#else
#define IS_LAST_RESORT(v) IS_PENDING(v)
#endif
#if defined(EVICT_CONFIRMED)
#define EVICTS_CONFIRMED true
#else
#define EVICTS_CONFIRMED false
#endif
#if defined(EVICT_ONCE)
#define EVICTS_ONCE true
#else
#define EVICTS_ONCE false
#endif

/* Keys: A and B are charged; C is the key of old tenants and of a dead claimer. */
#define NOBODY 0
#define A 1
#define B 2
#define C 3

/* A slot, (who, when) in one byte. `when` is a state, that is, the tick at which it expires; or
 * pending, with a ticket. */
#define EMPTY 0
#define CONFIRMED(who, expires) ((who) << 6 | (expires))
#define PENDING(who, ticket) ((who) << 6 | 32 | (ticket))
#define WHO(pair) ((pair) >> 6)
#define IS_PENDING(pair) ((pair) & 32)
#define EXPIRES(pair) ((pair) & 31)
#define NO_SLOT SLOTS

byte slots[SLOTS];
byte clock = 1;

/* What has happened, for the properties only. */
#define ADMITTED(who, tick) admitted[((who) - 1) * (LAST_TICK + 1) + (tick)]
byte admitted[2 * (LAST_TICK + 1)];
bit two_confirmed_slots, limit_exceeded, live_key_forgotten, hindered_by_the_dead;

mtype = { ABSENT, BEGIN, FIND, FIND_PAIR, CHARGE, SURVEY, EARLY, PUBLISH, LOOK, LOOK_PAIR, RETREAT, HELP,
          EVICT, CLOCK, CONFIRM, DONE }

/* The local variables of a process. Those that are not in use are 0, or NO_SLOT. */
typedef process_t {
  mtype pc = BEGIN;
  byte who;
  byte calls;
  byte now;    /* c->now, of the whole call */
  byte fresh;  /* the clock as first_state() read it */
  byte i;      /* the candidate to look at next */
  byte slot, pair;               /* found, or seen elsewhere by confirm() */
  byte mine_slot = NO_SLOT, mine; /* v.match, then `mine` of confirm() */
  byte free_slot = NO_SLOT, free;
  byte stale_slot = NO_SLOT, stale;
}

#if defined(ALONE)
#define EVERYBODY (PROCESSES + 1) /* the last comes when the others are dead */
bit alone;
byte steps;
#define MOST_STEPS (4 * SLOTS + 4)
#define IS_ALONE(me) (me == PROCESSES)
#else
#define EVERYBODY PROCESSES
#define IS_ALONE(me) false
#endif
process_t p[EVERYBODY];

/* Used within one step; no part of a state. */
hidden byte v, k, m, n, ticket, ok;

/* Store buffers. Only a plain store enters one; a locked instruction waits until the own one is empty. A
 * load sees the own buffer first. One entry is enough: no process stores twice without a swap between. */
#if defined(PLAIN_PUBLICATION) || defined(BUFFERED_PUBLICATION)
#define TSO
#endif
#if defined(TSO)
byte buffer_slot[EVERYBODY] = NO_SLOT;
byte buffer[EVERYBODY];
#if defined(BUFFERED_PUBLICATION)
byte buffer_seen[EVERYBODY];
#endif
#define DRAINED(me) (buffer_slot[me] == NO_SLOT)
#else
#define DRAINED(me) true
#endif

#if defined(NO_FENCE)
#define NOT_READ 255
typedef early_t { byte pair[SLOTS] = NOT_READ; }
early_t early[EVERYBODY];
#endif

#define SLOT(me, i) ((HOME_OF(p[me].who) + (i)) % SLOTS)

inline load(me, at, into) {
  into = slots[at];
#if defined(TSO)
  if
  :: buffer_slot[me] == at -> into = buffer[me]
  :: else
  fi
#endif
}

inline count_confirmed(key) {
  d_step {
    k = 0; n = 0;
    do
    :: k < SLOTS -> n = n + (WHO(slots[k]) == key && !IS_PENDING(slots[k])); k++
    :: else -> break
    od;
    two_confirmed_slots = n > 1;
    assert(!two_confirmed_slots);
    k = 0; n = 0
  }
}

/* Slot `at` becomes `next`, whoever does it and however. */
inline write(at, next) {
  /* I7: a key is forgotten only when its state has expired by every clock. */
  if
  :: slots[at] != EMPTY && !IS_PENDING(slots[at]) && WHO(slots[at]) != WHO(next) ->
     live_key_forgotten = EXPIRES(slots[at]) > clock;
     assert(!live_key_forgotten)
  :: else
  fi;
  slots[at] = next;
  if
  :: next != EMPTY && !IS_PENDING(next) -> count_confirmed(WHO(next))
  :: else
  fi
}

/* pair_cas() of atomic128.h: a locked instruction, which compares and writes all 16 bytes. */
inline swap(at, seen, next) {
  ok = SAME(slots[at], seen);
  if
  :: ok -> write(at, next)
  :: else
  fi
}

/* In any interval of d ticks a key is admitted at most BURST + d / INTERVAL times. */
inline admit(key, tick) {
  d_step {
    ADMITTED(key, tick)++;
    k = 0;
    do
    :: k <= tick ->
       m = k; n = 0;
       do
       :: m <= LAST_TICK ->
          n = n + ADMITTED(key, m);
          limit_exceeded = limit_exceeded || (m >= tick && n * INTERVAL > BURST * INTERVAL + (m - k));
          m++
       :: else -> break
       od;
       k++
    :: else -> break
    od;
    assert(!limit_exceeded);
    k = 0; m = 0; n = 0
  }
}

/* add_relaxed(&s->header->ticket, 1): a ticket that no slot holds and nobody remembers. Tickets are
 * compared for equality and nothing else, so one that has been forgotten everywhere is as good as one
 * that never was; thereby claims without end have finitely many states. */
#define IS_TICKET(pair, ticket) (IS_PENDING(pair) && EXPIRES(pair) == (ticket))
inline take_ticket() {
  d_step {
    ticket = 0;
#if !defined(NO_TICKET)
    do
    :: n = 0; k = 0;
       do
       :: k < SLOTS -> n = n || IS_TICKET(slots[k], ticket); k++
       :: else -> break
       od;
       k = 0;
       do
       :: k < EVERYBODY ->
          n = n || IS_TICKET(p[k].mine, ticket) || IS_TICKET(p[k].stale, ticket) ||
              IS_TICKET(p[k].pair, ticket);
#if defined(TSO)
          n = n || IS_TICKET(buffer[k], ticket);
#endif
          k++
       :: else -> break
       od;
       if
       :: n -> ticket++
       :: else -> break
       fi
    od;
    assert(ticket < 32);
#endif
    k = 0; n = 0
  }
}

inline forget_claim(me) {
  d_step {
    p[me].i = 0; p[me].slot = 0; p[me].pair = 0; p[me].fresh = 0;
    p[me].mine_slot = NO_SLOT; p[me].mine = 0;
    p[me].free_slot = NO_SLOT; p[me].free = 0;
    p[me].stale_slot = NO_SLOT; p[me].stale = 0;
#if defined(NO_FENCE)
    k = 0;
    do
    :: k < SLOTS -> early[me].pair[k] = NOT_READ; k++
    :: else -> break
    od;
    k = 0
#endif
  }
}

#if defined(TSO)
/* The processor's own step, at any time. With BUFFERED_PUBLICATION the store reaches the memory only if
 * the slot still holds what it was compared with: what is wrong then is the order alone. */
inline drain(me) {
#if defined(BUFFERED_PUBLICATION)
  if
  :: slots[buffer_slot[me]] == buffer_seen[me] -> write(buffer_slot[me], buffer[me])
  :: else
  fi;
  buffer_seen[me] = 0;
#else
  write(buffer_slot[me], buffer[me]);
#endif
  buffer_slot[me] = NO_SLOT;
  buffer[me] = 0
}
#endif
