#include "estimators/backprop/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"

static int open_file(struct perta_store *store, struct perta_scratch *scratch, uint64_t bytes,
                     struct perta_err *err)
{
    store->fd = open(scratch->dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (store->fd < 0) { /* not every file system has files without a name */
        char *path = NULL;
        if (asprintf(&path, "%s/perta-scratch-XXXXXX", scratch->dir) < 0)
            return perta_fail_sys(err, ENOMEM, "scratch");
        store->fd = mkostemp(path, O_CLOEXEC);
        if (store->fd >= 0)
            unlink(path);
        free(path);
    }
    if (store->fd < 0)
        return perta_fail_sys(err, errno, "scratch file in %s", scratch->dir);
    if (ftruncate(store->fd, (off_t)bytes))
        return perta_fail_sys(err, errno, "scratch file of %llu bytes in %s",
                              (unsigned long long)bytes, scratch->dir);
    scratch->file_bytes += bytes;
    return 0;
}

int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, size_t n_rows,
                     size_t width, struct perta_err *err)
{
    uint64_t bytes = (uint64_t)n_rows * width * sizeof(float);
    *store = (struct perta_store){.n_rows = n_rows, .width = width, .fd = -1};
    if (bytes > scratch->free_bytes)
        return open_file(store, scratch, bytes, err);
    store->memory = calloc(n_rows * width + 1, sizeof(float));
    if (!store->memory)
        return perta_fail_sys(err, ENOMEM, "%llu bytes for all tokens", (unsigned long long)bytes);
    scratch->free_bytes -= bytes;
    return 0;
}

void perta_store_close(struct perta_store *store)
{
    free(store->memory);
    if (store->width && store->fd >= 0)
        close(store->fd);
    *store = (struct perta_store){.fd = -1};
}

int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err)
{
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
