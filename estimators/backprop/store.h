/* store.h - rows of floats for all tokens: in memory while there is room, else in a scratch file
 * that has no name and goes with the process. */
#ifndef PERTA_BACKPROP_STORE_H
#define PERTA_BACKPROP_STORE_H

#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

struct perta_scratch {
    const char *dir;     /* where files go */
    uint64_t free_bytes; /* memory that stores may still take */
    uint64_t file_bytes; /* taken on disk so far */
};

struct perta_store {
    size_t n_rows, width;
    float *memory; /* (n_rows, width), or NULL: */
    int fd;
};

/* Zeros. In memory if scratch->free_bytes allows. */
int perta_store_open(struct perta_store *store, struct perta_scratch *scratch, size_t n_rows,
                     size_t width, struct perta_err *err);
void perta_store_close(struct perta_store *store);

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
