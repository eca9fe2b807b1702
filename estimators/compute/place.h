/* place.h - the position of a token, and which tokens it attends to. Follows from the data alone
 * (samples.h). */
#ifndef PERTA_ESTIMATORS_COMPUTE_PLACE_H
#define PERTA_ESTIMATORS_COMPUTE_PLACE_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/cut.h"

struct perta_place {
    uint32_t position; /* for the rotary embedding */
    /* index among all tokens of its line, those that were left out too: windows count by it */
    uint32_t at;
    /* it sees the tokens first .. end of its sample; none if these are equal */
    uint32_t first, end;
};

/* Attention within each sequence of a batch: q, out (n, n_heads, D), k, v (n, n_kv_heads, D); every
 * n_heads / n_kv_heads query heads share a key-value head. A token sees the tokens that its place
 * says, except those that are window or more before it. If it sees none, out is 0, as with
 * PyTorch's scaled_dot_product_attention. The tokens that are seen are in the order of at. */
struct perta_attention {
    struct perta_runs sequences;
    const struct perta_place *places; /* (n) */
    size_t n_heads, n_kv_heads, D;
    uint32_t window; /* UINT32_MAX: no limit */
};

/* What a token that is added to a sequence sees: n rows of keys, and of values, from these rows on. */
struct perta_past {
    uint64_t keys, values;
    size_t n; /* its own included */
};

/* Attention of one token of each sequence over that sequence's keys and values, which were computed
 * before: q, out (n, n_heads, D); keys and values are rows (n_kv_heads, D) of one array. Heads are
 * shared as in struct perta_attention. */
struct perta_attention_past {
    const struct perta_past *pasts; /* (n) */
    size_t n, n_heads, n_kv_heads, D;
};

#endif
