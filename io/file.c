#include "io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/pool.h"

static int remember(struct perta_file *file, const char *path, struct perta_err *err)
{
    struct stat st;
    file->path = strdup(path); /* first: perta_file_close closes what has one */
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

static int open_either_way(struct perta_file *file, const char *path, int flags,
                           bool want_direct, struct perta_err *err)
{
    *file = (struct perta_file){.fd = -1};
    if (want_direct) {
        file->fd = open(path, flags | O_DIRECT, 0666);
        file->direct = file->fd >= 0;
        if (file->fd < 0 && errno != EINVAL && errno != EOPNOTSUPP)
            return perta_fail_sys(err, errno, "%s", path);
    }
    if (file->fd < 0)
        /* a refused O_DIRECT may have created the file already */
        file->fd = open(path, want_direct ? flags & ~O_EXCL : flags, 0666);
    if (file->fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    return remember(file, path, err);
}

int perta_open_regular(const char *path, struct stat *st, struct perta_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
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
    return open_either_way(file, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY,
                           want_direct, err);
}

int perta_file_create(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err)
{
    return open_either_way(file, path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, want_direct, err);
}

int perta_file_reopen(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err)
{
    struct stat st;
    int rc = open_either_way(file, path, O_RDWR | O_NOFOLLOW | O_CLOEXEC, want_direct, err);
    return rc ? rc : perta_check_left(file->fd, path, &st, err);
}

int perta_check_left(int fd, const char *path, struct stat *st, struct perta_err *err)
{
    if (fstat(fd, st))
        return perta_fail_sys(err, errno, "%s", path);
    if (!S_ISREG(st->st_mode) || st->st_nlink > 1)
        return perta_fail(err, PERTA_EINPUT, "%s: %s; remove it, and start over with --force", path,
                          S_ISREG(st->st_mode) ? "has another name, a hard link"
                                               : "not a regular file");
    return 0;
}

int perta_file_unchanged(const struct perta_file *file, struct perta_err *err)
{
    struct stat st;
    if (fstat(file->fd, &st))
        return perta_fail_sys(err, errno, "%s", file->path);
    if ((uint64_t)st.st_size != file->len_bytes || st.st_mtim.tv_sec != file->mtime.tv_sec ||
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
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return false;
    void *block = aligned_alloc(PERTA_BLOCK_BYTES, PERTA_BLOCK_BYTES);
    /* Some file systems accept the flag and refuse the read. */
    bool can = block && pread(fd, block, PERTA_BLOCK_BYTES, 0) >= 0;
    free(block);
    close(fd);
    return can;
}

double perta_file_cached_share(const char *path)
{
    enum { SAMPLES = 64 };
    uint64_t page = perta_page_bytes();
    unsigned hits = 0, asked = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) || st.st_size <= 0)
        goto out;
    uint64_t n_pages = ((uint64_t)st.st_size + page - 1) / page;
    uint64_t n = n_pages < SAMPLES ? n_pages : SAMPLES;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t off = n_pages * i / n * page;
        void *map = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, (off_t)off);
        if (map == MAP_FAILED)
            break;
        unsigned char resident = 0;
        asked++;
        if (!mincore(map, page, &resident) && (resident & 1))
            hits++;
        munmap(map, page);
    }
out:
    if (fd >= 0)
        close(fd);
    return asked ? (double)hits / asked : 0;
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

int perta_pread_all(int fd, void *buf, uint64_t len_bytes, uint64_t off_bytes, const char *path,
                    struct perta_err *err)
{
    uint8_t *to = buf;
    while (len_bytes) {
        ssize_t got = pread(fd, to, len_bytes < (1u << 30) ? len_bytes : (1u << 30),
                            (off_t)off_bytes);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return perta_fail_sys(err, errno, "%s: byte %llu", path,
                                  (unsigned long long)off_bytes);
        if (!got)
            return perta_fail(err, PERTA_EINPUT, "%s: ends at byte %llu, %llu more expected",
                              path, (unsigned long long)off_bytes,
                              (unsigned long long)len_bytes);
        to += got;
        off_bytes += (uint64_t)got;
        len_bytes -= (uint64_t)got;
    }
    return 0;
}

int perta_write_all(int fd, const void *buf, uint64_t len_bytes, const char *path,
                    struct perta_err *err)
{
    const uint8_t *from = buf;
    while (len_bytes) {
        ssize_t put = write(fd, from, len_bytes < (1u << 30) ? len_bytes : (1u << 30));
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return perta_fail_sys(err, errno, "%s", path);
        from += put;
        len_bytes -= (uint64_t)put;
    }
    return 0;
}
