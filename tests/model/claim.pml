/* claim.pml - the claim protocol of csrc/core/hash_table.c, with the calls of csrc/limits/limiter.c that use it, for spin.
 *
 * Processes that charge keys of a small table, whatever the order of their steps. A step is one access
 * to shared memory with the local work around it. A process that is killed or stopped takes no more
 * steps, which every interleaving contains; kill() below is for the check that it blocks nobody.
 *
 * In claim_steps.pml a comment that begins with a file and a function quotes the statements which the
 * next step stands for; what follows " -- " says how it is modelled. test_correspondence.py
 * compares them with csrc/.
 *
 * Where the model leaves a choice open, it contains what the code does and more, so that what holds
 * here for every choice holds there. See README.md for what is left out, and why that may be.
 */
#include "claim_memory.pml"
#include "claim_steps.pml"

#if defined(ALONE)
#define MAY_STEP(me) (p[me].pc != DONE && alone == IS_ALONE(me))
#define COUNT_STEP(me) \
  if \
  :: IS_ALONE(me) -> steps++; hindered_by_the_dead = steps > MOST_STEPS; assert(!hindered_by_the_dead) \
  :: else \
  fi
#else
#define MAY_STEP(me) (p[me].pc != DONE)
#define COUNT_STEP(me) skip
#endif

/* Which process has which number makes no difference: their variables are kept in order, so that what
 * differs in that alone is one state. (A trail is easier to read without it.) */
#if defined(SYMMETRY)
c_code {
\#include <string.h>
}
#define SORT() c_code { \
    for (int a = 1; a < PROCESSES; a++) \
      for (int b = a; b > 0 && memcmp(&now.p[b - 1], &now.p[b], sizeof now.p[b]) > 0; b--) { \
        struct process_t t = now.p[b]; \
        now.p[b] = now.p[b - 1]; \
        now.p[b - 1] = t; \
      } \
  }
#else
#define SORT() skip
#endif

#define STEP(label, action) \
  :: atomic { MAY_STEP(me) && p[me].pc == label -> COUNT_STEP(me); action; SORT() }
#define LOCKED_STEP(label, action) \
  :: atomic { MAY_STEP(me) && p[me].pc == label && DRAINED(me) -> COUNT_STEP(me); action; SORT() }

proctype process(byte me) {
end:
  do
  STEP(BEGIN, begin_call(me))
  STEP(FIND, find(me))
  LOCKED_STEP(CHARGE, charge(me))
  STEP(SURVEY, survey_or_room(me))
  LOCKED_STEP(PUBLISH, publish(me))
  STEP(LOOK, look(me))
  LOCKED_STEP(RETREAT, retreat(me))
  LOCKED_STEP(HELP, help(me))
  LOCKED_STEP(EVICT, evict(me))
  STEP(CLOCK, first_state(me))
  LOCKED_STEP(CONFIRM, confirm(me))
#if defined(HINTS)
  STEP(FIND_PAIR, find(me))
  STEP(LOOK_PAIR, look(me))
#endif
#if defined(NO_FENCE)
  STEP(EARLY, read_early(me))
#endif
#if defined(TSO)
  :: atomic { !DRAINED(me) -> drain(me) }
#endif
  od
}

/* What a dead process knew is gone. Its store buffer is not: the processor drains it. */
inline kill(me) {
  p[me].pc = DONE; p[me].calls = 0; p[me].who = 0; p[me].now = 0; p[me].fresh = 0; p[me].i = 0;
  p[me].slot = 0; p[me].pair = 0; p[me].mine_slot = NO_SLOT; p[me].mine = 0;
  p[me].free_slot = NO_SLOT; p[me].free = 0; p[me].stale_slot = NO_SLOT; p[me].stale = 0;
  k++
}

/* Time, and the end of all but one. */
proctype world() {
end:
  do
#if defined(ALONE)
  :: atomic { clock < LAST_TICK && !alone -> clock++ }
  :: atomic {
       !alone -> alone = 1;
       k = 0;
       do
       :: k < PROCESSES -> kill(k)
       :: else -> break
       od;
       k = 0;
       if
       :: p[PROCESSES].who = A
       :: p[PROCESSES].who = B
       fi;
       p[PROCESSES].pc = BEGIN
     }
#else
  :: atomic { clock < LAST_TICK -> clock++ }
#endif
  od
}

/* Nobody ever waits for anybody: when no step is possible, all calls have returned. */
proctype watch() {
end:
  timeout ->
  k = 0;
  do
  :: k < EVERYBODY -> assert(p[k].pc == DONE || p[k].pc == ABSENT); k++
  :: else -> break
  od
}

/* At the beginning any slot may be empty, an old tenant's, or a dead claimer's. */
init {
  atomic {
    k = 0;
    do
    :: k < SLOTS ->
       if
       :: slots[k] = EMPTY
       :: slots[k] = CONFIRMED(C, 2)
#if !defined(FEW_STARTS)
       :: slots[k] = CONFIRMED(C, 1)
       :: slots[k] = PENDING(C, k)
#endif
#if defined(DEAD_CLAIMERS)
       :: slots[k] = PENDING(A, k)
#endif
       fi;
       k++
    :: else -> break
    od;
    k = 0;
    do
    :: k < PROCESSES -> p[k].who = KEY_OF(k); k++
    :: else -> break
    od;
#if defined(ALONE)
    p[PROCESSES].pc = ABSENT;
#endif
    k = 0;
    run world();
    run watch();
    do
    :: k < EVERYBODY -> run process(k); k++
    :: else -> break
    od;
    k = 0
  }
}
