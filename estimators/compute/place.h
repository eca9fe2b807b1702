/* place.h - the position of a token, and which tokens it attends to. Follows from the data alone
 * (samples.h). */
#ifndef PERTA_ESTIMATORS_COMPUTE_PLACE_H
#define PERTA_ESTIMATORS_COMPUTE_PLACE_H

#include <stdbool.h>
#include <stdint.h>

/* The position of a token that attention_mask hides, where positions count those that are seen. */
#define PERTA_POSITION_HIDDEN UINT32_MAX

/* What a family does with position_ids. */
struct perta_position_ids {
    bool refused;    /* it has none */
    bool no_blocks;  /* positions that start again make no blocks */
    bool count_seen; /* without them, positions count the tokens that attention_mask shows */
};

struct perta_place {
    uint32_t position; /* for the rotary embedding, or the row of learned positions */
    /* index among all tokens of its line, those that were left out too: windows and chunks count by it */
    uint32_t at;
    /* it sees the tokens first .. end of its sample; none if these are equal */
    uint32_t first, end;
    /* its line is so long that the rotary positions of some models have other frequencies there */
    bool is_long;
};

#endif
