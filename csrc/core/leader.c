/* leader.c - leader election among the processes of a host. DESIGN.md, "Processes". */
#include <time.h>

#include "internal.h"

/* The leader is the process that header_t.leader names, while it lives. All its threads lead together. */
#define LEADS(process, incarnation) ((incarnation) << 16 | ((process) + 1))
#define LOOK_FOR_LEADER_NS 250000000

/* The index of the living process that the word names, or NO_PROCESS. */
static uint32_t leader_index(fshm_segment *s, uint64_t word) {
  uint32_t process = (uint32_t)(word & 0xffff) - 1;
  if (!process_joined(s, process)) return NO_PROCESS;
  uint64_t incarnation =
      atomic_load_explicit(&s->processes[process].incarnation, memory_order_acquire);
  return LEADS(process, incarnation) == word && process_alive(s, process) ? process : NO_PROCESS;
}

int fshm_lead(fshm_segment *s, int wait) {
  uint32_t process;
  uint64_t incarnation;
  if (s->read_only) return FSHM_E_READ_ONLY;
  for (;;) {
    if (process_identity(s, &process, &incarnation)) {
      uint64_t seen = load_relaxed(&s->header->leader), mine = LEADS(process, incarnation);
      if (seen == mine) return 1;
      /* From none, or a dead process, to us: one swap. No other memory depends on it: relaxed would do. */
      if (leader_index(s, seen) == NO_PROCESS &&
          (atomic_compare_exchange_strong(&s->header->leader, &seen, mine) || seen == mine))
        return 1; /* or another thread of ours was first */
    } else if (process_refusal(s) == FSHM_E_LOCK_FILE) {
      return FSHM_E_LOCK_FILE;
    } /* the process table is full: this process does not lead until an index is free */
    struct timespec pause = {0, LOOK_FOR_LEADER_NS};
    if (!wait || nanosleep(&pause, NULL)) return 0; /* a signal */
  }
}

int fshm_lead_end(fshm_segment *s) {
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  if (s->read_only || (!s->wiped && process_forked(s)) || !joined || joined == NO_PROCESS) return 0;
  uint64_t mine = LEADS(joined - 1, load_relaxed(&s->fork_page->incarnation));
  (void)atomic_compare_exchange_strong(&s->header->leader, &mine, 0);
  return 1;
}

uint32_t fshm_leader(fshm_segment *s) {
  uint32_t process = leader_index(s, load_relaxed(&s->header->leader));
  return process == NO_PROCESS ? 0 : load_relaxed(&s->processes[process].pid);
}
