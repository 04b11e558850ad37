/* guard.h - mappings of files lie between GUARD bytes without access. Included before unity.c. */
#ifndef GUARD_H
#define GUARD_H

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUARD (UINT64_C(1) << 32)

/* The mappings that lie between guards: of the segments that are open. Handles and pages of other kinds do not. */
#define MOST_GUARDED 8
static void *guarded_maps[MOST_GUARDED];

static void *guarded_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
  /* In place of another mapping: what holds a process's locks (map_description()), which must not stay after it. */
  if (fd < 0 || flags & MAP_FIXED) return mmap(at, size, protection, flags, fd, offset);
  const int none = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  unsigned char *all = mmap(NULL, size + 2 * GUARD, PROT_NONE, none, -1, 0);
  if (all == MAP_FAILED) abort();
  void *map = mmap(all + GUARD, size, protection, flags | MAP_FIXED, fd, offset);
  if (map == MAP_FAILED) {
    (void)munmap(all, size + 2 * GUARD);
    return map;
  }
  int i = 0;
  while (i < MOST_GUARDED && guarded_maps[i]) i++;
  if (i == MOST_GUARDED) abort();
  guarded_maps[i] = map;
  return map;
}

static int guarded_munmap(void *map, size_t size) {
  for (int i = 0; i < MOST_GUARDED; i++) {
    if (guarded_maps[i] != map || !map) continue;
    guarded_maps[i] = NULL;
    return munmap((unsigned char *)map - GUARD, size + 2 * GUARD);
  }
  return munmap(map, size);
}

#define mmap guarded_mmap
#define munmap guarded_munmap

#endif
