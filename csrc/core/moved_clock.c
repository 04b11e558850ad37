/* moved_clock.c - a clock of a segment that tests move. Argued in DESIGN.md, "A clock that tests move".
 *
 * A handle's clock ends the page before the handle. A test puts a page of a file in that place: so all processes that
 * do it have one clock, and reading it costs what it costs without a test. Only one process at a time writes it.
 */
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "wall.h"

#define CLOCK_MAGIC UINT64_C(0x6b636f6c632d6d73) /* "sm-clock" */
#define STANDS (UINT64_C(1) << 62) /* an epoch: no clock is that late, so the time is `still` */

uint64_t clock_beyond(const segment_clock_t *clock, uint64_t differ) {
  if (differ && differ < UINT64_C(1) << 63) return TIME_MAX - 1;
  /* The segment was just made, or a test has stopped its clock. */
  atomic_thread_fence(memory_order_acquire); /* pairs with FSHM_MOVE_STOP */
  return load_relaxed(&clock->still);
}

static const segment_clock_t *end_of(const unsigned char *page) {
  return (const segment_clock_t *)(const void *)(page + page_size()) - 1;
}

static int write_clock(const fshm_segment *s, int fd) {
  const size_t page = page_size();
  segment_clock_t clock = {.magic = CLOCK_MAGIC,
                           .instance = s->instance,
                           .epoch = s->epoch,
                           .still = 1,
                           .day = load_relaxed(&s->header->wall_base)};
  if (ftruncate(fd, (off_t)page)) return FSHM_E_SYSTEM;
  return pwrite(fd, &clock, sizeof clock, (off_t)(page - sizeof clock)) == (ssize_t)sizeof clock
             ? FSHM_OK
             : FSHM_E_SYSTEM;
}

int fshm_clock_share(fshm_segment *s, int fd, int make) {
  const size_t page = page_size();
  struct stat st;
  if (make && write_clock(s, fd) != FSHM_OK) return FSHM_E_SYSTEM;
  if (fstat(fd, &st)) return FSHM_E_SYSTEM;
  if (!S_ISREG(st.st_mode) || st.st_size != (off_t)page) return FSHM_E_ARGUMENT;
  void *seen = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);
  if (seen == MAP_FAILED) return FSHM_E_SYSTEM;
  const bool ours = end_of(seen)->magic == CLOCK_MAGIC && end_of(seen)->instance == s->instance;
  (void)munmap(seen, page);
  if (!ours) return FSHM_E_ARGUMENT;
  /* The kernel replaces the page at once: another thread that reads it sees one of the two. */
  void *at = (unsigned char *)s - page;
  if (mmap(at, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
    return FSHM_E_SYSTEM;
  return FSHM_OK;
}

int fshm_clock_move(fshm_segment *s, int how, uint64_t now) {
  segment_clock_t *c = clock_of(s);
  if (c->magic != CLOCK_MAGIC) return FSHM_E_ARGUMENT;
  const uint64_t seen = segment_now(s);
  const bool stands = load_relaxed(&c->epoch) == STANDS;
  switch (how) {
    case FSHM_MOVE_TO:
      if (now >= TIME_MAX - 1) return FSHM_E_ARGUMENT;
      if (now <= seen) return FSHM_OK;
      if (stands)
        store_relaxed(&c->still, now);
      else
        store_relaxed(&c->epoch, load_relaxed(&c->epoch) - (now - seen));
      add_relaxed(&c->moved, now - seen);
      break;
    case FSHM_MOVE_STOP:
      if (stands) break;
      store_relaxed(&c->still, seen);
      /* release: pairs with segment_now(), which reads `still` if it sees this epoch */
      atomic_store_explicit(&c->epoch, STANDS, memory_order_release);
      break;
    case FSHM_MOVE_RUN:
      if (stands) store_relaxed(&c->epoch, fshm_clock() - seen);
      break;
    case FSHM_MOVE_DAY:
      add_relaxed(&c->day, now);
      break;
    case FSHM_MOVE_HOLD:
      store_relaxed(&c->holds, now != 0);
      break;
    default:
      return FSHM_E_ARGUMENT;
  }
  wall_look_now(s);
  return FSHM_OK;
}

uint64_t fshm_clock_moved(fshm_segment *s, int *how) {
  const segment_clock_t *c = clock_of(s);
  const bool stands = load_relaxed(&c->epoch) == STANDS;
  *how = stands ? 1 + 2 * (load_relaxed(&c->holds) != 0) : 0;
  return load_relaxed(&c->moved);
}
