/* cache.h - keys and values of the tokens of sequences that are continued (generation): a token
 * that is added computes its own alone, and attends to those that are kept. They are in the
 * backend's memory if there is room, else in scratch files (store.h). */
#ifndef PERTA_ESTIMATORS_MODEL_CACHE_H
#define PERTA_ESTIMATORS_MODEL_CACHE_H

#include "estimators/model/part.h"
#include "estimators/model/store.h"

/* A sequence. */
struct perta_cached {
    uint64_t first;        /* of its tokens, in the pass that computes those that are kept first */
    uint32_t n;            /* tokens that are kept so far */
    uint32_t most;         /* that can be */
    uint64_t keys, values; /* where its keys (most) and values (most) begin in a store: floats */
};

struct perta_cache {
    struct perta_past_tokens past; /* first member: layers attend through it (part.h) */
    const struct perta_llm *llm;   /* borrowed */
    struct perta_backend *be;      /* borrowed */
    struct perta_cached *of;       /* (n) sequences, in the order of their first tokens */
    uint64_t n;
    uint32_t longest;         /* the most tokens that a sequence can have */
    uint64_t n_floats;        /* of all keys and values */
    struct perta_store *kept; /* (n_layers), each (n_floats, 1) */
    uint32_t room;            /* buffer for what is read from a file, of perta_cache_room_bytes */
    struct perta_past *pasts; /* (n), of a batch */
    const uint32_t
        *continues; /* (tokens of the pass): the sequence that each is added to. Borrowed;
                                  set before each pass that adds tokens */
};

/* Lay out keys and values of sequences: of, an array (n) from malloc that the cache takes over, says first,
 * n and most of each. The caller calls perta_cache_close, also on error. */
int perta_cache_plan(struct perta_cache *cache, const struct perta_llm *llm,
                     struct perta_cached *of, uint64_t n, struct perta_err *err);
/* Bytes of the buffer that is allocated besides stores, and of the heap. */
uint64_t perta_cache_room_bytes(const struct perta_cache *cache);
uint64_t perta_cache_heap_bytes(const struct perta_cache *cache);
/* Open the stores. */
int perta_cache_open(struct perta_cache *cache, struct perta_scratch *scratch,
                     struct perta_err *err);
/* NULL scratch: nothing was opened. */
void perta_cache_close(struct perta_cache *cache, struct perta_scratch *scratch);

/* Keep the keys and values of a layer that a forward pass computed for the sequences whose first
 * tokens are in the batch. */
int perta_cache_keep(struct perta_cache *cache, uint32_t layer, const struct perta_batch *batch,
                     const struct perta_acts *acts, struct perta_err *err);
/* Every layer has added one token to each sequence of continues (n): count them. */
void perta_cache_added(struct perta_cache *cache, size_t n);

#endif
