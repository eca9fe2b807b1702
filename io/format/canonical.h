/* canonical.h - JSON with one spelling for each value, so that equal records are equal bytes
 * and can be signed. Spec: docs/manifest.md */
#ifndef PERTA_IO_FORMAT_CANONICAL_H
#define PERTA_IO_FORMAT_CANONICAL_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "io/err.h"

/* The text; the caller's (free). No line break at its end. NULL without memory. jansson's own
 * output will not do: how it spells reals depends on its version. */
PERTA_API char *perta_canonical_json(const json_t *value);

/* A member of an object that is an array, whose items are made one after another while they are
 * written: a tree of the counts of 100,000 tensors takes more memory than many a run. */
struct perta_canonical_rows {
    const char *key; /* the object's own member of that name, whatever it is, keeps its place */
    uint64_t n;
    json_t *(*row)(const void *ctx, uint64_t i); /* item i, given away; NULL without memory */
    const void *ctx;
};
/* Write the same text of an object to a file. false: no memory. Errors of the file are the file's. */
PERTA_API bool perta_canonical_print(FILE *out, const json_t *object,
                                     const struct perta_canonical_rows *rows);

#endif
