/* index.h - model.safetensors.index.json: which shard each tensor should be in. */
#ifndef PERTA_IO_FORMAT_INDEX_H
#define PERTA_IO_FORMAT_INDEX_H

#include <jansson.h>
#include <stddef.h>

#include "io/err.h"

struct perta_index_entry {
    const char *tensor, *shard; /* shard is NULL if it is not a string */
};

struct perta_index {
    struct perta_index_entry *entries; /* (n) of weight_map, sorted by tensor, without duplicates */
    size_t n, room;
    char *text;   /* holds the strings if the whole text is plain (io/format/plain.h); */
    json_t *tree; /* else they are here */
};

/* *out is the caller's. PERTA_EINPUT, naming the byte, if it is not JSON or has no weight_map. */
int perta_index_read(const char *path, struct perta_index **out, struct perta_err *err);
void perta_index_free(struct perta_index *index);

#endif
