/* store.h - rows of floats for all tokens: in the backend's memory if they fit, otherwise in a
 * scratch file. Unnamed files vanish with the process; named ones are kept for --resume. */
#ifndef PERTA_ESTIMATORS_MODEL_STORE_H
#define PERTA_ESTIMATORS_MODEL_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/backend.h"
#include "io/err.h"

struct perta_scratch {
    struct perta_backend *be; /* borrowed; set before a store is opened */
    char *dir;                /* folder of the files; it is made for the first of them */
    uint64_t free_bytes;      /* memory that is left for stores */
    uint64_t file_bytes;      /* written to files so far */
};

struct perta_store {
    struct perta_backend *be;
    size_t n_rows, width;
    uint32_t buffer; /* (n_rows, width); 0: rows are in the file */
    int fd;          /* -1: no file */
    char *path;      /* of the file that has the rows, or would be saved to; NULL: unnamed */
    bool saved;      /* the file is synced and up to date */
};

/* A new store, filled with zeros, in memory if scratch->free_bytes allows. name: its file in the
 * scratch folder once it is saved; NULL: it is never saved. */
int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                     size_t n_rows, size_t width, struct perta_err *err);
/* Open a store that was saved. */
int perta_store_restore(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                        size_t n_rows, size_t width, struct perta_err *err);
void perta_store_close(struct perta_store *store, struct perta_scratch *scratch);
/* Write the rows to the file, unless they are there, and sync it. */
int perta_store_save(struct perta_store *store, struct perta_scratch *scratch,
                     struct perta_err *err);
/* Remove the file of the store of this name, if there is one. */
void perta_store_forget(const struct perta_scratch *scratch, const char *name);

/* ---- arrays of the backend's ---- */

/* Write n floats to the file of this name in the scratch folder, and sync it. */
int perta_scratch_save(struct perta_scratch *scratch, const char *name, struct perta_array from,
                       uint64_t n, struct perta_err *err);
/* Read them back. PERTA_EINPUT if the file has another size. */
int perta_scratch_load(struct perta_scratch *scratch, const char *name, struct perta_array to,
                       uint64_t n, struct perta_err *err);

/* ---- access to n rows from first on; failures of the backend are returned, or left to its next
 * wait ---- */

/* Write rows from the host. */
int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err);
/* Write rows (n, width) from the backend. */
int perta_store_set(struct perta_store *store, size_t first, size_t n, struct perta_array rows,
                    struct perta_err *err);
/* Set *rows (n, width) to the rows themselves if they are in memory, otherwise to room, into which
 * they are read. */
int perta_store_rows(const struct perta_store *store, size_t first, size_t n,
                     struct perta_array room, struct perta_array *rows, struct perta_err *err);
/* Read rows to to (n, width), in the backend's memory. */
int perta_store_load(const struct perta_store *store, size_t first, size_t n, struct perta_array to,
                     struct perta_err *err);
/* to (n, width), in the backend's memory: row i = row index[i] of the store. index is borrowed until
 * the next wait. */
int perta_store_gather(const struct perta_store *store, const uint32_t *index, size_t n,
                       struct perta_array to, struct perta_err *err);
/* Row index[i] of the store += by[i] * row i of from (n, width); by NULL: 1. The rows differ from
 * each other. index and by are borrowed until the next wait. room (n, width): scratch. */
int perta_store_scatter_add(struct perta_store *store, const uint32_t *index, const float *by,
                            size_t n, struct perta_array from, struct perta_array room,
                            struct perta_err *err);
/* Read columns col .. col + n_cols of one row. The store must be in a file. On any thread. */
int perta_store_read_cols(const struct perta_store *store, size_t row, size_t col, size_t n_cols,
                          struct perta_array to, struct perta_err *err);

#endif
