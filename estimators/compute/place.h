/* place.h - the position of a token, and which tokens it attends to. Follows from the data alone
 * (samples.h). */
#ifndef PERTA_ESTIMATORS_COMPUTE_PLACE_H
#define PERTA_ESTIMATORS_COMPUTE_PLACE_H

#include <stdint.h>

struct perta_place {
    uint32_t position; /* for the rotary embedding */
    /* index among all tokens of its line, those that were left out too: windows and chunks count by it */
    uint32_t at;
    /* it sees the tokens first .. end of its sample; none if these are equal */
    uint32_t first, end;
    /* its line is so long that the rotary positions of some models have other frequencies there */
    bool is_long;
};

#endif
