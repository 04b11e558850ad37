/* holds_lead.c - what must hold of who leads the host: never two, and always one, whichever process was killed where. */
#include "crash.h"

static void run_lead(outcome_t *out) { out->status = fshm_lead(world.s, 0); }

static void lead_and_die(void) { (void)fshm_lead(world.s, 0); }

/* A dead process led, or one of the dead whose slot is another's by now. */
static void start_lead(void) {
  start_permits();
  if (op->flags & DEAD_OWNERS) die_after(lead_and_die);
}

static void lead_begin(void) {
  if (fshm_leader(world.s)) broken("somebody leads at the beginning");
}

static void lead_end(void) {
  if (told->status != 1) broken("T does not lead");
}

static void lead_contend(void) {
  bool t_leads = fshm_leader(world.s) != 0;
  if (told->done && !t_leads) broken("T says that it leads, and is not seen to");
  if (fshm_lead(world.s, 0) != !t_leads) broken("T and S lead, or neither does");
  if (!t_leads && fshm_leader(world.s) != (uint32_t)getpid()) broken("S is not seen to lead");
}

static void lead_survive(void) {
  if (fshm_leader(world.s)) broken("a dead process leads");
  if (fshm_lead(world.s, 0) != 1) broken("S cannot lead after a dead process");
  if (fshm_leader(world.s) != (uint32_t)getpid()) broken("S is not seen to lead");
  if (fshm_lead_end(world.s) != 1 || fshm_leader(world.s)) broken("S goes on leading");
  check_invariants(true);
}

static void lead_raced(const outcome_t *mine) {
  if (told->status + mine->status != 1)
    broken("T and S are answered %d and %d", told->status, mine->status);
  check_invariants(false);
}

static const holds_t leading = {.begin = lead_begin,
                                .end = lead_end,
                                .contend = lead_contend,
                                .survive = lead_survive,
                                .raced = lead_raced};
