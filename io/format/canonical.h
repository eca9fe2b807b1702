/* canonical.h - JSON in which each value has exactly one spelling, so that equal documents are
 * byte-identical and can be signed. Spec: docs/manifest.md */
#ifndef PERTA_IO_FORMAT_CANONICAL_H
#define PERTA_IO_FORMAT_CANONICAL_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "io/err.h"

/* The canonical text, without a line break at its end; the caller frees it. NULL only when out of
 * memory. (jansson's output will not do: how it spells reals depends on its version.) */
PERTA_API char *perta_canonical_json(const json_t *value);

/* A member of an object whose value is an array that is produced item by item while it is written:
 * a tree of the counts of 100,000 tensors would take too much memory. */
struct perta_canonical_rows {
    const char *key; /* the object has this member too: its place counts, its value does not */
    uint64_t n;
    json_t *(*row)(const void *ctx, uint64_t i); /* item i, the caller's; or NULL */
    const void *ctx;
};
/* Write the canonical text of an object to out. False when out of memory. Write errors show in out
 * (ferror). */
PERTA_API bool perta_canonical_print(FILE *out, const json_t *object,
                                     const struct perta_canonical_rows *rows);

#endif
