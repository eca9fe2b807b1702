#include "stream/patch/chain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

const struct perta_patch_entry *perta_chain_entry(const struct perta_chain *chain, uint32_t k,
                                                  uint32_t shard, uint64_t tensor,
                                                  uint64_t first_unit)
{
    const struct perta_patch *patch = chain->patches[k].shards[shard].patch;
    uint64_t first = chain->starts[k * chain->after.n_tensors + tensor];
    return &patch->entries[first + first_unit / PERTA_CHUNK_ELEMS];
}

/* ---- checking ---- */

/* A tensor of a that b does not have, or has with another dtype or shape; NULL if there is none.
 * Slow; for errors. */
static const struct perta_tensor *unmatched(const struct perta_header *a,
                                            const struct perta_header *b)
{
    for (uint64_t i = 0, j; i < a->n_tensors; i++) {
        for (j = 0; j < b->n_tensors && !perta_tensor_same(&a->tensors[i], &b->tensors[j]);)
            j++;
        if (j == b->n_tensors)
            return &a->tensors[i];
    }
    return NULL;
}

static int check_shard(const struct perta_patch_in_shard *from,
                       const struct perta_patch_in_shard *to, struct perta_err *err)
{
    const struct perta_header *a = from->patch->after, *b = to->patch->before;
    if (perta_header_same(a, b))
        return 0;
    const struct perta_tensor *tensor = unmatched(a, b);
    if (!tensor)
        tensor = unmatched(b, a);
    if (tensor)
        return perta_fail(err, PERTA_ECHECK,
                          "%s does not follow %s: tensor %s is in one of them only, or differs "
                          "in dtype or shape",
                          to->path, from->path, tensor->name);
    return perta_fail(err, PERTA_ECHECK,
                      "%s does not follow %s: the same tensors, but headers that differ in order "
                      "or metadata: digest %016llx, the one before leads to %016llx",
                      to->path, from->path, (ull)perta_hash64(b->bytes, b->len_bytes),
                      (ull)perta_hash64(a->bytes, a->len_bytes));
}

static int check_shards(const struct perta_patch_in *from, const struct perta_patch_in *to,
                        struct perta_err *err)
{
    for (uint32_t i = 0; i < from->n_shards || i < to->n_shards; i++) {
        const char *a = i < from->n_shards ? from->shards[i].name : "none";
        const char *b = i < to->n_shards ? to->shards[i].name : "none";
        /* A shard may really be called "none". */
        if (i >= from->n_shards || i >= to->n_shards || strcmp(a, b))
            return perta_fail(err, PERTA_ECHECK,
                              "%s does not follow %s: shard %u is %s, in the one before %s",
                              to->path, from->path, i + 1, b, a);
        int rc = check_shard(&from->shards[i], &to->shards[i], err);
        if (rc)
            return rc;
    }
    return 0;
}

static int check_chunk(const struct perta_chain *chain, uint32_t k, const struct perta_chunk_at *at,
                       struct perta_err *err)
{
    uint64_t made =
        perta_chain_entry(chain, k - 1, at->shard, at->index, at->first_unit)->hash_after;
    uint64_t wanted =
        perta_chain_entry(chain, k, at->shard, at->index, at->first_unit)->hash_before;
    if (made == wanted)
        return 0;
    return perta_fail(err, PERTA_ECHECK,
                      "%s does not follow %s: tensor %s, elements %llu to %llu: it starts from "
                      "digest %016llx, the one before leads to %016llx; is the order right?",
                      chain->patches[k].shards[at->shard].path,
                      chain->patches[k - 1].shards[at->shard].path, at->info->name,
                      (ull)at->first_unit, (ull)(at->first_unit + at->n_units - 1), (ull)wanted,
                      (ull)made);
}

static int check_chunks(const struct perta_chain *chain, struct perta_err *err)
{
    struct perta_walk walk = {.ck = &chain->after};
    struct perta_chunk_at at;
    while (perta_walk_next(&walk, &at))
        for (uint32_t k = 1; k < chain->n; k++) {
            int rc = check_chunk(chain, k, &at, err);
            if (rc)
                return rc;
        }
    return 0;
}

/* ---- opening ---- */

static int view_model(const struct perta_patch_in *patch, bool after, struct perta_checkpoint *ck,
                      struct perta_err *err)
{
    *ck = (struct perta_checkpoint){.path = patch->path, .n_shards = patch->n_shards};
    ck->shards = calloc(patch->n_shards + 1, sizeof *ck->shards);
    if (!ck->shards)
        return perta_fail_sys(err, ENOMEM, "%s", patch->path);
    for (uint32_t i = 0; i < patch->n_shards; i++) {
        const struct perta_patch_in_shard *shard = &patch->shards[i];
        struct perta_header *header = after ? shard->patch->after : shard->patch->before;
        ck->shards[i] = (struct perta_shard){
            .name = shard->name,
            .path = shard->path,
            .header = header,
            .size_bytes = header->file_len_bytes,
        };
        ck->n_tensors += header->n_tensors;
    }
    return 0;
}

static int find_starts(struct perta_chain *chain, struct perta_err *err)
{
    uint64_t n_tensors = chain->after.n_tensors;
    chain->starts = calloc(chain->n * n_tensors + 1, sizeof *chain->starts);
    int rc = chain->starts ? 0 : perta_fail_sys(err, ENOMEM, "tables of the patches");
    uint64_t *to = chain->starts;
    for (uint32_t k = 0; k < chain->n && !rc; k++)
        for (uint32_t i = 0; i < chain->after.n_shards && !rc; i++) {
            const struct perta_header *header = chain->after.shards[i].header;
            rc = perta_patch_in_starts(&chain->patches[k].shards[i], header, to, err);
            to += header->n_tensors;
        }
    return rc;
}

int perta_chain_open(struct perta_chain *chain, const char *const *paths, uint32_t n,
                     struct perta_err *err)
{
    int rc = 0;
    chain->patches = calloc(n, sizeof *chain->patches);
    if (!chain->patches)
        return perta_fail_sys(err, ENOMEM, "%u patches", n);
    for (chain->n = 0; chain->n < n && !rc; chain->n++) {
        struct perta_patch_in *patch = &chain->patches[chain->n];
        rc = perta_patch_in_open(patch, paths[chain->n], err);
        if (!rc)
            rc = perta_patch_in_refuse_one_way(
                patch, "it cannot be composed; compose reversible patches of the same models", err);
        if (!rc && chain->n)
            rc = check_shards(patch - 1, patch, err);
    }
    if (!rc)
        rc = view_model(&chain->patches[0], false, &chain->before, err);
    if (!rc)
        rc = view_model(&chain->patches[n - 1], true, &chain->after, err);
    if (!rc)
        rc = find_starts(chain, err);
    return rc ? rc : check_chunks(chain, err);
}

void perta_chain_close(struct perta_chain *chain)
{
    for (uint32_t k = 0; k < chain->n; k++)
        perta_patch_in_close(&chain->patches[k]);
    free(chain->patches);
    free(chain->before.shards);
    free(chain->after.shards);
    free(chain->starts);
    *chain = (struct perta_chain){0};
}
