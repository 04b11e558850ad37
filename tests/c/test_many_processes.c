/* test_many_processes.c - more processes hold permits than there are cores in any host: each has its own, and all come
 * back when they end. */
#include "../../csrc/unity.c"

#include <sys/resource.h>

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define MANY 1000

typedef struct {
  fshm_limiter *limiter;
  _Atomic uint32_t held, refused, counted, denied;
  _Atomic int leave;
} stage_t;

static int admit(fshm_limiter *l, fshm_permit *p) {
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, "k", 1, NULL, 0, p, &d, &in_flight);
  return d.status;
}

static void hold_one(int me, void *with) {
  stage_t *stage = with;
  fshm_permit p, more;
  int status = admit(stage->limiter, &p);
  (void)me;
  atomic_fetch_add(status == FSHM_ALLOWED ? &stage->held : &stage->refused, 1);
  while (atomic_load(&stage->leave) == 0) (void)usleep(20000);
  if (me % 100 == 0) atomic_fetch_add(&stage->denied, admit(stage->limiter, &more) == FSHM_DENIED);
  atomic_fetch_add(&stage->counted, 1);
  while (atomic_load(&stage->leave) == 1) (void)usleep(20000);
  if (me % 2) (void)raise(SIGKILL);
  CHECK_EQ(fshm_permit_release(stage->limiter, &p), 1);
}

int main(void) {
  const fshm_limit n = {MANY, 0, 0, FSHM_PERMITS, 0};
  fshm_segment *s = fresh_segment(5000);
  stage_t *stage = shared_memory(sizeof *stage);
  fshm_geometry before, after;
  struct stat st;
  fshm_permit p;
  pid_t pids[MANY];
  struct rlimit most;
  if (!getrlimit(RLIMIT_NPROC, &most) && most.rlim_cur < 2 * MANY) return done();
  stage->limiter = fresh_limiter(s, "a", &n, 1);
  fshm_describe(s, &before);
  CHECK_OP(before.processes, >=, 4096);
  for (int i = 0; i < MANY; i++) pids[i] = start_child(hold_one, i, stage);
  while (atomic_load(&stage->held) + atomic_load(&stage->refused) < MANY) (void)usleep(5000);
  CHECK_EQ(stage->held, MANY);
  CHECK_EQ(admit(stage->limiter, &p), FSHM_DENIED);
  CHECK_EQ(fshm_in_flight(stage->limiter, "k", 1), MANY);
  uint32_t living = 0;
  fshm_describe(s, &after);
  for (uint32_t i = 0; i < after.processes_joined; i++) {
    fshm_process_info info;
    CHECK_EQ(fshm_process_at(s, i, &info), FSHM_OK);
    living += info.alive != 0;
  }
  CHECK_EQ(living, MANY + 1);
  /* They took what they need, and no more: a block of 64 beyond them. */
  CHECK_OP(after.processes_joined, <=, MANY + 2);
  CHECK_EQ(stat(s->path, &st), 0);
  CHECK_OP(st.st_blocks * 512, >=, (off_t)after.memory);
  CHECK_OP(after.memory, <, before.memory + (MANY + 128) * image_row_bytes());
  atomic_store(&stage->leave, 1);
  while (atomic_load(&stage->counted) < MANY) (void)usleep(5000);
  CHECK_EQ(stage->denied, MANY / 100);
  atomic_store(&stage->leave, 2);
  for (int i = 0; i < MANY; i++) CHECK_EQ(waitpid(pids[i], NULL, 0), pids[i]);
  const uint64_t end = fshm_now(s) + 60 * SECOND;
  while (fshm_in_flight(stage->limiter, "k", 1) && fshm_now(s) < end) (void)usleep(1000);
  CHECK_EQ(fshm_in_flight(stage->limiter, "k", 1), 0);
  for (int i = 0; i < MANY; i++) CHECK_EQ(admit(stage->limiter, &p), FSHM_ALLOWED);
  CHECK_EQ(admit(stage->limiter, &p), FSHM_DENIED);
  fshm_limiter_close(stage->limiter);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
  return done();
}
