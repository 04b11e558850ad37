/* shared.pml - a key leaves the counter that it shares: DESIGN.md, "Shared counters". Run: make model.
 *
 * A charges the counter for the key, since it has found no room. B has found room for the key meanwhile, gives it a slot
 * that begins with the counter's state, and charges that. C is another key's claimer, who writes the counter too.
 * Checked: the slot knows of each charge of the counter that stands. FAULT: what check.py plants.
 */
#ifndef FAULT
#define FAULT 0
#endif

byte slot = 0;                  /* 0 none, 1 pending, 2 confirmed */
byte writes = 0, charged = 0;   /* the counter: swapped together */
bool word = false;              /* "counters may be in use" */
bool stands = false;            /* A's charge */
byte known = 0;                 /* what the slot began with */

/* First, so that it is the last to end. */
bool charge_lost = false;
active proctype Checked() {
  (_nr_pr == 1 && slot == 2) -> charge_lost = stands && known != 1; assert(!charge_lost)
}

active proctype A() {
  byte seen, had;
again:
#if FAULT != 3
  word = true;
#endif
#if FAULT == 4
  if :: slot != 0 -> goto done :: else fi;
#endif
  atomic { seen = writes; had = charged }
#if FAULT != 1 && FAULT != 4
  if :: slot != 0 -> goto done :: else fi;      /* it starts over, and finds the slot */
#endif
  if
  :: atomic { writes == seen -> writes++; charged = had + 1; stands = true }
  :: atomic { writes != seen -> skip }; goto again
  fi;
done: skip
}

active proctype B() {
  byte seen, had = 0;
  slot = 1;
  if
  :: word ->
again:
     atomic { seen = writes; had = charged }
#if FAULT != 2
     if
     :: atomic { writes == seen -> writes++ }
     :: atomic { writes != seen -> skip }; goto again
     fi
#endif
  :: else
  fi;
  atomic { known = had; slot = 2 }
}

active proctype C() { if :: writes < 3 -> writes++ :: true fi }
