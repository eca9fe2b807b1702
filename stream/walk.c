#include "stream/walk.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t units_of(const struct perta_tensor *tensor)
{
    return tensor->len_bytes / perta_dtype_unit_bytes(tensor->dtype);
}

int perta_walk_next(struct perta_walk *walk, struct perta_chunk_at *at)
{
    for (;;) {
        if (walk->shard == walk->ck->n_shards)
            return 0;
        const struct perta_header *header = walk->ck->shards[walk->shard].header;
        if (walk->tensor == header->n_tensors) {
            walk->shard++;
            walk->tensor = 0;
            continue;
        }
        const struct perta_tensor *tensor = &header->tensors[walk->tensor];
        uint64_t left = units_of(tensor) - walk->unit;
        if (!left) {
            walk->tensor++;
            walk->index++;
            walk->unit = 0;
            continue;
        }
        uint64_t width = perta_dtype_unit_bytes(tensor->dtype);
        uint64_t most = walk->chunk_units ? walk->chunk_units : PERTA_CHUNK_ELEMS;
        uint64_t n = left < most ? left : most;
        *at = (struct perta_chunk_at){
            .shard = walk->shard,
            .tensor = (uint32_t)walk->tensor,
            .index = walk->index,
            .info = tensor,
            .first_unit = walk->unit,
            .n_units = n,
            .off_bytes = walk->unit * width,
            .len_bytes = n * width,
        };
        walk->unit += n;
        return 1;
    }
}

int perta_walk_piece(struct perta_walk *walk, struct perta_chunk_at *at, struct perta_piece *piece)
{
    if (!perta_walk_next(walk, at))
        return 0;
    piece->shard = at->shard;
    piece->tensor = at->tensor;
    piece->tag = at->index;
    piece->first_elem = at->first_unit;
    piece->n_elems = at->n_units;
    return 1;
}

bool perta_walk_is_place(const struct perta_header *header, uint64_t tensor, uint64_t unit,
                         uint64_t chunk_units)
{
    uint64_t most = chunk_units ? chunk_units : PERTA_CHUNK_ELEMS;
    if (tensor >= header->n_tensors)
        return false;
    uint64_t all = units_of(&header->tensors[tensor]);
    return unit && (unit == all || (unit < all && unit % most == 0));
}

bool perta_walk_to(struct perta_walk *walk, uint32_t shard, uint64_t tensor, uint64_t unit)
{
    if (shard >= walk->ck->n_shards ||
        !perta_walk_is_place(walk->ck->shards[shard].header, tensor, unit, walk->chunk_units))
        return false;
    walk->shard = shard;
    walk->tensor = walk->index = tensor;
    walk->unit = unit;
    for (uint32_t s = 0; s < shard; s++)
        walk->index += walk->ck->shards[s].header->n_tensors;
    return true;
}

uint64_t perta_walk_chunk_bytes(const struct perta_tensor *tensor)
{
    uint64_t chunk = (uint64_t)PERTA_CHUNK_ELEMS * perta_dtype_unit_bytes(tensor->dtype);
    return tensor->len_bytes < chunk ? tensor->len_bytes : chunk;
}

struct perta_codec **perta_codecs_new(unsigned n, uint64_t chunk_bytes, struct perta_err *err)
{
    struct perta_codec **codecs = calloc(n + 1u, sizeof *codecs);
    for (unsigned i = 0; codecs && i < n; i++)
        if (!(codecs[i] = perta_codec_new(chunk_bytes))) {
            perta_codecs_free(codecs);
            codecs = NULL;
        }
    if (!codecs)
        perta_fail_sys(err, ENOMEM, "codecs");
    return codecs;
}

void perta_codecs_free(struct perta_codec **codecs)
{
    for (unsigned i = 0; codecs && codecs[i]; i++)
        perta_codec_free(codecs[i]);
    free(codecs);
}
