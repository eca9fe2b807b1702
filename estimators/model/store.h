/* store.h - rows of floats for all tokens: in memory while there is room, else in a scratch file. In
 * memory products may read so many rows past the end (gemm.h).
 * Files without a name go with the process; those with one are kept for a run that goes on. */
#ifndef PERTA_ESTIMATORS_MODEL_STORE_H
#define PERTA_ESTIMATORS_MODEL_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/pool.h"

struct perta_scratch {
    char *dir;           /* where files go; it is made for the first that needs it */
    uint64_t free_bytes; /* memory that stores may still take */
    uint64_t file_bytes; /* taken on disk so far */
};

struct perta_store {
    size_t n_rows, width;
    float *memory;          /* (n_rows, width), or NULL: */
    struct perta_pool pool; /* that memory is */
    int fd;                 /* -1: no file */
    char *path; /* of the file that has, or would have, the rows; NULL: it has no name */
    bool saved; /* the file holds what memory does */
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

int perta_store_put(struct perta_store *store, size_t first, size_t n, const float *rows,
                    struct perta_err *err);
/* n rows from first on, columns col .. col + n_cols: where they lie if that is in memory, else
 * read into room (n * n_cols). Borrowed until the next put or get. */
struct perta_rows {
    const float *data;
    size_t stride; /* floats from one row to the next */
};
int perta_store_get(const struct perta_store *store, size_t first, size_t n, size_t col,
                    size_t n_cols, float *room, struct perta_rows *rows, struct perta_err *err);

#endif
