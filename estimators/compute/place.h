/* place.h - where a token stands, and what it sees. Decided by the data alone (samples.h). */
#ifndef PERTA_ESTIMATORS_COMPUTE_PLACE_H
#define PERTA_ESTIMATORS_COMPUTE_PLACE_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/cut.h"

struct perta_place {
    uint32_t position; /* by which queries and keys are turned */
    uint32_t at;       /* among all tokens of its line, those left out too: windows count it */
    uint32_t first,
        end; /* it sees the tokens first .. end of its sample; none where they are equal */
};

/* Attention within each of a batch's sequences: q, out (n, n_heads, D), k, v (n, n_kv_heads, D);
 * every n_heads / n_kv_heads query heads share one of k and v. A token sees what its place says, but
 * those that stand window or more before it; where that is nothing, out is 0, as PyTorch's
 * scaled_dot_product_attention has it. Tokens that are seen stand in the order of at. */
struct perta_attention {
    struct perta_runs sequences;
    const struct perta_place *places; /* (n) */
    size_t n_heads, n_kv_heads, D;
    uint32_t window; /* UINT32_MAX: all */
};

#endif
