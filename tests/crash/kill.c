/* kill.c - an operation is stopped after every instruction: S must get on while T stands there, and after T
 * is killed there everything must hold. And at every access of the segment, S overtakes T, which goes on. */
#include "crash.h"

#define STRAYED_MOST 20 /* boundaries; or 1 %, if that is more */
#define WARM_UP 10 /* boundaries; the C library keeps up to 7 free pieces of each size apart */

/* The path to where S meddles, and the path after it (the only one, if S does not meddle). */
static recording_t path_to, path;

static void traced(void) {
  world = world_at_start;
  if (!(op->flags & (UNJOINED | FILES))) (void)process_index(world.s);
  if (op->prepare) op->prepare();
  outcome_t *out = told;
  void (*run)(outcome_t *) = op->run;
  mark_begin();
  run(out);
  out->done = 1;
  mark_end();
}

/* A budget looks at the rows of all processes, so its path depends on whose row comes first. T's index follows from its
 * pid: it is to be always in a later word of `joined` than S's, or always in an earlier one. */
static bool in_order(pid_t pid) {
  if (op->op < MONEY_RESERVE || op->op > MONEY_WITHDRAW) return true;
  const uint32_t mine = process_index(world.s) / 64,
                 its = (uint32_t)pid * 2654435761u % HOME_PROCESSES / 64;
  return mine < HOME_PROCESSES / 128 ? its > mine : its < mine;
}

static tracee_t start_traced(void) {
  memset(told, 0, sizeof *told);
  /* Each T asks the system anew who lives, and once: the same instructions, however slow the machine is. */
  if (world.s) memset(world.s->looked, 0, sizeof world.s->looked);
  tracee_t t = tracee_start(traced);
  while (!t.lost && !in_order(t.pid)) {
    tracee_kill(&t);
    segment_restore(pristine);
    t = tracee_start(traced);
  }
  if (!t.lost && op->flags & PREDECESSOR) make_predecessor(t.pid);
  return t;
}

static void begin_boundary(const char *stage, size_t k) {
  turn = 0;
  position = (position_t){.stage = stage, .k = k, .pc = k < path.count ? path.pc[k] : 0};
  if (op->flags & FILES) op->make();
  segment_restore(pristine);
}

static bool slots_changed(void) {
  return memcmp(world.s->slots, pristine + ((unsigned char *)world.s->slots - world.s->map),
                shared_slot(world.s, world.s->limiter_count, 0, 0) * sizeof(slot_t)) != 0;
}

/* Where S meddles: when T has changed a slot for the first time. */
static void find_meddling(tracee_t *t) {
  path_to.count = 0;
  recording_t steps = {0};
  steps.room = 100000;
  steps.pc = calloc(steps.room, sizeof *steps.pc);
  if (!steps.pc) abort();
  while (steps.count + 1 < steps.room && !slots_changed()) {
    steps.pc[steps.count] = tracee_pc(t);
    if (!tracee_step(t, NULL, NULL)) break;
    steps.count++;
  }
  steps.pc[steps.count] = tracee_pc(t);
  path_to = steps;
  op->meddle();
}

/* One undisturbed run: its path, and what it leads to. */
static bool learn(void) {
  begin_boundary("undisturbed", 0);
  tracee_t t = start_traced();
  if (!t.lost && op->holds->begin) op->holds->begin();
  if (!t.lost && op->meddle) find_meddling(&t);
  if (!t.lost && told->mapping) tracee_mapping(told->mapping, told->mapped);
  if (world.s || told->mapping) tracee_guard(&t, true);
  if (!t.lost) tracee_record(&t, &path);
  if (!t.lost) tracee_guard(&t, false);
  if (t.lost)
    broken("T: %s", t.why);
  else if (!told->done)
    broken("T has not answered");
  else if (op->holds->end)
    op->holds->end();
  tracee_kill(&t);
  return !position.failed;
}

/* T at instruction k. Where it does not go by the recorded path, by counting instructions. */
static tracee_t start_at(size_t k) {
  tracee_t t = start_traced();
  bool there = !t.lost;
  if (there && op->meddle && (there = tracee_forward(&t, &path_to, 0, path_to.count))) op->meddle();
  if (there && tracee_forward(&t, &path, 0, k)) {
    totals->strayed += tracee_pc(&t) != path.pc[k];
    return t;
  }
  tracee_kill(&t);
  totals->strayed++;
  if (op->flags & FILES) op->make();
  segment_restore(pristine);
  t = start_traced();
  for (size_t i = 0; !t.lost && i < (op->meddle ? path_to.count : 0); i++)
    (void)tracee_step(&t, NULL, NULL);
  if (op->meddle) op->meddle();
  for (size_t i = 0; !t.lost && !t.at_end && i < k; i++) (void)tracee_step(&t, NULL, NULL);
  return t;
}

static void survive(void) {
  check_invariants(true);
  op->holds->survive();
  check_invariants(true);
}

static void stop_and_kill(size_t k) {
  begin_boundary("stopped", k);
  tracee_t t = start_at(k);
  if (t.lost) {
    broken("T: %s", t.why);
  } else {
    position.pc = tracee_pc(&t);
    segment_save(&stopped);
    in_time(op->holds->contend);
    segment_restore(stopped);
    tracee_kill(&t);
    position.stage = "killed";
    in_time(survive);
  }
  tracee_kill(&t);
  totals->boundaries++;
}

static outcome_t overtaking;
static void overtake(void) {
  memset(&overtaking, 0, sizeof overtaking);
  if (op->overtake)
    op->holds->overtake();
  else if (op->flags & ROUGH)
    overtaking.status = apply_at(world.l, FSHM_ACQUIRE, KEY, 1, world.now).status;
  else
    op->run(&overtaking);
}
static void check_race(void) { op->holds->raced(&overtaking); }

static tracee_t overtaken;
static void go_on(void) { tracee_finish(&overtaken); }

static void race(size_t k) {
  begin_boundary("overtaken", k);
  overtaken = start_at(k);
  if (!overtaken.lost) {
    position.pc = tracee_pc(&overtaken);
    in_time(overtake);
    in_time(go_on);
  }
  if (overtaken.lost)
    broken("T: %s", overtaken.why);
  else if (!position.failed)
    in_time(check_race);
  tracee_kill(&overtaken);
  totals->races++;
}

/* What is off the recorded path tries some boundaries twice, and others never: a few are the C library's. */
static void check_strayed(void) {
  if (totals->strayed <= max_u64(STRAYED_MOST, totals->boundaries / 100)) return;
  totals->failures++;
  (void)fprintf(stderr,
                "FAILED %s: %llu of %llu boundaries are not on the recorded path\n"
                "  repeat: make crash CRASH='--only %s'\n",
                op->name, (unsigned long long)totals->strayed,
                (unsigned long long)totals->boundaries, op->name);
}

/* One operation, in a process of its own. */
static void try_operation(const operation_t *o) {
  op = o;
  told = shared_memory(sizeof *told);
  memset(&world, 0, sizeof world);
  op->make();
  world_at_start = world;
  segment_save(&pristine);
  protect_others();
  /* Twice: T inherits S's heap, which is as it will be after some boundaries. */
  if (!learn()) return;
  for (int i = 0; i < WARM_UP && !given_up(); i++) stop_and_kill(path.count);
  if (!learn()) return;
  totals->boundaries = totals->strayed = 0;
  const size_t every = path.count > options.above ? options.every : 1;
  for (size_t k = 0; k <= path.count && !given_up(); k++) {
    if (options.at >= 0 && k != (size_t)options.at) continue;
    bool changes = k == path.count || path.point[k]; /* never thinned out: each state is seen */
    if (k % every == 0 || changes || options.at >= 0) stop_and_kill(k);
    /* --at: the path may be some instructions longer in another run, that asks the kernel about other processes. */
    const bool races = k < path.count && (path.point[k] || options.at >= 0);
    if (op->holds->raced && !op->meddle && races) race(k);
  }
  check_strayed();
}
