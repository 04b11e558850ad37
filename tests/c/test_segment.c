/* test_segment.c - create, attach, verify, remove (segment.c and image.c). */
#include "../../csrc/unity.c"

#include "check.h"

static int open_as(const char *name, uint64_t capacity, uint32_t flags, fshm_error *e) {
  fshm_segment *s;
  int status = fshm_open(name, capacity, 0600, flags, &s, e);
  CHECK_EQ(s != NULL, status == FSHM_OK);
  CHECK(status == FSHM_OK || e->code == status);
  fshm_close(s);
  return status;
}

static void test_names(void) {
  fshm_error e;
  char path[256], name[FSHM_MAX_NAME + 2] = {0};
  const char *bad[] = {"",    ".",   "..",       ".hidden", "a/b", "/a",
                       "a b", "a\n", "\xc3\xa4", "a\\b",    "*"};
  for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
    CHECK_EQ(open_as(bad[i], 1, FSHM_OPEN_CREATE, &e), FSHM_E_ARGUMENT);
    CHECK_EQ(fshm_remove(bad[i], &e), FSHM_E_ARGUMENT);
    CHECK_EQ(fshm_path(bad[i], path, sizeof path), FSHM_E_ARGUMENT);
  }
  memset(name, 'x', FSHM_MAX_NAME + 1);
  CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_E_ARGUMENT);
  name[FSHM_MAX_NAME] = 0;
  CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_OK);
  CHECK_EQ(fshm_path("Az09._-", path, sizeof path), FSHM_OK);
  CHECK_EQ(fshm_path("short", path, 5), FSHM_E_ARGUMENT);
  CHECK_EQ(open_as("ok", MAX_CAPACITY + 1, FSHM_OPEN_CREATE, &e), FSHM_E_ARGUMENT);
  fshm_segment *s;
  CHECK_EQ(fshm_open("ok", 1, 01000, FSHM_OPEN_CREATE, &s, &e), FSHM_E_ARGUMENT);
}

static void test_layout(void) {
  const uint64_t capacities[] = {1, 2, 7, 1000, 199999, 200000, 10000000, MAX_CAPACITY};
  CHECK_EQ(fshm_size_for(0), 0);
  CHECK_EQ(fshm_size_for(MAX_CAPACITY + 1), 0);
  CHECK_OP(fshm_memory_for(DEFAULT_CAPACITY), <=, 16 << 20);
  for (unsigned i = 0; i < sizeof capacities / sizeof *capacities; i++) {
    header_t h;
    memset(&h, 0, sizeof h);
    lay_out(&h, capacities[i]);
    CHECK_EQ(h.size, fshm_size_for(capacities[i]));
    CHECK_OP(h.lines * SLOTS_PER_LINE, >=, capacities[i] + capacities[i] / 4);
    CHECK(!(h.slots_offset % LINE) && !(h.process_stats_offset % LINE) &&
          !(h.limiters_offset % LINE));
    CHECK_OP(h.limiters_offset, >=, sizeof h); /* one after the other, none over another */
    CHECK_OP(h.slots_offset, >=, h.limiters_offset + h.limiters * sizeof(limiter_entry_t));
    CHECK_OP(h.key_stats_offset, >=, h.slots_offset + h.lines * LINE);
    CHECK_OP(h.names_offset, >=,
             h.key_stats_offset + h.lines * SLOTS_PER_LINE * sizeof(key_stats_t));
    CHECK_OP(h.processes_offset, >=,
             h.deployments_offset + DEPLOYMENTS * sizeof(deployment_t) + sizeof(counters_t));
    CHECK_OP(h.process_stats_offset, >=, h.processes_offset + PROCESSES * sizeof(process_t));
    CHECK_OP(h.requests_offset, >=, h.process_stats_offset + PROCESSES * sizeof(process_stats_t));
    CHECK_OP(h.counters_offset, >=, h.requests_offset + PROCESSES * sizeof(requests_t));
    CHECK_OP(h.size, >=, h.counters_offset + PROCESSES * sizeof(counters_t));
  }
}

static void test_create_attach_remove(void) {
  fshm_segment *s, *t;
  fshm_error e;
  struct stat st;
  const char *name = fresh_name();
  CHECK_EQ(open_as(name, 0, 0, &e), FSHM_E_NOT_FOUND);
  CHECK_EQ(open_as(name, 0, FSHM_OPEN_READ_ONLY, &e), FSHM_E_NOT_FOUND);
  CHECK_EQ(fshm_remove(name, &e), FSHM_E_NOT_FOUND);
  mode_t mask = umask(0777); /* the mode is what was asked for, whatever the umask */
  CHECK_EQ(fshm_open(name, 300, 0640, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  (void)umask(mask);
  CHECK_EQ(stat(s->path, &st), 0);
  CHECK_EQ(st.st_mode & 07777, 0640);
  CHECK_EQ(st.st_size, fshm_size_for(300));
  /* All there, so no SIGBUS on a full file system, but for what thousands of processes would need. */
  CHECK_OP(st.st_blocks * 512, >=, (off_t)fshm_memory_for(300));
  CHECK_OP(st.st_blocks * 512, <, st.st_size);
  CHECK_EQ(fshm_open(name, 0, 0600, FSHM_OPEN_CREATE, &t, &e), FSHM_OK);
  CHECK(t == s); /* mapped once in a process */
  fshm_close(t);
  CHECK_EQ(open_as(name, 300, 0, &e), FSHM_OK);
  CHECK_EQ(open_as(name, 301, FSHM_OPEN_CREATE, &e), FSHM_E_CAPACITY);
  CHECK_EQ(e.found, 300);
  CHECK_EQ(e.wanted, 301);
  fshm_geometry g;
  fshm_describe(s, &g);
  CHECK_EQ(g.capacity, 300);
  CHECK_EQ(g.slots, s->lines * 4);
  CHECK_OP(fshm_now(s), >, 0);
  CHECK_EQ(fshm_unlinked(s), 0);

  (void)process_index(s); /* so that there is a lock file to remove */
  char lock[sizeof s->path + 32];
  (void)snprintf(lock, sizeof lock, "%s.%016llx.lock", s->path, (unsigned long long)g.instance);
  CHECK_EQ(stat(lock, &st), 0);
  CHECK_EQ(fshm_remove(name, &e), FSHM_OK);
  CHECK_EQ(stat(lock, &st), -1);
  CHECK_EQ(fshm_unlinked(s), 1);
  CHECK_EQ(fshm_open(name, 300, 0600, FSHM_OPEN_CREATE, &t, &e), FSHM_OK);
  CHECK(t != s);
  CHECK(fshm_unlinked(s) && !fshm_unlinked(t)); /* ours is not the one of that name */
  fshm_close(t);
  fshm_close(s);
}

static void test_read_only(void) {
  fshm_segment *s, *r;
  fshm_limiter *l;
  fshm_error e;
  const char *name = fresh_name();
  CHECK_EQ(fshm_open(name, 10, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  fshm_close(s);
  CHECK_EQ(fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &r, &e), FSHM_OK);
  const fshm_limit limit = {1, 1000000, 1, FSHM_BUCKET, 0};
  CHECK_EQ(fshm_limiter_open(r, "a", 1, &limit, 1, &l), FSHM_E_READ_ONLY);
  CHECK_EQ(process_index(r), NO_PROCESS);
  CHECK_EQ(fshm_open(name, 0, 0, 0, &s, &e), FSHM_OK); /* the reader's mapping will not do */
  CHECK(s != r);
  CHECK_EQ(fshm_limiter_open(s, "a", 1, &limit, 1, &l), FSHM_OK);
  fshm_limiter_close(l);
  fshm_close(s);
  fshm_close(r);
}

/* Files that are not a segment of ours --------------------------------------------------------- */

static void test_strange_files(void) {
  fshm_error e;
  char path[256], target[300];
  const char *name = fresh_name();
  CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_OK);
  (void)snprintf(target, sizeof target, "%s.target", path);

  CHECK_EQ(symlink(target, path), 0); /* dangling, then to a file: never followed, never made */
  CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_E_LINK);
  CHECK_EQ(access(target, F_OK), -1);
  int fd = open(target, O_CREAT | O_RDWR, 0600);
  CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_E_LINK);
  CHECK_EQ(fshm_remove(name, &e), FSHM_OK); /* the link goes, what it names stays */
  CHECK_EQ(access(target, F_OK), 0);
  (void)close(fd);
  (void)unlink(target);

  CHECK_EQ(mkdir(path, 0700), 0);
  CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_E_KIND);
  CHECK_EQ(open_as(name, 0, FSHM_OPEN_READ_ONLY, &e), FSHM_E_KIND);
  CHECK_OP(fshm_remove(name, &e), <, 0);
  CHECK_EQ(rmdir(path), 0);

  CHECK_EQ(mkfifo(path, 0600), 0); /* and does not hang on one */
  CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_E_KIND);
  CHECK_EQ(open_as(name, 0, FSHM_OPEN_READ_ONLY, &e), FSHM_E_KIND);
  CHECK_EQ(fshm_remove(name, &e), FSHM_OK);

  const off_t sizes[] = {0, 1, sizeof(header_t) - 1, sizeof(header_t), 4096, 1 << 20};
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    fd = open(path, O_CREAT | O_RDWR | O_TRUNC, 0600);
    CHECK_EQ(ftruncate(fd, sizes[i]), 0);
    (void)close(fd);
    CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_E_DAMAGED);
  }
  CHECK_EQ(fshm_remove(name, &e), FSHM_OK);

  if (geteuid() == 0) { /* only root can make another's file */
    CHECK_EQ(open_as(name, 10, FSHM_OPEN_CREATE, &e), FSHM_OK);
    CHECK_EQ(chown(path, 12345, 12345), 0);
    CHECK_EQ(open_as(name, 0, 0, &e), FSHM_E_OWNER);
    CHECK_EQ(e.found, 12345);
    CHECK_EQ(open_as(name, 0, FSHM_OPEN_OTHER_OWNER, &e), FSHM_OK);
  }
}

/* Write into the header of a closed segment, open it, and put back what was there. */
static int status_with(const char *name, size_t at, const void *bytes, size_t size) {
  fshm_error e;
  char path[256];
  unsigned char saved[64];
  CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_OK);
  int fd = open(path, O_RDWR);
  CHECK_EQ(pread(fd, saved, size, (off_t)at), size);
  CHECK_EQ(pwrite(fd, bytes, size, (off_t)at), size);
  int status = open_as(name, 0, 0, &e);
  CHECK_EQ(pwrite(fd, saved, size, (off_t)at), size);
  (void)close(fd);
  return status;
}

#define WITH(field, ...)                                                                           \
  status_with(name, offsetof(header_t, field), &(__typeof__(((header_t *)0)->field)){__VA_ARGS__}, \
              sizeof(((header_t *)0)->field))

static void test_damaged_headers(void) {
  fshm_error e;
  char path[256];
  const char *name = fresh_name();
  CHECK_EQ(open_as(name, 500, FSHM_OPEN_CREATE, &e), FSHM_OK);
  CHECK_EQ(WITH(magic, FSHM_MAGIC + 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(version, FSHM_LAYOUT_VERSION + 1), FSHM_E_LAYOUT);
  CHECK_EQ(WITH(byte_order, 0x04030201), FSHM_E_LAYOUT);
  CHECK_EQ(WITH(size, 4096), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(capacity, 510), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(capacity, 0), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(capacity, UINT64_MAX), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(lines, UINT64_C(1) << 40), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(limiters, 1u << 30), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(processes, 255), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(process_stats_entries, 64), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(names_words, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(slots_offset, 0), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(key_stats_offset, 0), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(names_offset, UINT64_MAX - 7), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(limiters_offset, 0), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(processes_offset, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(process_stats_offset, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(counters_offset, 0), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(boot[0], 1), FSHM_E_BOOT);
  CHECK_EQ(WITH(boot[1], 1), FSHM_E_BOOT);
  CHECK_EQ(WITH(time_namespace, 1), FSHM_E_BOOT);
  CHECK_EQ(WITH(epoch, UINT64_MAX), FSHM_E_BOOT);
  /* What cannot be computed from the capacity: processes with another secret would count apart. */
  CHECK_EQ(WITH(instance, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(secret[1], 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(names_mode, FSHM_NAMES_OFF), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(epoch, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(created_realtime_ns, 1), FSHM_E_DAMAGED);
  CHECK_EQ(WITH(check, 1), FSHM_E_DAMAGED);
  CHECK_EQ(open_as(name, 500, 0, &e), FSHM_OK);

  CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_OK);
  CHECK_EQ(truncate(path, (off_t)fshm_size_for(500) - 1), 0);
  CHECK_EQ(open_as(name, 0, 0, &e), FSHM_E_DAMAGED);
  CHECK_EQ(e.found, fshm_size_for(500) - 1);
  CHECK_EQ(e.wanted, fshm_size_for(500));
  CHECK_EQ(truncate(path, (off_t)fshm_size_for(500) + 4096), 0);
  CHECK_EQ(open_as(name, 0, 0, &e), FSHM_E_DAMAGED);
}

/* A live segment scribbled over at random: every call ends, and answers something. */
static void test_scribbled(void) {
  fshm_segment *s = fresh_segment(50);
  const fshm_limit limits[3] = {{5, 1 << 30, 5, FSHM_BUCKET, 0},
                                {5, 1 << 30, 0, FSHM_WINDOW, 0},
                                {5, 1 << 30, 0, FSHM_SLIDING, 0}};
  fshm_limiter *l = fresh_limiter(s, "a", limits, 3);
  for (int i = 0; i < 30000; i++) {
    uint64_t word = random_below((s->size - sizeof(header_t)) / 8) * 8 + sizeof(header_t);
    *(uint64_t *)(void *)(s->map + word) = random_u64() >> random_below(64);
    for (int k = 0; k < 20; k++) s->slots[random_below(s->slot_count)].when = random_u64();
    const char key[] = {(char)('a' + i % 16), 0};
    fshm_decision d =
        apply_at(l, (uint32_t)i % 5, key, random_below(7), 1 + random_below(TIME_MAX));
    CHECK(d.status <= FSHM_ALLOWED);
    fshm_limiter_info info;
    fshm_process_info process;
    char name[256];
    uint64_t length;
    (void)fshm_limiter_at(s, (uint32_t)random_below(s->limiter_count), &info);
    (void)fshm_process_at(s, (uint32_t)random_below(PROCESSES), &process);
    (void)fshm_key_name(s, random_below(s->slot_count), name, sizeof name, &length);
    (void)fshm_peek_slot(s, random_below(s->slot_count), 0, &d);
    if (i % 500 == 0) (void)fshm_reset_all(l);
  }
  CHECK_OP(fshm_live_slots(s, NULL, 0), <=, s->slot_count);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* creation ------------------------------------------------------------------------------------- */

typedef struct {
  char name[FSHM_MAX_NAME + 1];
  _Atomic uint64_t arrivals, instances[32];
} start_line;

static void create_at_once(int me, void *with) {
  start_line *line = with;
  fshm_segment *s;
  fshm_error e;
  meet(&line->arrivals, 32, 1);
  CHECK_EQ(fshm_open(line->name, 200, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  if (!s) return;
  const fshm_limit l = {1000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  fshm_limiter *limiter = fresh_limiter(s, "a", &l, 1);
  for (int i = 0; i < 10; i++)
    CHECK_EQ(apply_at(limiter, FSHM_ACQUIRE, "k", 1, 1).status, FSHM_ALLOWED);
  line->instances[me] = s->header->instance;
  fshm_limiter_close(limiter);
  fshm_close(s);
}

static void test_creation_race(void) {
  for (int round = 0; round < 5; round++) {
    start_line *line = shared_memory(sizeof *line);
    (void)snprintf(line->name, sizeof line->name, "%s", fresh_name());
    run_children(32, create_at_once, line);
    for (int i = 1; i < 32; i++) CHECK_EQ(line->instances[i], line->instances[0]);
    fshm_segment *s;
    fshm_error e;
    CHECK_EQ(fshm_open(line->name, 0, 0, 0, &s, &e), FSHM_OK);
    const fshm_limit l = {1000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
    fshm_limiter *limiter = fresh_limiter(s, "a", &l, 1);
    CHECK_EQ(apply_at(limiter, FSHM_PEEK, "k", 1, 1).remaining, 1000 - 320);
    fshm_limiter_close(limiter);
    fshm_close(s);
    (void)munmap(line, sizeof *line);
  }
}

/* Both ways of creating: unnamed and linked, or a private name and a rename that replaces nothing. */
/* A new segment is given to the group, before others may open it; and its group lets another user in. */
static void test_groups(void) {
  fshm_segment *s, *t;
  fshm_error e;
  struct stat st;
  const char *name = fresh_name();
  if (geteuid()) return; /* only root can give a file to any group, or to another user */
  CHECK_EQ(fshm_open_group(name, 100, 0660, FSHM_OPEN_CREATE, 12380, &s, &e), FSHM_OK);
  CHECK_EQ(stat(s->path, &st), 0);
  CHECK_EQ(st.st_gid, 12380);
  CHECK_EQ(st.st_mode & 07777, 0660);
  CHECK_EQ(chown(s->path, 12381, (gid_t)-1), 0);
  CHECK_EQ(fshm_open(name, 0, 0660, 0, &t, &e), FSHM_E_OWNER);
  CHECK_EQ(fshm_open_group(name, 0, 0660, 0, 12382, &t, &e), FSHM_E_OWNER);
  CHECK_EQ(fshm_open_group(name, 0, 0660, 0, 12380, &t, &e), FSHM_OK);
  fshm_close(t);
  fshm_close(s);
  CHECK_EQ(fshm_remove(name, &e), FSHM_OK);
}

static void test_both_ways(void) {
  fshm_error e;
  memset(&e, 0, sizeof e);
  for (int unnamed = 0; unnamed < 2; unnamed++) {
    char path[256], pattern[512];
    struct stat first, second;
    const char *name = fresh_name();
    CHECK_EQ(fshm_path(name, path, sizeof path), FSHM_OK);
    CHECK_EQ(create_by(unnamed, path, 40, 0600, 0, FSHM_NO_GROUP, &e), FSHM_OK);
    CHECK_EQ(stat(path, &first), 0);
    CHECK_EQ(first.st_nlink, 1);
    CHECK_EQ(create_by(unnamed, path, 80, 0600, 0, FSHM_NO_GROUP, &e),
             FSHM_OK); /* late: leaves the first alone */
    CHECK_EQ(stat(path, &second), 0);
    CHECK_EQ(second.st_ino, first.st_ino);
    CHECK_EQ(open_as(name, 40, 0, &e), FSHM_OK);
    (void)snprintf(pattern, sizeof pattern, "ls %s.*.tmp >/dev/null 2>&1", path);
    CHECK(system(pattern) != 0); /* nothing half-made is left */
  }
}

/* A handle for reading looks at slots without writing to them, on processors without AVX too. */
static void test_reading_does_not_write(void) {
  fshm_segment *s, *reading;
  fshm_error e;
  fshm_decision d;
  fshm_permit_info permit;
  const char *name = fresh_name();
  const fshm_limit l = {5, 60000000000, 0, FSHM_WINDOW, 0};
  CHECK_EQ(fshm_open(name, 100, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 2, fshm_now(s)).status, FSHM_ALLOWED);
  fshm_limiter_close(a);
  fshm_close(s);
  CHECK_EQ(fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &reading, &e), FSHM_OK);
#if defined(__x86_64__)
  fshm_wide_loads = false;
#endif
  unsigned seen = 0;
  for (uint64_t slot = 0; slot < reading->slot_count; slot++) {
    CHECK_EQ(fshm_permit_at(reading, slot, &permit), 0);
    if (fshm_peek_slot(reading, slot, 0, &d) != FSHM_OK) continue;
    seen++;
    CHECK_EQ(d.remaining, 3);
  }
  CHECK_EQ(seen, 1);
  CHECK_EQ(fshm_live_slots(reading, NULL, 0), 1);
  CHECK_EQ(fshm_reap(reading, 0), 0);
#if defined(__x86_64__)
  detect();
#endif
  fshm_close(reading);
}

int main(void) {
  test_names();
  test_layout();
  test_create_attach_remove();
  test_read_only();
  test_strange_files();
  test_damaged_headers();
  test_scribbled();
  test_creation_race();
  test_groups();
  test_both_ways();
  test_reading_does_not_write();
  return done();
}
