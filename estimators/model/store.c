#include "estimators/model/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "estimators/compute/gemm.h"
#include "io/file.h"

/* ---- files ---- */

static int make_folder(const struct perta_scratch *scratch, struct perta_err *err)
{
    struct stat st;
    if (!mkdir(scratch->dir, 0777))
        return 0;
    if (errno != EEXIST || lstat(scratch->dir, &st))
        return perta_fail_sys(err, errno, "%s", scratch->dir);
    return S_ISDIR(st.st_mode)
               ? 0
               : perta_fail(err, PERTA_EINPUT, "%s: not a folder; remove it", scratch->dir);
}

static int open_nameless(const struct perta_scratch *scratch, struct perta_err *err)
{
    int fd = open(scratch->dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0)
        return fd;
    char *path = NULL; /* not every file system has files without a name */
    if (asprintf(&path, "%s/perta-scratch-XXXXXX", scratch->dir) < 0)
        return perta_fail_sys(err, ENOMEM, "scratch");
    fd = mkostemp(path, O_CLOEXEC);
    if (fd >= 0)
        unlink(path);
    free(path);
    return fd >= 0 ? fd : perta_fail_sys(err, errno, "scratch file in %s", scratch->dir);
}

static uint64_t bytes_of(const struct perta_store *store)
{
    return (uint64_t)store->n_rows * store->width * sizeof(float);
}

static uint64_t memory_bytes_of(const struct perta_store *store)
{
    return bytes_of(store) + PERTA_SLACK_ROWS * store->width * sizeof(float);
}

static int make_file(struct perta_store *store, struct perta_scratch *scratch,
                     struct perta_err *err)
{
    int rc = make_folder(scratch, err);
    if (rc)
        return rc;
    if (store->path) /* what another run left there, be it a link, is not written to */
        unlink(store->path);
    store->fd = store->path ? open(store->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)
                            : open_nameless(scratch, err);
    if (store->fd < 0)
        return store->path ? perta_fail_sys(err, errno, "%s", store->path) : store->fd;
    if (ftruncate(store->fd, (off_t)bytes_of(store)))
        return perta_fail_sys(err, errno, "scratch file of %llu bytes in %s",
                              (unsigned long long)bytes_of(store), scratch->dir);
    scratch->file_bytes += bytes_of(store);
    return 0;
}

/* ---- open, close ---- */

static int prepare(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                   size_t n_rows, size_t width, struct perta_err *err)
{
    *store = (struct perta_store){.n_rows = n_rows, .width = width, .fd = -1};
    if (name && asprintf(&store->path, "%s/%s", scratch->dir, name) < 0) {
        store->path = NULL;
        return perta_fail_sys(err, ENOMEM, "scratch");
    }
    uint64_t bytes = memory_bytes_of(store);
    if (bytes > scratch->free_bytes)
        return 0;
    int rc = perta_pool_take(&store->pool, bytes + sizeof(float), err);
    if (rc)
        return rc;
    store->memory = (float *)(void *)store->pool.base;
    scratch->free_bytes -= bytes;
    return 0;
}

int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                     size_t n_rows, size_t width, struct perta_err *err)
{
    int rc = prepare(store, scratch, name, n_rows, width, err);
    return rc || store->memory ? rc : make_file(store, scratch, err);
}

int perta_store_restore(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                        size_t n_rows, size_t width, struct perta_err *err)
{
    struct stat st;
    int rc = prepare(store, scratch, name, n_rows, width, err);
    if (rc)
        return rc;
    store->fd = open(store->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (store->fd < 0)
        return perta_fail_sys(err, errno, "%s", store->path);
    rc = perta_check_left(store->fd, store->path, &st, err);
    if (rc)
        return rc;
    if ((uint64_t)st.st_size != bytes_of(store))
        return perta_fail(err, PERTA_EINPUT, "%s: %lld bytes, not %llu; --force starts over",
                          store->path, (long long)st.st_size, (unsigned long long)bytes_of(store));
    scratch->file_bytes += bytes_of(store);
    store->saved = true;
    if (!store->memory)
        return 0;
    rc = perta_pread_all(store->fd, store->memory, bytes_of(store), 0, store->path, err);
    close(store->fd);
    store->fd = -1;
    return rc;
}

void perta_store_close(struct perta_store *store, struct perta_scratch *scratch)
{
    if (store->memory)
        scratch->free_bytes += memory_bytes_of(store);
    perta_pool_give(&store->pool);
    if (store->width && store->fd >= 0)
        close(store->fd);
    free(store->path);
    *store = (struct perta_store){.fd = -1};
}

int perta_store_save(struct perta_store *store, struct perta_scratch *scratch,
                     struct perta_err *err)
{
    int rc = 0;
    if (store->saved)
        return 0;
    if (store->memory) {
        rc = make_file(store, scratch, err);
        if (!rc)
            rc = perta_write_all(store->fd, store->memory, bytes_of(store), store->path, err);
    }
    if (!rc && fsync(store->fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", store->path);
    if (store->memory && store->fd >= 0) {
        close(store->fd);
        store->fd = -1;
    }
    store->saved = !rc;
    return rc;
}

void perta_store_forget(const struct perta_scratch *scratch, const char *name)
{
    char *path = NULL;
    if (asprintf(&path, "%s/%s", scratch->dir, name) < 0)
        return;
    unlink(path);
    free(path);
}

/* ---- rows ---- */

int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err)
{
    store->saved = false;
    if (store->memory) {
        memcpy(store->memory + first * store->width, rows, n * store->width * sizeof *rows);
        return 0;
    }
    if (lseek(store->fd, (off_t)(first * store->width * sizeof *rows), SEEK_SET) < 0)
        return perta_fail_sys(err, errno, "scratch file");
    return perta_write_all(store->fd, rows, n * store->width * sizeof *rows, "scratch file", err);
}

int perta_store_get(const struct perta_store *store, size_t first, size_t n, size_t col,
                    size_t n_cols, float *room, struct perta_rows *rows, struct perta_err *err)
{
    size_t at = first * store->width + col;
    int rc = 0;
    if (store->memory) {
        *rows = (struct perta_rows){store->memory + at, store->width};
        return 0;
    }
    *rows = (struct perta_rows){room, n_cols};
    if (n_cols == store->width)
        return perta_pread_all(store->fd, room, n * n_cols * sizeof *room, at * sizeof *room,
                               "scratch file", err);
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_pread_all(store->fd, room + i * n_cols, n_cols * sizeof *room,
                             (at + i * store->width) * sizeof *room, "scratch file", err);
    return rc;
}
