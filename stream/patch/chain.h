/* chain.h - a chain of patches, each made from the model that the one before leads to. Spec:
 * docs/patch-format.md
 *
 * Owns: the patches. Threads: functions that take a const chain may be called by any number of
 * threads. */
#ifndef PERTA_STREAM_PATCH_CHAIN_H
#define PERTA_STREAM_PATCH_CHAIN_H

#include "stream/patch/patch_in.h"
#include "stream/walk.h"

struct perta_chain {
    struct perta_patch_in *patches; /* (n) */
    uint32_t n;
    /* The models before the first and after the last patch: only names and headers of their shards,
     * borrowed from the patches. */
    struct perta_checkpoint before, after;
    uint64_t *starts; /* (n, after.n_tensors): first entry of each tensor, in the order of after */
};

/* Read head and table of each patch (n, at least one), and check that each starts from where the
 * one before it ends: the same shards with the same headers, and the same digest for each chunk.
 * PERTA_ECHECK names patch, tensor and elements. chain must be zeroed before; close it on error
 * too. */
int perta_chain_open(struct perta_chain *chain, const char *const *paths, uint32_t n,
                     struct perta_err *err);
void perta_chain_close(struct perta_chain *chain);

/* The entry of patch k for a chunk of after. tensor counts over all shards, first_unit within the
 * tensor. */
const struct perta_patch_entry *perta_chain_entry(const struct perta_chain *chain, uint32_t k,
                                                  uint32_t shard, uint64_t tensor,
                                                  uint64_t first_unit);

#endif
