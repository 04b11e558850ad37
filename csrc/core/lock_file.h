/* lock_file.h - the lock file and /proc, for process.c, liveness.c and leader.c. */
#ifndef FSHM_LOCK_FILE_H
#define FSHM_LOCK_FILE_H

#include <fcntl.h>
#include <sys/stat.h>
#include "internal.h"

#if defined(__APPLE__) && !defined(F_OFD_SETLK) /* older SDKs do not name them */
#define F_OFD_SETLK 90
#define F_OFD_GETLK 92
#endif

/* The bytes of a process index in the lock file. */
#define OWNED(process) (process)
#define ALIVE(process) ((process) + PROCESSES)

/* lock_file.c */
bool is_file(int fd, uint64_t dev, uint64_t ino);
int byte_lock(int fd, int command, short type, uint32_t byte);
bool byte_held(int fd, uint32_t byte);
bool lock_file_ready(fshm_segment *s);

/* liveness.c */
enum { RUNS, ENDED, UNSEEN };
uint64_t own_birth(void);
int look_at_process(const process_t *p, bool thorough);
bool has_ended(fshm_segment *s, uint32_t process, bool thorough);

#endif
