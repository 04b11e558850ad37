/* cut_recorder.c - writes down, in order, what a process does to the files of one folder: for tests that cut the power
 * at each of these instants. Loaded by LD_PRELOAD.
 *
 * CUT_FOLDER: the folder. CUT_LOG: where to write. A record: kind, length of the name, offset, length; name; data.
 * A program notes something itself by writing to a file "mark" of the folder.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum {
  CREATE = 'c',
  WRITE = 'w',
  TRUNCATE = 't',
  SYNC = 's',
  UNLINK = 'u',
  RENAME = 'r',
  SYNC_FOLDER = 'd'
};

static int log_fd = -1;
static char folder[4096];

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CUT_LOG"), *of = getenv("CUT_FOLDER");
  if (!path || !of) return;
  snprintf(folder, sizeof folder, "%s/", of);
  int (*plain_open)(const char *, int, ...) = next("open");
  log_fd = plain_open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* The name in the folder, or NULL. */
static const char *within(const char *path) {
  size_t n = strlen(folder);
  return log_fd >= 0 && n && path && !strncmp(path, folder, n) ? path + n : NULL;
}
static const char *of_fd(int fd, char *out) {
  char link[64];
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = log_fd >= 0 ? readlink(link, out, 4000) : -1;
  errno = saved;
  if (n <= 0) return NULL;
  out[n] = 0;
  char *gone = strstr(out, " (deleted)");
  if (gone) return NULL;
  if (strlen(out) + 1 == strlen(folder) && !strncmp(out, folder, strlen(out))) return "";
  return within(out);
}

/* One write for a record: appended as a whole, also by several processes. */
static void record(char kind, const char *name, uint64_t offset, const void *data,
                   uint64_t length) {
  ssize_t (*plain_write)(int, const void *, size_t) = next("write");
  uint32_t named = (uint32_t)strlen(name);
  size_t size = 1 + 4 + 8 + 8 + named + length;
  char *out = malloc(size);
  if (!out) abort();
  out[0] = kind;
  memcpy(out + 1, &named, 4);
  memcpy(out + 5, &offset, 8);
  memcpy(out + 13, &length, 8);
  memcpy(out + 21, name, named);
  if (length) memcpy(out + 21 + named, data, length);
  if (plain_write(log_fd, out, size) != (ssize_t)size) abort();
  free(out);
}

static void opened(const char *path, int flags) {
  const char *name = within(path);
  struct stat st;
  if (name && flags & O_CREAT && stat(path, &st)) record(CREATE, name, 0, NULL, 0);
}
#define OPEN(function)                                        \
  int function(const char *path, int flags, ...) {            \
    va_list more;                                             \
    va_start(more, flags);                                    \
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
    va_end(more);                                             \
    int (*plain)(const char *, int, ...) = next(#function);   \
    opened(path, flags);                                      \
    return plain(path, flags, mode);                          \
  }
OPEN(open)
OPEN(open64)

#define PWRITE(function, offset_t)                                           \
  ssize_t function(int fd, const void *data, size_t length, offset_t at) {   \
    char path[4096];                                                         \
    ssize_t (*plain)(int, const void *, size_t, offset_t) = next(#function); \
    const char *name = of_fd(fd, path);                                      \
    if (name) record(WRITE, name, (uint64_t)at, data, length);               \
    return plain(fd, data, length, at);                                      \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t length) {
  char path[4096];
  ssize_t (*plain)(int, const void *, size_t) = next("write");
  const char *name = of_fd(fd, path);
  if (name) record(WRITE, name, (uint64_t)lseek(fd, 0, SEEK_CUR), data, length);
  return plain(fd, data, length);
}

#define FTRUNCATE(function, offset_t)                            \
  int function(int fd, offset_t length) {                        \
    char path[4096];                                             \
    int (*plain)(int, offset_t) = next(#function);               \
    const char *name = of_fd(fd, path);                          \
    if (name) record(TRUNCATE, name, (uint64_t)length, NULL, 0); \
    return plain(fd, length);                                    \
  }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

/* Recorded when it is done: from then on its data are on the disk. */
#define FSYNC(function)                                             \
  int function(int fd) {                                            \
    char path[4096];                                                \
    int (*plain)(int) = next(#function);                            \
    int status = plain(fd);                                         \
    const char *name = of_fd(fd, path);                             \
    if (name) record(*name ? SYNC : SYNC_FOLDER, name, 0, NULL, 0); \
    return status;                                                  \
  }
FSYNC(fsync)
FSYNC(fdatasync)

int unlink(const char *path) {
  int (*plain)(const char *) = next("unlink");
  const char *name = within(path);
  if (name) record(UNLINK, name, 0, NULL, 0);
  return plain(path);
}

int rename(const char *from, const char *to) {
  int (*plain)(const char *, const char *) = next("rename");
  const char *a = within(from), *b = within(to);
  if (a && b) record(RENAME, a, 0, b, strlen(b));
  return plain(from, to);
}
