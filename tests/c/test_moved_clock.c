/* A clock of a segment that a test moves: for all processes that have its file, forward only, and stopped. */
#include "../../csrc/unity.c"

#include "check.h"

static int empty_file(void) {
  char path[] = "/tmp/fast-shm-clock-XXXXXX";
  int fd = mkstemp(path);
  CHECK(fd >= 0);
  (void)unlink(path);
  return fd;
}

static void test_without(void) {
  fshm_segment *s = fresh_segment(100);
  int how = 7;
  CHECK_EQ(fshm_clock_moved(s, &how), 0);
  CHECK_EQ(how, 0);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, 1), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_STOP, 0), FSHM_E_ARGUMENT);
  const uint64_t before = segment_now(s);
  CHECK(before && segment_now(s) >= before);
  /* What the clock of the machine cannot be: the time stays within its bounds. */
  store_relaxed(&clock_of(s)->epoch, UINT64_MAX);
  CHECK(segment_now(s) >= 1);
  store_relaxed(&clock_of(s)->epoch, fshm_clock() + UINT64_C(1000000000000));
  CHECK_EQ(segment_now(s), 1);
  store_relaxed(&clock_of(s)->epoch, fshm_clock() - (UINT64_C(1) << 62));
  CHECK_EQ(segment_now(s), TIME_MAX - 1);
  store_relaxed(&clock_of(s)->epoch, s->epoch);
}

static void test_moved(void) {
  fshm_segment *s = fresh_segment(100);
  const int fd = empty_file();
  int how;
  CHECK_EQ(fshm_clock_share(s, fd, 0), FSHM_E_ARGUMENT); /* nothing in it */
  const uint64_t first = segment_now(s);
  CHECK_EQ(fshm_clock_share(s, fd, 1), FSHM_OK);
  CHECK(segment_now(s) >= first);
  const uint64_t hour = UINT64_C(3600000000000), to = segment_now(s) + hour;
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, to), FSHM_OK);
  CHECK(segment_now(s) >= to && segment_now(s) < to + hour);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, 1), FSHM_OK); /* never back */
  CHECK(segment_now(s) >= to);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_STOP, 0), FSHM_OK);
  const uint64_t stands = segment_now(s);
  CHECK_EQ(segment_now(s), stands);
  CHECK(fshm_clock_moved(s, &how) <= hour && how == 1);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_HOLD, 1), FSHM_OK);
  CHECK(fshm_clock_moved(s, &how) && how == 3);
  /* Moved by longer than the machine has run: the epoch wraps. */
  const uint64_t later = stands + UINT64_C(4) * 365 * 24 * hour;
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, later), FSHM_OK);
  CHECK_EQ(segment_now(s), later);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_RUN, 0), FSHM_OK);
  CHECK(segment_now(s) >= later);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, TIME_MAX), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_clock_move(s, 99, 0), FSHM_E_ARGUMENT);
  (void)close(fd);
}

/* The time of day moves with it, exactly; and to any date. */
static void test_day(void) {
  fshm_segment *s = fresh_segment(100);
  const int fd = empty_file();
  CHECK_EQ(fshm_clock_share(s, fd, 1), FSHM_OK);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_STOP, 0), FSHM_OK);
  const uint64_t hour = UINT64_C(3600000000000), day = fshm_wall(s, 0), now = segment_now(s);
  for (uint64_t i = 1; i <= 100; i++) {
    CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, now + i * hour), FSHM_OK);
    CHECK_EQ(fshm_wall(s, 0) - day, i * hour);
  }
  const uint64_t then = fshm_wall(s, 0);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_DAY, (uint64_t)-(int64_t)(1000 * hour)), FSHM_OK);
  CHECK_EQ(fshm_wall(s, 0), then - 1000 * hour);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_DAY, 990 * hour), FSHM_OK);
  CHECK_EQ(fshm_wall(s, 0), then - 10 * hour);
  CHECK_EQ(segment_now(s), now + 100 * hour);
  (void)close(fd);
}

/* A child of a fork, and another mapping of the segment, have the same clock; another segment has not. */
static void test_shared(void) {
  fshm_segment *s = fresh_segment(100), *other = fresh_segment(100);
  const int fd = empty_file();
  CHECK_EQ(fshm_clock_share(s, fd, 1), FSHM_OK);
  CHECK_EQ(fshm_clock_share(other, fd, 0), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_STOP, 0), FSHM_OK);
  int down[2];
  CHECK(!pipe(down));
  const uint64_t to = segment_now(s) + UINT64_C(5000000000);
  pid_t child = fork();
  if (!child) {
    char byte = 0;
    if (read(down[0], &byte, 1) != 1) _exit(2);
    _exit(segment_now(s) == to ? 0 : 1); /* moved after the fork */
  }
  CHECK_EQ(fshm_clock_move(s, FSHM_MOVE_TO, to), FSHM_OK);
  CHECK_EQ(write(down[1], "x", 1), 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(!clock_of(other)->magic);
  (void)close(down[0]);
  (void)close(down[1]);
  (void)close(fd);
}

int main(void) {
  test_without();
  test_moved();
  test_day();
  test_shared();
  return done();
}
