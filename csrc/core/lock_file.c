/* lock_file.c - the lock file beside the segment: its locked bytes say which processes live. DESIGN.md, "Processes". */
#include <errno.h>
#include <unistd.h>

#include "lock_file.h"

bool is_file(int fd, uint64_t dev, uint64_t ino) {
  struct stat st;
  return fd >= 0 && !fstat(fd, &st) && st.st_ino == ino && (uint64_t)st.st_dev == dev;
}

int byte_lock(int fd, int command, short type, uint32_t byte) {
  struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, command, &lock);
}

/* Is the byte locked by another description than fd's, in any process? If the kernel cannot answer: yes. */
bool byte_held(int fd, uint32_t byte) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

/* Is our descriptor still that of the lock file? A daemonising program may have closed it, and its number may now be
 * another file's. */
bool process_lock_open(const fshm_segment *s) {
  int fd = atomic_load_explicit(&s->lock_fd, memory_order_acquire); /* with lock_file_ready() */
  return is_file(fd, load_relaxed(&s->lock_dev), load_relaxed(&s->lock_ino));
}

/* A user that may write the segment may use its lock file: the same owner, group and mode, as far as we may set
 * them. A user that may only read the segment may not even read the lock file: a read lock on all bytes would keep
 * every process out of the table. Not at open: umask would interfere. */
static void admit_same_users(const fshm_segment *s, int fd, const struct stat *lock) {
  struct stat segment;
  if (stat(s->path, &segment) || (lock->st_uid != geteuid() && geteuid())) return;
  if (segment.st_uid != lock->st_uid && !geteuid()) (void)!fchown(fd, segment.st_uid, (gid_t)-1);
  if (segment.st_gid != lock->st_gid) (void)!fchown(fd, (uid_t)-1, segment.st_gid);
  mode_t writers = segment.st_mode & 0222, mode = writers | writers << 1;
  if ((lock->st_mode & 07777) != mode) (void)fchmod(fd, mode);
}

/* May the owner of this file write the segment? A user that may only read the segment knows the file's name, and can
 * create it before any member does; its locks would then be believed. (Only a member of a group can give a file to
 * the group.) */
static bool by_a_writer(const fshm_segment *s, const struct stat *lock) {
  struct stat segment;
  if (lock->st_uid == geteuid() || !lock->st_uid) return true;
  if (stat(s->path, &segment)) return false;
  return lock->st_uid == segment.st_uid || (segment.st_mode & 0002) ||
         ((segment.st_mode & 0020) && lock->st_gid == segment.st_gid);
}

/* Create an empty lock file that already has its owner and mode when it gets its name: a creator that is killed
 * locks no user out. Without unnamed files, it is created under its name. -1: it exists. */
static int make_lock_file(const fshm_segment *s, const char *path, int flags) {
  struct stat st;
#if defined(O_TMPFILE)
  int fd = open(fshm_directory(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) {
    if (!fstat(fd, &st)) admit_same_users(s, fd, &st);
    if (!image_link(fd, path)) return fd;
    int failed = errno;
    (void)close(fd);
    if (failed == EEXIST) return -1;
  }
#endif
  return open(path, flags | O_CREAT, 0600);
}

/* Open the lock file of this instance of the segment. Its name has the instance, so a removed and remade segment
 * never shares it. The first process creates it, once: its inode is written into the header before any process locks
 * a byte. Another file of that name says nothing about living processes, so it is refused; and if the file was
 * deleted, no new one is made (DESIGN.md, "Processes"). Returns -1 with errno. */
static int open_lock_file(fshm_segment *s, struct stat *st) {
  char path[sizeof s->path + 32];
  image_lock_path(s->path, s->instance, path, sizeof path);
  uint64_t known = load_relaxed(&s->header->lock_file);
  /* No process has joined yet, and a reader does not choose the file. */
  if (!known && s->read_only) {
    errno = ENOENT;
    return -1;
  }
  int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | (s->read_only ? O_RDONLY : O_RDWR);
  int fd = open(path, flags);
  if (fd < 0 && errno == ENOENT && !known) fd = make_lock_file(s, path, flags);
  if (fd < 0 && errno == EEXIST) fd = open(path, flags); /* another process was faster */
  int wrong = fd < 0 || fstat(fd, st) ? errno : 0;
  /* The segment was removed since the caller looked: the file may be a new one, which the members do not lock, and
   * which no other process would remove. */
  if (!s->read_only && fshm_unlinked(s)) {
    (void)unlink(path);
    wrong = ENOENT;
  }
  known = load_relaxed(&s->header->lock_file);
  /* A hard link is another user's file, and a file without a name was deleted just now. */
  if (!wrong && !known && (!S_ISREG(st->st_mode) || st->st_nlink != 1)) wrong = ESTALE;
  if (!wrong && !known && !by_a_writer(s, st)) wrong = EPERM;
  if (!wrong && !known &&
      atomic_compare_exchange_strong_explicit(&s->header->lock_file, &known, st->st_ino,
                                              memory_order_relaxed, memory_order_relaxed))
    known = st->st_ino;
  if (!wrong && known != st->st_ino) wrong = ESTALE;
  if (!wrong) {
    if (!s->read_only) admit_same_users(s, fd, st);
    return fd;
  }
  if (fd >= 0) (void)close(fd);
  errno = wrong;
  return -1;
}

/* Two threads may come at the same time: one that joins, and one that makes a liveness check. */
bool lock_file_ready(fshm_segment *s) {
  struct stat st;
  if (process_lock_open(s)) return true; /* also after a fork, which leaves it to the child */
  threads_lock(&s->lock_opener);
  if (!process_lock_open(s)) {
    /* Not for a removed segment: its members hold another lock file, and no process would remove this one. */
    errno = ENOENT;
    int fd = fshm_unlinked(s) ? -1 : open_lock_file(s, &st);
    store_relaxed(&s->lock_errno, fd < 0 ? errno : 0);
    if (fd >= 0) {
      store_relaxed(&s->lock_dev, (uint64_t)st.st_dev);
      store_relaxed(&s->lock_ino, st.st_ino);
    }
    atomic_store_explicit(&s->lock_fd, fd, memory_order_release); /* with its device and inode */
  }
  threads_unlock(&s->lock_opener);
  return process_lock_open(s);
}
