/* schedules.c - every schedule of two processes with two preemptions: A runs to its i-th access of the
 * segment, B to its j-th, then A to its end, then B. Only accesses matter, so only they are preempted; they
 * are found by keeping the mapping inaccessible. Both processes live on: they are put back to where they
 * were by their registers and stacks, and the segment by its bytes. */
#include "crash.h"

typedef struct {
  operation_t start; /* the starting state; its name */
  void (*run[2])(outcome_t *out);
  void (*verify)(const outcome_t out[2]);
} pair_of_operations_t;

static const pair_of_operations_t *both;
static outcome_t *answers; /* of the two, in shared memory */
static int role; /* of a traced process: 0 or 1 */

static void traced_role(void) {
  /* On the stack, so that it is put back with it. */
  fshm_limiter mine = *world_at_start.l;
  world = world_at_start;
  world.l = &mine;
  if (op->flags & STAGGERED) world.now = NOW + CLOCKS_DIFFER + 10000 - 20000 * (uint64_t)role;
  (void)process_index(world.s);
  if (role == 0 && op->prepare) op->prepare();
  outcome_t *out = &answers[role];
  void (*run)(outcome_t *) = both->run[role];
  mark_begin();
  run(out);
  out->done = 1;
  mark_end();
}

static tracee_t processes[2];
static checkpoint_t begun[2], paused[2];
static unsigned char *paused_first, *paused_both;
static outcome_t answers_paused;

static bool lost(void) {
  for (int i = 0; i < 2; i++)
    if (processes[i].lost) broken("process %d: %s", i, processes[i].why);
  return position.failed;
}

static void put_segment(const unsigned char *from) {
  copy_differences(world.s->map, from, world.s->size);
}

/* Both stand where they were preempted: to the end with the one, then with the other. */
static void finish_both(tracee_t *first, tracee_t *second) {
  tracee_finish(first);
  tracee_finish(second);
  if (lost()) return;
  if (!answers[0].done || !answers[1].done) {
    broken("one has not answered");
    return;
  }
  both->verify(answers);
  check_invariants(false);
}

static tracee_t *finishing_first, *finishing_second;
static void finish_in_time(void) { finish_both(finishing_first, finishing_second); }

/* `first` stands at an access, at which paused[first] and paused_first were saved. */
static void preempt_second(int first) {
  tracee_t *a = &processes[first], *b = &processes[1 - first];
  bool ended = a->at_end;
  tracee_guard(b, false);
  tracee_restore(b, &begun[1 - first]);
  tracee_guard(b, true);
  for (size_t j = 0; !given_up() && !lost(); j++) {
    uint64_t address = 0;
    bool more = tracee_to_access(b, &address);
    tracee_save(b, &paused[1 - first]);
    segment_save(&paused_both);
    outcome_t answer = answers[1 - first];
    position.pc = tracee_pc(b);
    position.j = j;
    position.failed = false;
    tracee_guard(b, false);
    finishing_first = a;
    finishing_second = b;
    in_time(finish_in_time);
    totals->schedules++;
    if (position.failed && (a->lost || b->lost || !a->at_end || !b->at_end)) return;
    put_segment(paused_both);
    answers[1 - first] = answer;
    answers[first] = answers_paused;
    tracee_restore(a, &paused[first]);
    a->at_end = ended;
    if (!more) return;
    tracee_restore(b, &paused[1 - first]);
    tracee_guard(b, true);
    tracee_access(b);
  }
}

static void preempt_first(int first) {
  tracee_t *a = &processes[first];
  put_segment(pristine);
  memset(answers, 0, 2 * sizeof *answers);
  tracee_guard(a, false);
  tracee_restore(a, &begun[first]);
  tracee_guard(a, true);
  for (size_t i = 0; !given_up() && !lost(); i++) {
    uint64_t address = 0;
    position.k = i;
    bool more = tracee_to_access(a, &address);
    if (i % options.shares == options.share) {
      tracee_save(a, &paused[first]);
      segment_save(&paused_first);
      answers_paused = answers[first];
      tracee_guard(a, false);
      preempt_second(first);
      if (processes[0].lost || processes[1].lost || position.failed) return;
      put_segment(paused_first);
      tracee_guard(a, true);
    }
    if (!more) return;
    tracee_access(a);
  }
}

/* Both orders. */
static void try_schedules(const pair_of_operations_t *pair) {
  both = pair;
  op = &pair->start;
  answers = shared_memory(2 * sizeof *answers);
  op->make();
  world_at_start = world;
  protect_others();
  for (role = 0; role < 2; role++) {
    processes[role] = tracee_start(traced_role);
    if (!processes[role].lost) tracee_save(&processes[role], &begun[role]);
  }
  segment_save(&pristine); /* both have joined */
  static const char *const stages[] = {"in this order", "the second operation first"};
  for (int first = 0; first < 2 && !lost(); first++) {
    position = (position_t){.stage = stages[first], .schedule = true};
    preempt_first(first);
  }
  for (int i = 0; i < 2; i++) tracee_kill(&processes[i]);
}
