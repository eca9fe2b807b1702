#include "estimators/model/store.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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
    char *path = NULL; /* not every file system has unnamed files */
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

/* Bytes that it takes in memory. */
static uint64_t memory_bytes_of(const struct perta_store *store)
{
    return store->be->ops->buffer_bytes(store->be, bytes_of(store));
}

static int make_file(struct perta_store *store, struct perta_scratch *scratch,
                     struct perta_err *err)
{
    int rc = make_folder(scratch, err);
    if (rc)
        return rc;
    if (store->path) /* a leftover, which might be a link, must not be written to */
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

/* ---- floats, to and from a file ---- */

#define PIECE_FLOATS 16384 /* copied at a time, through the stack */

static struct perta_array row_at(const struct perta_store *store, size_t row)
{
    const struct perta_array start = {store->buffer, 0};
    return perta_array_at(start, (uint64_t)row * store->width);
}

/* Write len floats from the backend to the file, from float number at on. */
static int write_floats(int fd, uint64_t at, uint64_t len, struct perta_backend *be,
                        struct perta_array from, const char *path, struct perta_err *err)
{
    float piece[PIECE_FLOATS];
    int rc = 0;
    for (uint64_t i = 0; i < len && !rc; i += PIECE_FLOATS) {
        uint64_t some = len - i < PIECE_FLOATS ? len - i : PIECE_FLOATS;
        be->ops->get(be, perta_array_at(from, i), piece, some * sizeof *piece);
        rc = perta_backend_wait(be, err);
        if (!rc)
            rc = perta_pwrite_all(fd, piece, some * sizeof *piece, (at + i) * sizeof *piece, path,
                                  err);
    }
    return rc;
}

/* Read len floats from the file to the backend. */
static int read_floats(int fd, uint64_t at, uint64_t len, struct perta_backend *be,
                       struct perta_array to, const char *path, struct perta_err *err)
{
    float piece[PIECE_FLOATS];
    int rc = 0;
    for (uint64_t i = 0; i < len && !rc; i += PIECE_FLOATS) {
        uint64_t some = len - i < PIECE_FLOATS ? len - i : PIECE_FLOATS;
        rc = perta_pread_all(fd, piece, some * sizeof *piece, (at + i) * sizeof *piece, path, err);
        if (!rc)
            be->ops->put(be, perta_array_at(to, i), piece, some * sizeof *piece);
    }
    return rc;
}

/* ---- open, close ---- */

static int describe(struct perta_store *store, const struct perta_scratch *scratch,
                    const char *name, size_t n_rows, size_t width, struct perta_err *err)
{
    *store = (struct perta_store){.be = scratch->be, .n_rows = n_rows, .width = width, .fd = -1};
    if (name && asprintf(&store->path, "%s/%s", scratch->dir, name) < 0) {
        store->path = NULL;
        return perta_fail_sys(err, ENOMEM, "scratch");
    }
    return 0;
}

static int prepare(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                   size_t n_rows, size_t width, struct perta_err *err)
{
    int rc = describe(store, scratch, name, n_rows, width, err);
    if (rc || memory_bytes_of(store) > scratch->free_bytes)
        return rc;
    rc = store->be->ops->alloc(store->be, bytes_of(store), &store->buffer, err);
    if (!rc)
        scratch->free_bytes -= memory_bytes_of(store);
    return rc;
}

int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                     size_t n_rows, size_t width, struct perta_err *err)
{
    int rc = prepare(store, scratch, name, n_rows, width, err);
    return rc || store->buffer ? rc : make_file(store, scratch, err);
}

/* Open the file that the store was saved to. */
static int open_saved(struct perta_store *store, struct perta_scratch *scratch,
                      struct perta_err *err)
{
    struct stat st;
    assert(store->path); /* it has a name */
    store->fd = open(store->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (store->fd < 0)
        return perta_fail_sys(err, errno, "%s", store->path);
    int rc = perta_check_left(store->fd, store->path, &st, err);
    if (rc)
        return rc;
    if ((uint64_t)st.st_size != bytes_of(store))
        return perta_fail(err, PERTA_EINPUT, "%s: %lld bytes, not %llu; --force starts over",
                          store->path, (long long)st.st_size, (unsigned long long)bytes_of(store));
    scratch->file_bytes += bytes_of(store);
    store->saved = true;
    return 0;
}

int perta_store_restore(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                        size_t n_rows, size_t width, struct perta_err *err)
{
    int rc = prepare(store, scratch, name, n_rows, width, err);
    if (!rc)
        rc = open_saved(store, scratch, err);
    if (rc || !store->buffer)
        return rc;
    rc = read_floats(store->fd, 0, (uint64_t)store->n_rows * store->width, store->be,
                     row_at(store, 0), store->path, err);
    close(store->fd);
    store->fd = -1;
    return rc;
}

void perta_store_close(struct perta_store *store, struct perta_scratch *scratch)
{
    if (store->buffer) {
        scratch->free_bytes += memory_bytes_of(store);
        store->be->ops->free(store->be, store->buffer);
    }
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
    if (store->buffer) {
        rc = make_file(store, scratch, err);
        if (!rc)
            rc = write_floats(store->fd, 0, (uint64_t)store->n_rows * store->width, store->be,
                              row_at(store, 0), store->path, err);
    }
    if (!rc && fsync(store->fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", store->path);
    if (store->buffer && store->fd >= 0) {
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

/* ---- arrays ---- */

int perta_scratch_save(struct perta_scratch *scratch, const char *name, struct perta_array from,
                       uint64_t n, struct perta_err *err)
{
    struct perta_store file;
    int rc = describe(&file, scratch, name, 1, n, err);
    if (!rc)
        rc = make_file(&file, scratch, err);
    if (!rc)
        rc = write_floats(file.fd, 0, n, scratch->be, from, file.path, err);
    if (!rc && fsync(file.fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", file.path);
    perta_store_close(&file, scratch);
    return rc;
}

int perta_scratch_load(struct perta_scratch *scratch, const char *name, struct perta_array to,
                       uint64_t n, struct perta_err *err)
{
    struct perta_store file;
    int rc = describe(&file, scratch, name, 1, n, err);
    if (!rc)
        rc = open_saved(&file, scratch, err);
    if (!rc)
        rc = read_floats(file.fd, 0, n, scratch->be, to, file.path, err);
    perta_store_close(&file, scratch);
    return rc;
}

/* ---- rows ---- */

int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err)
{
    uint64_t len_bytes = (uint64_t)n * store->width * sizeof *rows;
    store->saved = false;
    if (store->buffer) {
        store->be->ops->put(store->be, row_at(store, first), rows, len_bytes);
        return 0;
    }
    return perta_pwrite_all(store->fd, rows, len_bytes,
                            (uint64_t)first * store->width * sizeof *rows, "scratch file", err);
}

int perta_store_set(struct perta_store *store, size_t first, size_t n, struct perta_array rows,
                    struct perta_err *err)
{
    uint64_t len = (uint64_t)n * store->width;
    store->saved = false;
    if (store->buffer) {
        store->be->ops->copy(store->be, row_at(store, first), rows, len);
        return 0;
    }
    return write_floats(store->fd, (uint64_t)first * store->width, len, store->be, rows,
                        "scratch file", err);
}

int perta_store_rows(const struct perta_store *store, size_t first, size_t n,
                     struct perta_array room, struct perta_array *rows, struct perta_err *err)
{
    *rows = store->buffer ? row_at(store, first) : room;
    return store->buffer ? 0 : perta_store_load(store, first, n, room, err);
}

int perta_store_load(const struct perta_store *store, size_t first, size_t n, struct perta_array to,
                     struct perta_err *err)
{
    uint64_t len = (uint64_t)n * store->width;
    if (store->buffer) {
        store->be->ops->copy(store->be, to, row_at(store, first), len);
        return 0;
    }
    return read_floats(store->fd, (uint64_t)first * store->width, len, store->be, to,
                       "scratch file", err);
}

int perta_store_gather(const struct perta_store *store, const uint32_t *index, size_t n,
                       struct perta_array to, struct perta_err *err)
{
    int rc = 0;
    if (store->buffer)
        store->be->ops->gather(store->be, to, row_at(store, 0), index, n, store->width);
    for (size_t i = 0; i < n && !store->buffer && !rc; i++)
        rc = perta_store_load(store, index[i], 1, perta_array_at(to, i * store->width), err);
    return rc;
}

/* room = the rows, room += by * from, the rows = room: the same sums as in memory. */
static int scatter_add_in_file(struct perta_store *store, const uint32_t *index, const float *by,
                               size_t n, struct perta_array from, struct perta_array room,
                               struct perta_err *err)
{
    uint32_t zero = 0;
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++) {
        struct perta_array row = perta_array_at(room, i * store->width);
        rc = perta_store_load(store, index[i], 1, row, err);
        store->be->ops->scatter_add_scaled(store->be, row, perta_array_at(from, i * store->width),
                                           &zero, by ? by + i : NULL, 1, store->width);
        if (!rc)
            rc = perta_store_set(store, index[i], 1, row, err);
    }
    return rc ? rc : perta_backend_wait(store->be, err); /* zero is borrowed */
}

int perta_store_scatter_add(struct perta_store *store, const uint32_t *index, const float *by,
                            size_t n, struct perta_array from, struct perta_array room,
                            struct perta_err *err)
{
    store->saved = false;
    if (!store->buffer)
        return scatter_add_in_file(store, index, by, n, from, room, err);
    store->be->ops->scatter_add_scaled(store->be, row_at(store, 0), from, index, by, n,
                                       store->width);
    return 0;
}

int perta_store_read_cols(const struct perta_store *store, size_t row, size_t col, size_t n_cols,
                          struct perta_array to, struct perta_err *err)
{
    return read_floats(store->fd, (uint64_t)row * store->width + col, n_cols, store->be, to,
                       "scratch file", err);
}
