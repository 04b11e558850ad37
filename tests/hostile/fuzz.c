/* fuzz.c - libFuzzer over segment images: open, every call, inspect and remove whatever a file holds.
 *
 * Found are crashes, hangs (-timeout), reads and writes outside: the mapping lies between bytes
 * without access on both sides (guard.h), everything else is AddressSanitizer's and UBSan's.
 *
 * Input: one byte of flags, then
 *   RAW: the whole file, as it is;
 *   else records, done to a good segment in use (image_make): `10tttttt` an edit of 12 bytes, anything
 *   else a call of 4 bytes. Edits before the first call are done before the segment is opened. After the
 *   last record comes every_call(). A short input reaches far; changes of it stay near.
 *
 * The image, its secret and its process are the same in every run, so that inputs can be kept (corpus/).
 * With -DREPLAY, a program that runs the files it is given.
 */
#include <glob.h>
#include <stdint.h>

#include "guard.h"

static pid_t one_pid(void) { return 4242; } /* its slot in the process table follows from it */
#define getpid one_pid
/* Fewer than a segment has otherwise. */
#define PROCESSES 320
#define HOME_PROCESSES 256
#include "../../csrc/unity.c"
#undef mmap
#undef munmap
#undef getpid

static_assert(offsetof(header_t, capacity) == 8 * 3 && offsetof(header_t, names_words) == 8 * 18 &&
                  offsetof(header_t, damage) == 8 * 32 &&
                  offsetof(header_t, names_head) - offsetof(header_t, ticket) == 8 * 8 &&
                  offsetof(limiter_entry_t, current) == 8 * 2 &&
                  offsetof(limiter_entry_t, name_length) == 8 * 4 &&
                  offsetof(limiter_entry_t, owners) == 8 * 18 &&
                  offsetof(limiter_entry_t, freed_pace) == 8 * 34,
              "seeds.py knows these words by number");

#include "calls.h"

/* Each call at least once on each limiter that it takes, whatever came before. */
enum { FIRST_OF_EACH_BIT = FIRST_GRANTED - 1 }; /* of use_counted() */
static const unsigned some_whats[] = {0,   42, 85,
                                      127, 43, 24}; /* each bit with most others, and without */
static void every_call(user_t *u) {
  for (unsigned which = 0; which < LIMITERS; which++) {
    for (unsigned call = 0; call < CALLS; call++) {
      if (!u->limiters[which]) open_limiter(u, which, 0, true);
      if (!u->limiters[which]) open_limiter(u, which, 0, false);
      if (call >= FIRST_WITHOUT_LIMITER && which) break;
      /* All of enum fshm_op; a reservation, kept and cancelled; permits are taken, given back and idle. */
      const unsigned kinds = call == 2                   ? FSHM_BLOCK + 1
                             : call == 5                 ? 2
                             : call == 6                 ? 14
                             : call >= FIRST_OF_EACH_BIT ? sizeof some_whats / sizeof *some_whats
                                                         : 1;
      for (unsigned k = 0; k < kinds; k++)
        one_call(u, call, which, call < FIRST_OF_EACH_BIT ? k : some_whats[k], 1 + k % 2);
    }
  }
  look_at_all(u);
}

static void close_user(user_t *u) {
  for (unsigned i = 0; i < LIMITERS; i++) fshm_limiter_close(u->limiters[i]);
  close_granted(u);
  fshm_close(u->s);
  memset(u, 0, sizeof *u);
}

enum { RAW = 1, LARGE = 2, READ_ONLY = 4, TRUNCATE = 8, FIX_CHECK = 16, REMOVE = 32, NAMES = 192 };
#define INSTANCE UINT64_C(0x1122334455667788)

typedef struct {
  unsigned char *bytes;
  uint64_t size, clock; /* clock: when it was made */
} image_t;

static char name[FSHM_MAX_NAME], path[256], lock_path[300];
static image_t images[2][4]; /* by size, and by how names are kept */
static int file = -1;

static void remove_files(void) {
  fshm_error e;
  (void)fshm_remove(name, &e);
  (void)unlink(lock_path);
}

static void write_file(const void *bytes, uint64_t size) {
  if (file < 0) file = open(path, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  MUST(file >= 0 && !ftruncate(file, (off_t)size));
  MUST(pwrite(file, bytes, size, 0) == (ssize_t)size);
}

static void drop_file(void) {
  remove_files();
  if (file >= 0) (void)close(file);
  file = -1;
}

/* An edit may have made the segment another instance, which has a lock file of its own. */
static void drop_all(void) {
  char pattern[sizeof path + 8];
  glob_t found;
  drop_file();
  (void)snprintf(pattern, sizeof pattern, "%s.*", path);
  if (glob(pattern, 0, NULL, &found)) return;
  for (size_t i = 0; i < found.gl_pathc; i++) (void)unlink(found.gl_pathv[i]);
  globfree(&found);
}

static user_t open_user(uint32_t flags) {
  user_t u = {0};
  fshm_error e;
  int status = fshm_open(name, 0, 0600, flags, &u.s, &e);
  MUST((u.s != NULL) == (status == FSHM_OK) && e.code == (status == FSHM_OK ? 0 : status));
  return u;
}

/* A good segment in use: limiters of each kind, keys, permits, names, counts, changed limits, statistics. */
static void image_make(image_t *image, uint64_t capacity, uint32_t names) {
  fshm_error e;
  fshm_segment *s;
  drop_file();
  MUST(fshm_open(name, capacity, 0600, FSHM_OPEN_CREATE | names, &s, &e) == FSHM_OK);
  image->size = s->size;
  MUST(image->size == fshm_size_for(capacity));
  MUST(fshm_memory_for(capacity) <= image->size);
  image->bytes = aligned_alloc(LINE, s->size);
  MUST(image->bytes);
  fshm_close(s);
  file = open(path, O_RDWR | O_CLOEXEC);
  MUST(file >= 0 && pread(file, image->bytes, image->size, 0) == (ssize_t)image->size);
  header_t *h = (header_t *)(void *)image->bytes;
  h->secret[0] = 11;
  h->secret[1] = 22;
  h->instance = INSTANCE;
  h->check = header_check(h);
  image->clock = h->epoch;
  write_file(image->bytes, image->size);
  user_t u = open_user(0);
  for (unsigned i = 0; i < LIMITERS; i++) {
    open_limiter(&u, i, 0, false);
    for (unsigned k = 0; k < 4; k++) one_call(&u, k % 2 ? 2 : 6, i + k * LIMITERS, k, 1);
    if (i % 2) open_limiter(&u, i, 1, false);
  }
  for (unsigned call = FIRST_GRANTED; call < CALLS; call++)
    for (unsigned k = 0; k < 8; k++) one_call(&u, call, 5, 0, 1 + 1000 * k);
  MUST(!u.damaged);
  close_user(&u);
  MUST(pread(file, image->bytes, image->size, 0) == (ssize_t)image->size);
  h->lock_file =
      0; /* as long as no process has joined: a process that opens a copy of the image can join */
}

/* The first that process_join() tries, and it is free unless an edit has taken it: a closed segment keeps no slot. */
static uint64_t first_index(void) { return (uint32_t)one_pid() * 2654435761u % HOME_PROCESSES; }

/* Where an edit goes: `target` says into what, `position` where in it. In whole words. */
static uint64_t position_in(const unsigned char *bytes, uint64_t size, unsigned target,
                            uint64_t position) {
  header_t h = {0};
  lay_out(&h, ((const header_t *)(const void *)bytes)->capacity);
  if (h.size != size || !h.lines)
    return position % (size / 8) * 8; /* a capacity of 0 may have the size */
  const uint64_t entry =
      h.limiters_offset + position / 256 % (LIMITERS + GRANTED + 1) * sizeof(limiter_entry_t);
  const uint64_t set = ((const limiter_entry_t *)(const void *)(bytes + entry))->set;
  const uint64_t process = first_index();
  uint64_t low = position % 256 * 8;
  switch (target % 17) {
    case 0:
      return low % sizeof(header_t) / 8 * 8;
    case 1:
      return entry + low % offsetof(limiter_entry_t, rules);
    case 2: /* the present rules, one after the other */
      return entry + offsetof(limiter_entry_t, rules) +
             SET_RULE(set, low / sizeof(rule_t) % FSHM_MAX_LIMITS) * sizeof(rule_t) +
             low % sizeof(rule_t);
    case 3:
      return entry + low % sizeof(limiter_entry_t);
    case 4: /* the own slot, or another */
      return h.processes_offset + (process + position / 64) % PROCESSES * sizeof(process_t) +
             low % 64;
    case 5:
      return h.process_stats_offset + process * sizeof(process_stats_t) +
             low % sizeof(process_stats_t);
    case 6: /* the nth slot that is in use */
      for (uint64_t i = 0, n = position / 4; i < h.lines * SLOTS_PER_LINE; i++) {
        const uint64_t at = h.slots_offset + i * sizeof(slot_t);
        if (*(const uint64_t *)(const void *)(bytes + at) && !n--) return at + low % 16;
      }
      return h.slots_offset + low % LINE;
    case 7:
      return h.slots_offset + position * 8 % (h.lines * LINE);
    case 8:
      return h.key_stats_offset + position * 8 % (h.lines * LINE);
    case 9:
      return h.names_offset + position * 8 % (h.names_words * 8);
    case 10:
      return offsetof(header_t, ticket) + low % (sizeof(header_t) - offsetof(header_t, ticket));
    case 11:
      return position * 8 % size;
    case 12:
      return h.deployments_offset + position * 8 % (DEPLOYMENTS * sizeof(deployment_t));
    case 13:
      return h.memo_offset + position * 8 % (h.memo_lines * LINE);
    case 14:
      return h.metrics_offset + position * 8 % (METRICS * sizeof(metric_t));
    case 16: /* the nth place of the wait queue that is in use */
      for (uint64_t i = 0, n = position / 8; i < WAITERS; i++) {
        const uint64_t at = h.waiters_offset + i * sizeof(waiter_t);
        if (*(const uint64_t *)(const void *)(bytes + at) && !n--) return at + low % LINE;
      }
      return h.waiters_offset + position * 8 % (WAITERS * sizeof(waiter_t));
    default: /* the own requests in flight */
      return h.requests_offset + process * sizeof(requests_t) + position * 8 % sizeof(requests_t);
  }
}

#define EDIT 12
static void edit(unsigned char *bytes, uint64_t size, const uint8_t *record) {
  uint64_t value, *word;
  uint64_t position = (uint64_t)record[1] | (uint64_t)record[2] << 8;
  memcpy(&value, record + 4, 8);
  word = (uint64_t *)(void *)(bytes + position_in(bytes, size, record[0] & 63, position));
  switch (record[3] % 6) {
    case 0:
      *word = value;
      break;
    case 1:
      *word ^= value;
      break;
    case 2:
      *word += value;
      break;
    case 3: /* one byte of it */
      ((unsigned char *)word)[value % 8] = (unsigned char)(value >> 8);
      break;
    case 4: /* a copy of what is elsewhere */
      *word = *(const uint64_t *)(const void *)(bytes + value % (size / 8) * 8);
      break;
    default: /* a line full */
      for (uint64_t i = 0; i < 8 && (unsigned char *)(word + i) < bytes + size; i++)
        word[i] = value;
  }
}

static uint64_t number_of(uint8_t n) {
  static const uint64_t odd[] = {0, UINT64_MAX, TIME_MAX, TIME_MAX - 1, UINT64_C(1) << 63, 100000};
  return n < 250 ? (uint64_t)(n & 15) << (n >> 4) * 4 : odd[n - 250];
}

static void run(const uint8_t *data, size_t size) {
  const uint8_t flags = size ? data[0] : 0, *end = data + size;
  const uint32_t open_flags = flags & READ_ONLY ? FSHM_OPEN_READ_ONLY : 0;
  const image_t *image = &images[flags & LARGE ? 1 : 0][flags / 64];
  const uint8_t *at = size ? data + 1 : data;
  bool edited = flags & RAW;
  static unsigned char bytes[4 << 20] __attribute__((aligned(LINE)));
  uint64_t length = image->size;
  MUST(image->size <= sizeof bytes);
  memcpy(bytes, image->bytes, image->size);
  if (flags & RAW) {
    write_file(at, (uint64_t)(end - at));
    at = end;
  } else {
    if (flags & TRUNCATE && end - at >= 4) {
      uint32_t cut;
      memcpy(&cut, at, 4);
      at += 4;
      if (cut != UINT32_MAX) length = cut % (image->size + 4097); /* else only at the end */
    }
    for (; end - at >= EDIT && at[0] >> 6 == 2; at += EDIT, edited = true)
      edit(bytes, image->size, at);
    header_t *h = (header_t *)(void *)bytes;
    if (flags & FIX_CHECK) h->check = header_check(h);
    write_file(bytes, min_u64(length, image->size));
    MUST(!ftruncate(file, (off_t)length));
  }
  user_t u = open_user(open_flags);
  if (u.s) {
    MUST(u.s->size == image->size && length == image->size); /* nothing else can be verified */
    unsigned char *map = mmap(NULL, u.s->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    MUST(map != MAP_FAILED);
    while (at < end) {
      if (at[0] >> 6 == 2) {
        if (end - at < EDIT) break;
        edit(map, u.s->size, at);
        at += EDIT;
        edited = true;
      } else {
        if (end - at < 4) break;
        one_call(&u, at[0], at[1], at[2], number_of(at[3]));
        at += 4;
      }
    }
    (void)munmap(map, u.s->size);
    every_call(&u);
    /* else edits of this process's words go to unused words, unnoticed */
    if (!edited && !u.s->read_only)
      MUST(load_relaxed(&u.s->fork_page->joined) == first_index() + 1);
    /* the file was cut: reported before anything is touched */
    if (flags & TRUNCATE) {
      uint64_t index;
      MUST(!ftruncate(file, 100) && fshm_check(u.s, &index) == FSHM_DAMAGE_SIZE);
    }
    close_user(&u);
  }
  if (flags & REMOVE) drop_file();
}

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *count, char ***arguments) {
  (void)count;
  (void)arguments;
  (void)snprintf(name, sizeof name, "t-fuzz-%d", (int)getpid());
  MUST(fshm_path(name, path, sizeof path) == FSHM_OK);
  MUST(!strncmp(path, fshm_directory(), strlen(fshm_directory())));
  (void)snprintf(lock_path, sizeof lock_path, "%s.%016llx.lock", path,
                 (unsigned long long)INSTANCE);
  (void)atexit(drop_all);
  const uint32_t names[] = {0, FSHM_NAMES_HASHED, FSHM_NAMES_OFF, 0};
  for (unsigned i = 0; i < 2; i++)
    for (unsigned k = 0; k < 4; k++) image_make(&images[i][k], i ? 100 : 8, names[k]);
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  run(data, size);
  return 0;
}

#ifdef REPLAY
int main(int count, char **files) {
  static uint8_t data[1 << 20];
  (void)LLVMFuzzerInitialize(&count, &files);
  for (int i = 1; i < count; i++) {
    FILE *f = fopen(files[i], "rb");
    MUST(f);
    size_t size = fread(data, 1, sizeof data, f);
    (void)fclose(f);
    fprintf(stderr, "%s\n", files[i]); /* the last one named is the one that failed */
    (void)alarm(10); /* a hang ends here */
    run(data, size);
  }
  printf("%d passed, 0 failed\n", count - 1);
  return 0;
}
#endif
