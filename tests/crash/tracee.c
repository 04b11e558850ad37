/* tracee.c - see tracee.h. */
#include "tracee.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_INSTRUCTIONS 2000000
#define FORWARD_WINDOW 4000 /* how far before the goal a place for the breakpoint is looked for */
#define STACK_MOST 65536
#define RED_ZONE 128 /* bytes below the stack pointer that belong to the function */
#define CALLER 1024 /* bytes above it at mark_begin(): the frame of the task */

/* Each mark is one int3, so that a tracee stands behind it; the gadget lets the tracer make it call. */
__asm__(
    ".text\n"
    ".globl mark_begin\n.type mark_begin,@function\nmark_begin:\n int3\n ret\n"
    ".globl mark_end\n.type mark_end,@function\nmark_end:\n int3\n ret\n"
    ".globl call_gadget\ncall_gadget:\n syscall\n int3\n");
void call_gadget(void);
extern char
    etext; /* the linker's: where the program's own text ends; the kernel's page is beyond */

static uint64_t mapping, mapping_size;

void tracee_mapping(const void *start, size_t size) {
  mapping = (uint64_t)(uintptr_t)start;
  mapping_size = size;
}

static void lose(tracee_t *t, const char *why) {
  t->lost = true;
  t->why = why;
}

/* Wait for the next stop. Returns the signal it stopped for; 0 = it is gone. */
static int wait_stop(tracee_t *t) {
  int status;
  while (waitpid(t->pid, &status, __WALL) < 0) {
    if (errno == EINTR) continue;
    lose(t, "it cannot be waited for");
    return 0;
  }
  if (WIFSTOPPED(status)) return WSTOPSIG(status);
  t->pid = 0;
  lose(t, "it ended");
  return 0;
}

static void go(tracee_t *t, int how) {
  if (ptrace((enum __ptrace_request)how, t->pid, NULL, NULL)) lose(t, "ptrace refused to go on");
}

uint64_t tracee_pc(const tracee_t *t) {
  return (uint64_t)ptrace(PTRACE_PEEKUSER, t->pid, offsetof(struct user, regs.rip), NULL);
}

static void set_pc(const tracee_t *t, uint64_t pc) {
  (void)ptrace(PTRACE_POKEUSER, t->pid, offsetof(struct user, regs.rip), pc);
}

static uint64_t text_at(const tracee_t *t, uint64_t pc) {
  return (uint64_t)ptrace(PTRACE_PEEKTEXT, t->pid, pc, NULL);
}

static void set_text(const tracee_t *t, uint64_t pc, uint64_t word) {
  (void)ptrace(PTRACE_POKETEXT, t->pid, pc, word);
}

tracee_t tracee_start(void (*task)(void)) {
  tracee_t t = {0};
  (void)fflush(NULL);
  t.pid = fork();
  if (t.pid < 0) {
    t.pid = 0;
    lose(&t, "no fork");
    return t;
  }
  if (!t.pid) {
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) _exit(99);
    task();
    _exit(0);
  }
  int stopped = wait_stop(&t);
  if (stopped && (stopped != SIGTRAP || tracee_pc(&t) != (uint64_t)(uintptr_t)mark_begin + 1))
    lose(&t, "it did not reach its beginning");
  if (!t.pid) return t;
  (void)ptrace(PTRACE_SETOPTIONS, t.pid, NULL, PTRACE_O_EXITKILL);
  t.stack = (uint64_t)ptrace(PTRACE_PEEKUSER, t.pid, offsetof(struct user, regs.rsp), NULL);
  return t;
}

/* Make the tracee do one system call. */
static uint64_t call(tracee_t *t, uint64_t number, uint64_t a, uint64_t b, uint64_t c) {
  struct user_regs_struct before, regs;
  (void)ptrace(PTRACE_GETREGS, t->pid, NULL, &before);
  regs = before;
  regs.rip = (uint64_t)(uintptr_t)call_gadget;
  regs.rax = number;
  regs.orig_rax = UINT64_MAX;
  regs.rdi = a;
  regs.rsi = b;
  regs.rdx = c;
  (void)ptrace(PTRACE_SETREGS, t->pid, NULL, &regs);
  go(t, PTRACE_CONT);
  if (wait_stop(t) != SIGTRAP) {
    lose(t, "a system call made for it did not return");
    return UINT64_MAX;
  }
  (void)ptrace(PTRACE_GETREGS, t->pid, NULL, &regs);
  before.orig_rax = UINT64_MAX; /* nothing to restart */
  (void)ptrace(PTRACE_SETREGS, t->pid, NULL, &before);
  return regs.rax;
}

void tracee_guard(tracee_t *t, bool on) {
  if (t->lost || t->guarded == on) return;
  uint64_t protection = on ? PROT_NONE : PROT_READ | PROT_WRITE;
  if (call(t, SYS_mprotect, mapping, mapping_size, protection) && !t->lost)
    lose(t, "mprotect failed in it");
  t->guarded = on;
}

/* The address in the mapping that the stop for SIGSEGV was about; 0 = it is elsewhere. */
static uint64_t fault_address(const tracee_t *t) {
  siginfo_t info;
  if (ptrace(PTRACE_GETSIGINFO, t->pid, NULL, &info)) return 0;
  uint64_t at = (uint64_t)(uintptr_t)info.si_addr;
  return at >= mapping && at < mapping + mapping_size ? at : 0;
}

static bool step_once(tracee_t *t) {
  go(t, PTRACE_SINGLESTEP);
  int stopped = t->lost ? 0 : wait_stop(t);
  if (stopped == SIGTRAP) return true;
  if (stopped == SIGSEGV && t->guarded && fault_address(t)) return false;
  if (stopped) lose(t, stopped == SIGSEGV ? "it had a SIGSEGV" : "it stopped for another signal");
  return false;
}

static bool check_end(tracee_t *t, uint64_t pc) {
  t->at_end = pc == (uint64_t)(uintptr_t)mark_end;
  return t->at_end;
}

bool tracee_step(tracee_t *t, bool *point, uint64_t *address) {
  uint64_t pc = tracee_pc(t), to = pc;
  if (point) *point = false;
  if (address) *address = 0;
  if (t->lost || check_end(t, pc)) return false;
  bool guarded = t->guarded;
  if ((text_at(t, pc) & 0xffff) == 0x050f) { /* syscall: the kernel would answer EFAULT */
    tracee_guard(t, false);
    if (point) *point = true;
  }
  for (int i = 0; i < MOST_INSTRUCTIONS && to == pc && !t->lost; i++) {
    if (!step_once(t)) {
      if (t->lost) return false;
      if (point) *point = true;
      if (address) *address = fault_address(t);
      tracee_guard(t, false);
      continue; /* the access itself */
    }
    to = tracee_pc(t);
  }
  if (guarded) tracee_guard(t, true);
  if (to == pc) lose(t, "it does not get beyond one instruction");
  return !t->lost;
}

void tracee_record(tracee_t *t, recording_t *r) {
  r->count = 0;
  for (;;) {
    if (r->count + 1 >= r->room) {
      r->room = r->room ? 2 * r->room : 4096;
      r->pc = realloc(r->pc, r->room * sizeof *r->pc);
      r->point = realloc(r->point, r->room * sizeof *r->point);
      r->address = realloc(r->address, r->room * sizeof *r->address);
      if (!r->pc || !r->point || !r->address) abort();
    }
    size_t i = r->count;
    r->pc[i] = tracee_pc(t);
    r->point[i] = false;
    r->address[i] = 0;
    if (!tracee_step(t, &r->point[i], &r->address[i])) return;
    if (++r->count > MOST_INSTRUCTIONS) {
      lose(t, "it does not end");
      return;
    }
  }
}

/* Run on until pc is about to be executed for the (passes + 1)-th time. */
static bool run_to(tracee_t *t, uint64_t pc, size_t passes) {
  uint64_t word = text_at(t, pc), trap = (word & ~UINT64_C(0xff)) | 0xcc;
  for (size_t pass = 0;; pass++) {
    set_text(t, pc, trap);
    go(t, PTRACE_CONT);
    int stopped = t->lost ? 0 : wait_stop(t);
    if (!stopped) return false;
    set_text(t, pc, word);
    uint64_t at = tracee_pc(t);
    if (stopped != SIGTRAP || at != pc + 1) {
      if (stopped == SIGTRAP && at == (uint64_t)(uintptr_t)mark_end + 1) {
        set_pc(t, at - 1);
        t->at_end = true;
      } else {
        lose(t, stopped == SIGSEGV ? "it had a SIGSEGV" : "it stopped for another signal");
      }
      return false;
    }
    set_pc(t, pc);
    if (pass == passes) return true;
    if (!tracee_step(t, NULL, NULL)) return false;
  }
}

bool tracee_forward(tracee_t *t, const recording_t *r, size_t from, size_t to) {
  size_t best = from, cost = to - from, lowest = to > FORWARD_WINDOW ? to - FORWARD_WINDOW : 0;
  for (size_t j = to; j > from && j >= lowest && to - j < cost; j--) {
    size_t passes = 0, most = (cost - (to - j)) / 2;
    if (r->pc[j] >= (uint64_t)(uintptr_t)&etext) continue;
    for (size_t i = from; i < j && passes <= most; i++) passes += r->pc[i] == r->pc[j];
    if (2 * passes + 2 + (to - j) >= cost) continue;
    cost = 2 * passes + 2 + (to - j);
    best = j;
  }
  if (best > from) {
    size_t passes = 0;
    for (size_t i = from; i < best; i++) passes += r->pc[i] == r->pc[best];
    if (r->pc[best] == (uint64_t)(uintptr_t)mark_end) {
      tracee_finish(t);
      return !t->lost;
    }
    if (!run_to(t, r->pc[best], passes)) return false;
  }
  for (size_t i = best; i < to; i++)
    if (!tracee_step(t, NULL, NULL)) return t->at_end;
  return true;
}

bool tracee_to_access(tracee_t *t, uint64_t *address) {
  if (t->lost || t->at_end) return false;
  go(t, PTRACE_CONT);
  int stopped = t->lost ? 0 : wait_stop(t);
  if (stopped == SIGSEGV && (*address = fault_address(t))) return true;
  if (stopped == SIGTRAP && tracee_pc(t) == (uint64_t)(uintptr_t)mark_end + 1) {
    set_pc(t, (uint64_t)(uintptr_t)mark_end);
    t->at_end = true;
  } else if (stopped) {
    lose(t, "it stopped where nothing was expected");
  }
  return false;
}

void tracee_access(tracee_t *t) {
  tracee_guard(t, false);
  if (!t->lost) (void)step_once(t);
  tracee_guard(t, true);
}

void tracee_finish(tracee_t *t) {
  tracee_guard(t, false);
  if (t->lost || t->at_end || check_end(t, tracee_pc(t))) return;
  go(t, PTRACE_CONT);
  int stopped = t->lost ? 0 : wait_stop(t);
  if (!stopped) return;
  if (stopped != SIGTRAP || tracee_pc(t) != (uint64_t)(uintptr_t)mark_end + 1) {
    lose(t, stopped == SIGSEGV ? "it had a SIGSEGV" : "it stopped for another signal");
    return;
  }
  set_pc(t, (uint64_t)(uintptr_t)mark_end);
  t->at_end = true;
}

void tracee_kill(tracee_t *t) {
  if (!t->pid) return;
  (void)kill(t->pid, SIGKILL);
  int status;
  do {
    if (waitpid(t->pid, &status, __WALL) < 0 && errno != EINTR) break;
  } while (!WIFEXITED(status) && !WIFSIGNALED(status));
  t->pid = 0;
}

/* What is not in registers is on the stack: the tasks of schedules keep nothing else between accesses. */
void tracee_save(const tracee_t *t, checkpoint_t *to) {
  (void)ptrace(PTRACE_GETREGS, t->pid, NULL, &to->registers);
  (void)ptrace(PTRACE_GETFPREGS, t->pid, NULL, &to->floats);
  if (!to->stack && !(to->stack = malloc(STACK_MOST))) abort();
  to->from = to->registers.rsp - RED_ZONE;
  to->size = t->stack + CALLER - to->from;
  if (to->size > STACK_MOST) abort();
  struct iovec mine = {to->stack, to->size}, theirs = {(void *)(uintptr_t)to->from, to->size};
  if (process_vm_readv(t->pid, &mine, 1, &theirs, 1, 0) != (ssize_t)to->size) abort();
}

void tracee_restore(tracee_t *t, const checkpoint_t *from) {
  struct iovec mine = {from->stack, from->size},
               theirs = {(void *)(uintptr_t)from->from, from->size};
  struct user_regs_struct registers = from->registers;
  registers.orig_rax = UINT64_MAX;
  if (process_vm_writev(t->pid, &mine, 1, &theirs, 1, 0) != (ssize_t)from->size)
    lose(t, "its stack could not be put back");
  (void)ptrace(PTRACE_SETREGS, t->pid, NULL, &registers);
  (void)ptrace(PTRACE_SETFPREGS, t->pid, NULL, &from->floats);
  t->at_end = false;
}
