/* holds_files.c - what must hold of the segment as a file: its name is absent, or the file is complete; and
 * the next process can open it, or create it. */
#include <dirent.h>

#include "crash.h"

static fshm_segment *opened; /* by this process */

static void close_opened(void) {
  if (opened) fshm_close(opened);
  opened = NULL;
}

/* What is there under a segment's name: `kind` is how the file name ends. */
static int count_files(const char *of, const char *kind, bool remove) {
  char prefix[256], path[600];
  int count = 0;
  (void)snprintf(prefix, sizeof prefix, "fast_litellm_shm.%d.%s", FSHM_LAYOUT_VERSION, of);
  DIR *directory = opendir(fshm_directory());
  struct dirent *entry;
  while (directory && (entry = readdir(directory))) {
    const char *name = entry->d_name;
    size_t length = strlen(prefix), ends = strlen(name) - min_u64(strlen(kind), strlen(name));
    if (strncmp(name, prefix, length) || (name[length] && name[length] != '.')) continue;
    if (strcmp(name + ends, kind)) continue;
    count++;
    (void)snprintf(path, sizeof path, "%s/%s", fshm_directory(), name);
    if (remove) (void)unlink(path);
  }
  if (directory) (void)closedir(directory);
  return count;
}

/* Open it (or make it), and work with it. */
static int use(uint32_t flags, uint64_t *instance) {
  fshm_error e;
  fshm_segment *s;
  int status = fshm_open(segment_name, 1, 0600, flags, &s, &e);
  if (status != FSHM_OK) return status;
  const fshm_limit limit = {1000000, PER, 1000000, FSHM_WINDOW, 0};
  fshm_limiter *l;
  if (fshm_limiter_open(s, "files", 5, &limit, 1, &l) != FSHM_OK) broken("no limiter in it");
  if (l && apply_at(l, FSHM_ACQUIRE, KEY, 1, 0).status != FSHM_ALLOWED) broken("no check in it");
  if (instance) *instance = s->header->instance;
  if (l) fshm_limiter_close(l);
  fshm_close(s);
  return FSHM_OK;
}

/* A segment that no process has joined. Its instance has all its digits, so that to print the lock file's name is
 * the same path each time. */
static void make_segment(void) {
  fshm_error e;
  bool done = false;
  for (int tries = 0; tries < 100 && !done; tries++) {
    close_opened();
    (void)count_files(segment_name, "", true);
    if (fshm_open(segment_name, 1, 0600, FSHM_OPEN_CREATE, &opened, &e) != FSHM_OK) break;
    done = opened->instance >> 60;
  }
  close_opened();
  if (!done) broken("no segment to begin with");
}

static void start_files(void) {
  close_opened();
  (void)count_files(segment_name, "", true);
  if (op->op == CREATE) return;
  make_segment();
  if (use(0, NULL) != FSHM_OK) broken("no segment to begin with");
}

/* As where unnamed files are not to be had. */
static void run_create_by_rename(outcome_t *out) {
  fshm_error e = {0};
  if (fshm_path(segment_name, e.path, sizeof e.path) != FSHM_OK) return;
  out->status = create_by(false, e.path, 1, 0600, 0, FSHM_NO_GROUP, &e);
  if (out->status != FSHM_OK) return;
  out->status = fshm_open(segment_name, 1, 0600, 0, &opened, &e);
  if (opened) out->number = opened->header->instance;
}

static void files_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
}

static void files_contend(void) {
  outcome_t mine = {0};
  bool existed = use(0, NULL) == FSHM_OK;
  op->run(&mine);
  close_opened();
  int status = op->op == REMOVE && !existed ? FSHM_E_NOT_FOUND : FSHM_OK;
  if (mine.status != status) broken("S is answered %d, not %d", mine.status, status);
  if (op->op == CREATE && use(0, NULL) != FSHM_OK)
    broken("S has made a segment that cannot be used");
  fshm_error e;
  if (op->op == CREATE && !existed) (void)fshm_remove(segment_name, &e);
}

static void files_survive(void) {
  int status = use(0, NULL);
  bool must_be = op->op == ATTACH || (told->done && op->op == CREATE);
  bool must_not_be = told->done && op->op == REMOVE;
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (status != FSHM_OK && status != FSHM_E_NOT_FOUND) broken("the file is damaged: %d", status);
  if ((must_be && status != FSHM_OK) || (must_not_be && status == FSHM_OK))
    broken("the name is answered %d", status);
  status = use(FSHM_OPEN_CREATE, NULL);
  if (status != FSHM_OK) broken("the next to come is answered %d", status);
  fshm_error e;
  if (fshm_remove(segment_name, &e) != FSHM_OK) broken("it cannot be removed: %d", e.code);
  int temporary = count_files(segment_name, ".tmp", true),
      locks = count_files(segment_name, ".lock", true);
  if (temporary > (op->run == run_create_by_rename)) broken("%d unfinished files", temporary);
  if (locks > (op->op == REMOVE)) broken("%d lock files of nobody", locks);
  if (count_files(segment_name, "", true)) broken("files are left");
}

static void files_raced(const outcome_t *mine) {
  if (op->op == REMOVE) {
    if ((told->status == FSHM_OK) + (mine->status == FSHM_OK) != 1)
      broken("T and S are answered %d and %d", told->status, mine->status);
  } else {
    if (told->status != FSHM_OK || mine->status != FSHM_OK)
      broken("T and S are answered %d and %d", told->status, mine->status);
    if (told->number != mine->number) broken("T and S have different segments");
  }
  close_opened();
}

static const holds_t files = {NULL, files_end, files_contend, files_survive, files_raced, NULL};
