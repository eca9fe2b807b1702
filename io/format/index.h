/* index.h - model.safetensors.index.json: in which shard each tensor should be. */
#ifndef PERTA_IO_FORMAT_INDEX_H
#define PERTA_IO_FORMAT_INDEX_H

#include <jansson.h>
#include <stddef.h>

#include "io/err.h"

struct perta_index_entry {
    const char *tensor, *shard; /* shard NULL: not a string */
};

struct perta_index {
    struct perta_index_entry *entries; /* (n), of weight_map, sorted by tensor, no two of one */
    size_t n, room;
    char *text;   /* where strings lie if all of it is plain (io/format/plain.h), */
    json_t *tree; /* or here */
};

/* *out is the caller's. PERTA_EINPUT, naming the byte, for what is not JSON or has no weight_map. */
int perta_index_read(const char *path, struct perta_index **out, struct perta_err *err);
void perta_index_free(struct perta_index *index);

#endif
