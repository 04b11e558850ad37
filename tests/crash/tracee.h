/* tracee.h - a child process that runs an operation one instruction at a time, under ptrace (x86-64 Linux).
 *
 * The child runs a task that calls mark_begin(), the operation, mark_end(). Instruction k of the operation
 * is the one that it executes k-th after mark_begin(); an instruction with a repeat prefix counts as one.
 * One stop costs some 20 us, a fork and its death 150 us: what is far away is reached by a breakpoint. */
#ifndef TRACEE_H
#define TRACEE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the crash harness traces x86-64 Linux processes"
#endif

void mark_begin(void);
void mark_end(void);

typedef struct {
  pid_t pid; /* 0 = none */
  uint64_t stack; /* its stack pointer at mark_begin() */
  bool guarded; /* the segment's mapping is PROT_NONE: each access is seen */
  bool at_end; /* stands at mark_end() */
  bool lost; /* died, or stopped for a reason that is not ours: says `why` */
  const char *why;
} tracee_t;

/* The path of one run. */
typedef struct {
  uint64_t *pc; /* pc[i]: of the i-th instruction; pc[count]: mark_end() */
  bool *point; /* accesses the segment's mapping, or is a system call */
  uint64_t *address; /* of the access in the mapping, 0 = a system call */
  size_t count, room;
} recording_t;

/* Everything that the process would go on with. */
typedef struct {
  struct user_regs_struct registers;
  struct user_fpregs_struct floats;
  unsigned char *stack; /* from `from` up */
  uint64_t from;
  size_t size;
} checkpoint_t;

/* Where the mapping is that guarding protects. */
void tracee_mapping(const void *start, size_t size);

/* Forks; the child runs task(), and stands at mark_begin() when this returns. */
tracee_t tracee_start(void (*task)(void));
void tracee_guard(tracee_t *t, bool on);
uint64_t tracee_pc(const tracee_t *t);
/* One instruction. False: at the end, or lost. `address`: of the access, if guarded and there was one. */
bool tracee_step(tracee_t *t, bool *point, uint64_t *address);
/* Step to the end, and note the path. */
void tracee_record(tracee_t *t, recording_t *r);
/* From instruction `from` to instruction `to` of the recorded path. False: it does not come by the place of the
 * breakpoint. From there on instructions are counted: it may be elsewhere than on the recorded path. */
bool tracee_forward(tracee_t *t, const recording_t *r, size_t from, size_t to);
/* Guarded: run until the next access is about to happen. False: the end comes first. */
bool tracee_to_access(tracee_t *t, uint64_t *address);
/* Do the access that it stands before. */
void tracee_access(tracee_t *t);
void tracee_finish(tracee_t *t);
void tracee_kill(tracee_t *t);

void tracee_save(const tracee_t *t, checkpoint_t *to);
void tracee_restore(tracee_t *t, const checkpoint_t *from);

#endif
