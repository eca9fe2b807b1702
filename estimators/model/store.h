/* store.h - rows of floats for all tokens: in the backend's memory while there is room, else in a
 * scratch file. Files without a name go with the process; those with one are kept for a run that
 * resumes. */
#ifndef PERTA_ESTIMATORS_MODEL_STORE_H
#define PERTA_ESTIMATORS_MODEL_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/backend.h"
#include "io/err.h"

struct perta_scratch {
    struct perta_backend *be; /* borrowed; set before a store is opened */
    char *dir;                /* where files go; it is made for the first that needs it */
    uint64_t free_bytes;      /* memory that stores may still take */
    uint64_t file_bytes;      /* taken on disk so far */
};

struct perta_store {
    struct perta_backend *be;
    size_t n_rows, width;
    uint32_t buffer; /* (n_rows, width); 0: in the file */
    int fd;          /* -1: no file */
    char *path;      /* of the file that has, or would have, the rows; NULL: it has no name */
    bool saved;      /* the file holds what memory does */
};

/* Zeros. In memory if scratch->free_bytes allows. name: under which perta_store_save keeps it in
 * the scratch folder; NULL: it is never saved. */
int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                     size_t n_rows, size_t width, struct perta_err *err);
/* One that was saved. */
int perta_store_restore(struct perta_store *store, struct perta_scratch *scratch, const char *name,
                        size_t n_rows, size_t width, struct perta_err *err);
void perta_store_close(struct perta_store *store, struct perta_scratch *scratch);
/* Put the rows into the file, unless they are there, and sync it. */
int perta_store_save(struct perta_store *store, struct perta_scratch *scratch,
                     struct perta_err *err);
/* Remove the file of a store, by the store's name; it need not be there. */
void perta_store_forget(const struct perta_scratch *scratch, const char *name);

/* ---- n rows from first on; failures of the backend are returned, or left to its next wait ---- */

/* From the host. */
int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err);
/* From the backend, rows (n, width). */
int perta_store_set(struct perta_store *store, size_t first, size_t n, struct perta_array rows,
                    struct perta_err *err);
/* *rows (n, width): where they are if that is in memory, else in room, into which they are read. */
int perta_store_rows(const struct perta_store *store, size_t first, size_t n,
                     struct perta_array room, struct perta_array *rows, struct perta_err *err);
/* To the backend, to (n, width). */
int perta_store_load(const struct perta_store *store, size_t first, size_t n, struct perta_array to,
                     struct perta_err *err);
/* The same of columns col .. col + n_cols of one row of a store that is in a file. Any thread may. */
int perta_store_read_cols(const struct perta_store *store, size_t row, size_t col, size_t n_cols,
                          struct perta_array to, struct perta_err *err);

#endif
