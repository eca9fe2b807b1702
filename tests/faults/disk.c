/* System calls that change files: they can fail, stop half way, and be logged. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/faults/faults.h"

#ifndef FS_IOC_SHUTDOWN
#define FS_IOC_SHUTDOWN _IOR('X', 125, __u32)
#endif
#define SHUTDOWN_NO_LOG_FLUSH 2

#define WRAP(type, name, ...)        \
    type __real_##name(__VA_ARGS__); \
    type __wrap_##name(__VA_ARGS__); \
    type __wrap_##name(__VA_ARGS__)

int __real_rename(const char *from, const char *to);
int __real_rmdir(const char *path);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *ops, *bytes;

/* ---- the log: a line for each operation, once it is done; bytes in FILE.bytes ---- */

/* The path of an open file; NULL if it no longer has one. */
static const char *path_of(int fd, char path[4096])
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    path[n < 0 ? 0 : n] = '\0';
    return n <= 0 || *path != '/' || strstr(path, " (deleted)") ? NULL : path;
}

static bool open_log(void)
{
    char name[4096];
    if (!ops && fault_plan()->log) {
        snprintf(name, sizeof name, "%s.bytes", fault_plan()->log);
        ops = fopen(fault_plan()->log, "w");
        bytes = fopen(name, "w");
        if (!ops || !bytes)
            abort();
    }
    return ops;
}

static void log_op(const char *op, const char *path, const char *other)
{
    pthread_mutex_lock(&lock);
    if (open_log() && path)
        fprintf(ops, "%s\t%s\t%s\n", op, path, other ? other : "");
    if (ops)
        fflush(ops);
    pthread_mutex_unlock(&lock);
}

static void log_bytes(int fd, const void *data, size_t len, uint64_t off)
{
    char path[4096];
    pthread_mutex_lock(&lock);
    if (open_log() && path_of(fd, path)) {
        fprintf(ops, "write\t%s\t%llu\t%llu\n", path, (unsigned long long)off,
                (unsigned long long)len);
        fwrite(data, 1, len, bytes);
        fflush(bytes);
        fflush(ops);
    }
    pthread_mutex_unlock(&lock);
}

static void log_fd(const char *op, int fd, uint64_t n)
{
    char path[4096], text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)n);
    log_op(op, path_of(fd, path), text);
}

/* ---- each of them ---- */

static void cut_off(const char *dir)
{
    unsigned how = SHUTDOWN_NO_LOG_FLUSH;
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, FS_IOC_SHUTDOWN, &how))
        perror("FS_IOC_SHUTDOWN");
    if (fd >= 0)
        close(fd);
}

/* Call before an operation of that kind. Returns true, with errno set, if it must fail. */
static bool read_fails(const char *kind)
{
    int error = fault_strikes(kind);
    errno = error ? error : errno;
    return error;
}

/* The same for an operation that changes a file system. */
static bool fails(const char *kind)
{
    const struct fault_plan *p = fault_plan();
    static uint64_t n;
    fault_strikes("any");
    if (p->shutdown && __atomic_add_fetch(&n, 1, __ATOMIC_RELAXED) == p->shutdown_at)
        cut_off(p->shutdown);
    return read_fails(kind);
}

int __real_open64(const char *path, int flags, ...);
int __wrap_open64(const char *path, int flags, ...);
int __wrap_open64(const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    bool creates = flags & O_CREAT && access(path, F_OK);
    if (creates && fails("create"))
        return -1;
    int fd = __real_open64(path, flags, mode);
    char full[4096];
    if (fd >= 0 && creates)
        log_op("create", path_of(fd, full), NULL);
    return fd;
}

WRAP(int, mkdir, const char *path, mode_t mode)
{
    char full[4096];
    if (fails("mkdir"))
        return -1;
    int rc = __real_mkdir(path, mode);
    if (!rc)
        log_op("mkdir", realpath(path, full), NULL);
    return rc;
}

/* The full path of a name that may not exist yet. */
static const char *full_of(const char *path, char full[8192])
{
    char dir[4096], real[4096];
    const char *slash = strrchr(path, '/');
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    snprintf(full, 8192, "%s/%s", realpath(dir, real), slash ? slash + 1 : path);
    return full;
}

WRAP(int, rename, const char *from, const char *to)
{
    char a[8192], b[8192];
    if (fails("rename"))
        return -1;
    int rc = __real_rename(from, to);
    if (!rc)
        log_op("rename", full_of(from, a), full_of(to, b));
    return rc;
}

WRAP(int, renameat2, int from_fd, const char *from, int to_fd, const char *to, unsigned flags)
{
    char a[8192], b[8192];
    if (fails("rename"))
        return -1;
    int rc = __real_renameat2(from_fd, from, to_fd, to, flags);
    if (!rc)
        log_op("exchange", full_of(from, a), full_of(to, b));
    return rc;
}

WRAP(int, unlink, const char *path)
{
    char full[8192];
    if (fails("unlink"))
        return -1;
    int rc = __real_unlink(path);
    if (!rc)
        log_op("remove", full_of(path, full), NULL);
    return rc;
}

static bool is_empty_folder(const char *path)
{
    unsigned n = 0;
    DIR *dir = opendir(path);
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n == 2; /* . and .. */
}

/* With a log, a removed folder is moved to FILE.INODE instead: after an earlier power cut it would
 * still exist. The log identifies it by its inode. */
static int remove_folder(const char *path)
{
    char full[8192], aside[4096] = "";
    struct stat st;
    int rc;
    if (fault_plan()->log && is_empty_folder(path) && !stat(path, &st)) {
        snprintf(aside, sizeof aside, "%s.%llu", fault_plan()->log, (unsigned long long)st.st_ino);
        rc = __real_rename(path, aside);
    } else
        rc = __real_rmdir(path);
    if (!rc)
        log_op("remove", full_of(path, full), aside);
    return rc;
}

WRAP(int, remove, const char *path)
{
    char full[8192];
    struct stat st;
    if (fails("unlink"))
        return -1;
    if (!lstat(path, &st) && S_ISDIR(st.st_mode))
        return remove_folder(path);
    int rc = __real_remove(path);
    if (!rc)
        log_op("remove", full_of(path, full), NULL);
    return rc;
}

WRAP(int, rmdir, const char *path)
{
    return fails("unlink") ? -1 : remove_folder(path);
}

static bool is_regular(int fd)
{
    struct stat st;
    return !fstat(fd, &st) && S_ISREG(st.st_mode);
}

/* How much of a write is done: a part of it also on failure, unless the caller will repeat it. */
static size_t part_of(size_t len, bool failed)
{
    if (failed && errno == EAGAIN)
        return 0;
    if (failed || fault_chance(fault_plan()->short_))
        return len > 1 ? 1 + fault_random(len - 1) : failed ? 0 : len;
    return len;
}

WRAP(ssize_t, write, int fd, const void *data, size_t len)
{
    if (!is_regular(fd) || !len)
        return __real_write(fd, data, len);
    if (fault_chance(fault_plan()->again)) {
        errno = EINTR;
        return -1;
    }
    bool failed = fails("put");
    int error = errno;
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t put = __real_write(fd, data, part_of(len, failed));
    if (put > 0)
        log_bytes(fd, data, (size_t)put, (uint64_t)at);
    errno = failed ? error : errno;
    return failed ? -1 : put;
}

/* The engine's own writes are cut short in perta_request_advance. */
WRAP(ssize_t, pwrite64, int fd, const void *data, size_t len, off_t off)
{
    bool failed = fails("pwrite");
    int error = errno;
    ssize_t put = failed ? -1 : __real_pwrite64(fd, data, len, off);
    if (put > 0)
        log_bytes(fd, data, (size_t)put, (uint64_t)off);
    errno = failed ? error : errno;
    return put;
}

WRAP(ssize_t, pread64, int fd, void *data, size_t len, off_t off)
{
    if (fault_chance(fault_plan()->again)) {
        errno = EINTR;
        return -1;
    }
    return read_fails("pread") ? -1 : __real_pread64(fd, data, len, off);
}

/* Reads without an offset: small files, lines, and names in folders. */
WRAP(ssize_t, read, int fd, void *data, size_t len)
{
    return is_regular(fd) && read_fails("text") ? -1 : __real_read(fd, data, len);
}

WRAP(ssize_t, getline, char **line, size_t *room, FILE *file)
{
    return read_fails("text") ? -1 : __real_getline(line, room, file);
}

/* The name of getdelim when optimisation is on. */
WRAP(ssize_t, __getdelim, char **line, size_t *room, int delimiter, FILE *file)
{
    return read_fails("text") ? -1 : __real___getdelim(line, room, delimiter, file);
}

WRAP(struct dirent64 *, readdir64, DIR *dir)
{
    return read_fails("list") ? NULL : __real_readdir64(dir);
}

/* Entering an io_uring; if that fails, the kernel may have taken the prepared requests. */
WRAP(int, io_uring_submit_and_wait_timeout, struct io_uring *ring, struct io_uring_cqe **cqe,
     unsigned n, struct __kernel_timespec *timeout, sigset_t *mask)
{
    int error = fault_strikes("enter");
    if (!error)
        return __real_io_uring_submit_and_wait_timeout(ring, cqe, n, timeout, mask);
    if (fault_random(2))
        io_uring_submit(ring);
    return -error;
}

WRAP(int, fsync, int fd)
{
    if (fails("sync"))
        return -1;
    int rc = fault_plan()->fast ? 0 : __real_fsync(fd);
    if (!rc)
        log_fd("sync", fd, 0);
    return rc;
}

WRAP(int, fdatasync, int fd)
{
    if (fails("sync"))
        return -1;
    int rc = fault_plan()->fast ? 0 : __real_fdatasync(fd);
    if (!rc)
        log_fd("sync", fd, 0);
    return rc;
}

WRAP(int, ftruncate64, int fd, off_t len)
{
    if (fails("truncate"))
        return -1;
    int rc = __real_ftruncate64(fd, len);
    if (!rc)
        log_fd("truncate", fd, (uint64_t)len);
    return rc;
}

WRAP(int, fallocate64, int fd, int mode, off_t off, off_t len)
{
    if (fails("allocate"))
        return -1;
    int rc = __real_fallocate64(fd, mode, off, len);
    if (!rc && !mode)
        log_fd("extend", fd, (uint64_t)(off + len));
    return rc;
}
