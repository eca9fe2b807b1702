#include "io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/pool.h"
#include "io/window.h"

#define FAR_BYTES (1ull << 30)  /* more than any unit of the page cache */
#define TRANSFER_MAX (1u << 30) /* bytes of one system call */
#define AGAIN_MAX 100           /* EAGAIN in a row */
#define AGAIN_AT_ONCE 5         /* the first of them are retried without a pause */
/* The pause is short, because an engine's owner waits for each request in turn. */
#define AGAIN_PAUSE_NS 200000

int perta_open_any(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666), set;
    struct stat st;
    if (fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) && (set = fcntl(fd, F_GETFL)) >= 0)
        fcntl(fd, F_SETFL, set & ~O_NONBLOCK);
    return fd;
}

static int remember(struct perta_file *file, const char *path, struct perta_err *err)
{
    struct stat st;
    file->path = strdup(path); /* first: perta_file_close closes only files with a path */
    if (!file->path) {
        close(file->fd);
        return perta_fail_sys(err, ENOMEM, "%s", path);
    }
    if (fstat(file->fd, &st))
        return perta_fail_sys(err, errno, "%s", path);
    if (!S_ISREG(st.st_mode))
        return perta_fail(err, PERTA_EINPUT, "%s: not a regular file", path);
    file->len_bytes = (uint64_t)st.st_size;
    file->dev = st.st_dev;
    file->ino = st.st_ino;
    file->mtime = st.st_mtim;
    return 0;
}

static int open_either_way(struct perta_file *file, const char *path, int flags, bool want_direct,
                           struct perta_err *err)
{
    *file = (struct perta_file){.fd = -1};
    if (want_direct) {
        file->fd = perta_open_any(path, flags | O_DIRECT);
        file->direct = file->fd >= 0;
        if (file->fd < 0 && errno != EINVAL && errno != EOPNOTSUPP)
            return perta_fail_sys(err, errno, "%s", path);
    }
    if (file->fd < 0)
        /* a refused O_DIRECT may have created the file already */
        file->fd = perta_open_any(path, want_direct ? flags & ~O_EXCL : flags);
    if (file->fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    return remember(file, path, err);
}

int perta_open_regular(const char *path, struct stat *st, struct perta_err *err)
{
    int fd = perta_open_any(path, O_RDONLY);
    bool missing = fd < 0 && (errno == ENOENT || errno == ENOTDIR);
    if (missing || (fd < 0 && (errno == ELOOP || errno == ENXIO)))
        return perta_fail(err, PERTA_EINPUT, "%s: %s", path,
                          missing ? "no such file" : "not a regular file");
    if (fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    int rc = 0;
    if (fstat(fd, st))
        rc = perta_fail_sys(err, errno, "%s", path);
    else if (!S_ISREG(st->st_mode))
        rc = perta_fail(err, PERTA_EINPUT, "%s: %s, where a regular file should be", path,
                        S_ISDIR(st->st_mode) ? "a folder" : "not a regular file");
    if (rc) {
        close(fd);
        return rc;
    }
    return fd;
}

int perta_file_open(struct perta_file *file, const char *path, bool want_direct,
                    struct perta_err *err)
{
    return open_either_way(file, path, O_RDONLY, want_direct, err);
}

int perta_file_create(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err)
{
    return open_either_way(file, path, O_RDWR | O_CREAT | O_EXCL, want_direct, err);
}

int perta_file_reopen(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err)
{
    struct stat st;
    int rc = open_either_way(file, path, O_RDWR | O_NOFOLLOW, want_direct, err);
    return rc ? rc : perta_check_left(file->fd, path, &st, err);
}

int perta_check_left(int fd, const char *path, struct stat *st, struct perta_err *err)
{
    if (fstat(fd, st))
        return perta_fail_sys(err, errno, "%s", path);
    if (!S_ISREG(st->st_mode) || st->st_nlink > 1)
        return perta_fail(err, PERTA_EINPUT, "%s: %s; remove it, and start over with --force", path,
                          S_ISREG(st->st_mode) ? "has another name (a hard link)"
                                               : "not a regular file");
    return 0;
}

int perta_file_unchanged(const struct perta_file *file, struct perta_err *err)
{
    struct stat st;
    if (fstat(file->fd, &st))
        return perta_fail_sys(err, errno, "%s", file->path);
    if (st.st_dev != file->dev || st.st_ino != file->ino ||
        (uint64_t)st.st_size != file->len_bytes || st.st_mtim.tv_sec != file->mtime.tv_sec ||
        st.st_mtim.tv_nsec != file->mtime.tv_nsec)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: changed while it was read; run again when nothing writes to it",
                          file->path);
    return 0;
}

void perta_file_close(struct perta_file *file)
{
    if (file->path && file->fd >= 0)
        close(file->fd);
    free(file->path);
    *file = (struct perta_file){.fd = -1};
}

bool perta_file_can_direct(const char *path)
{
    int fd = perta_open_any(path, O_RDONLY | O_DIRECT);
    if (fd < 0)
        return false;
    void *block = aligned_alloc(PERTA_BLOCK_BYTES, PERTA_BLOCK_BYTES);
    struct perta_retry retry = {0};
    ssize_t got = -1;
    /* Some file systems accept O_DIRECT at open and refuse the read. */
    while (block && (got = pread(fd, block, PERTA_BLOCK_BYTES, 0)) < 0 &&
           perta_retry_same(&retry, errno))
        ;
    free(block);
    close(fd);
    return got >= 0;
}

/* Is the page at off_bytes in the page cache? 1, 0, or -1 if the kernel does not tell. */
static int is_cached(int fd, uint64_t off_bytes, uint64_t page_bytes)
{
    unsigned char resident = 0;
    void *map = mmap(NULL, page_bytes, PROT_READ, MAP_SHARED, fd, (off_t)off_bytes);
    if (map == MAP_FAILED)
        return -1;
    int failed = mincore(map, page_bytes, &resident);
    munmap(map, page_bytes);
    return failed ? -1 : resident & 1;
}

/* Since Linux 5.2, mincore tells users who neither own a file nor may write it that every page is
 * cached, even one far beyond its end. Such a page reveals that. */
static bool mincore_tells(int fd, uint64_t len_bytes, uint64_t page_bytes)
{
    return !is_cached(fd, perta_align_up(len_bytes, FAR_BYTES) + FAR_BYTES, page_bytes);
}

double perta_file_cached_share(const char *path)
{
    enum { SAMPLES = 64 };
    uint64_t page = perta_page_bytes();
    unsigned hits = 0, asked = 0;
    int fd = perta_open_any(path, O_RDONLY);
    struct stat st = {0};
    if (fd < 0 || fstat(fd, &st))
        goto out;
    uint64_t n_pages = ((uint64_t)st.st_size + page - 1) / page;
    uint64_t n = mincore_tells(fd, (uint64_t)st.st_size, page) ? n_pages : 0;
    n = n < SAMPLES ? n : SAMPLES;
    for (uint64_t i = 0; i < n; i++) {
        int cached = is_cached(fd, n_pages * i / n * page, page);
        asked += cached >= 0;
        hits += cached > 0;
    }
out:
    if (fd >= 0)
        close(fd);
    return asked ? (double)hits / asked : fd >= 0 && !st.st_size ? 0 : -1;
}

char *perta_path_join(const char *dir, const char *name)
{
    char *path = NULL;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

int perta_path_stat(const char *path, struct stat *st, struct perta_err *err)
{
    if (!stat(path, st))
        return 0;
    return errno == ENOENT || errno == ENOTDIR
               ? perta_fail(err, PERTA_EINPUT, "%s: no such file or folder", path)
               : perta_fail_sys(err, errno, "%s", path);
}

int perta_folder_each(const char *path,
                      int (*each)(void *ctx, const char *name, struct perta_err *err), void *ctx,
                      struct perta_err *err)
{
    DIR *dir = opendir(path);
    if (!dir)
        return perta_fail_sys(err, errno, "%s", path);
    int rc = 0;
    while (!rc) {
        errno = 0;
        const struct dirent *entry = readdir(dir);
        if (!entry && errno)
            rc = perta_fail_sys(err, errno, "%s", path);
        if (!entry)
            break;
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            rc = each(ctx, entry->d_name, err);
    }
    closedir(dir);
    return rc;
}

/* ---- transfers ---- */

bool perta_fd_buffer(int fd)
{
    int set = fcntl(fd, F_GETFL);
    return set >= 0 && !fcntl(fd, F_SETFL, set & ~O_DIRECT);
}

bool perta_retry_same(struct perta_retry *retry, int error)
{
    const struct timespec pause = {.tv_nsec = AGAIN_PAUSE_NS};
    if (error != EAGAIN)
        return error == EINTR;
    if (retry->n_again >= AGAIN_AT_ONCE)
        nanosleep(&pause, NULL);
    return retry->n_again++ < AGAIN_MAX;
}

bool perta_retry_any(struct perta_retry *retry, int fd, int error)
{
    if (error != EINVAL || retry->buffered)
        return perta_retry_same(retry, error);
    retry->buffered = true;
    return perta_fd_buffer(fd);
}

static size_t part_of(uint64_t len_bytes)
{
    return len_bytes < TRANSFER_MAX ? len_bytes : TRANSFER_MAX;
}

int perta_pread_all(int fd, void *buf, uint64_t len_bytes, uint64_t off_bytes, const char *path,
                    struct perta_err *err)
{
    struct perta_retry retry = {0};
    uint8_t *to = buf;
    while (len_bytes) {
        ssize_t got = pread(fd, to, part_of(len_bytes), (off_t)off_bytes);
        if (got < 0 && perta_retry_any(&retry, fd, errno))
            continue;
        if (got < 0)
            return perta_fail_sys(err, errno, "%s: byte %llu", path, (unsigned long long)off_bytes);
        if (!got)
            return perta_fail(err, PERTA_EINPUT, "%s: ends at byte %llu, %llu more expected", path,
                              (unsigned long long)off_bytes, (unsigned long long)len_bytes);
        retry.n_again = 0;
        to += got;
        off_bytes += (uint64_t)got;
        len_bytes -= (uint64_t)got;
    }
    return 0;
}

int perta_pwrite_all(int fd, const void *buf, uint64_t len_bytes, uint64_t off_bytes,
                     const char *name, struct perta_err *err)
{
    struct perta_retry retry = {0};
    const uint8_t *from = buf;
    while (len_bytes) {
        ssize_t put = pwrite(fd, from, part_of(len_bytes), (off_t)off_bytes);
        if (put < 0 && perta_retry_any(&retry, fd, errno))
            continue;
        if (put <= 0)
            return perta_fail_sys(err, put ? errno : ENOSPC, "%s: byte %llu", name,
                                  (unsigned long long)off_bytes);
        retry.n_again = 0;
        from += put;
        off_bytes += (uint64_t)put;
        len_bytes -= (uint64_t)put;
    }
    return 0;
}

int perta_write_all(int fd, const void *buf, uint64_t len_bytes, const char *path,
                    struct perta_err *err)
{
    struct perta_retry retry = {0};
    const uint8_t *from = buf;
    while (len_bytes) {
        ssize_t put = write(fd, from, part_of(len_bytes));
        if (put < 0 && perta_retry_same(&retry, errno))
            continue;
        if (put < 0)
            return perta_fail_sys(err, errno, "%s", path);
        retry.n_again = 0;
        from += put;
        len_bytes -= (uint64_t)put;
    }
    return 0;
}

int perta_file_text(const char *path, char **text, size_t *len_bytes, struct perta_err *err)
{
    struct stat st;
    *text = NULL;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    *len_bytes = (size_t)st.st_size;
    *text = malloc(*len_bytes + 1);
    int rc = *text ? perta_pread_all(fd, *text, *len_bytes, 0, path, err)
                   : perta_fail_sys(err, ENOMEM, "%s", path);
    close(fd);
    return rc;
}

/* ---- folders ---- */

int perta_folder_sync(const char *path, struct perta_err *err)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    int rc = fsync(fd) && errno != EINVAL ? perta_fail_sys(err, errno, "%s: fsync", path) : 0;
    close(fd);
    return rc;
}

int perta_name_sync(const char *path, struct perta_err *err)
{
    char *copy = strdup(path);
    if (!copy)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    int rc = perta_folder_sync(dirname(copy), err);
    free(copy);
    return rc;
}
