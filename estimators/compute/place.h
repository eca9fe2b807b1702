/* place.h - where a token stands, and what it sees. Decided by the data alone (samples.h). */
#ifndef PERTA_ESTIMATORS_COMPUTE_PLACE_H
#define PERTA_ESTIMATORS_COMPUTE_PLACE_H

#include <stdint.h>

struct perta_place {
    uint32_t position; /* by which queries and keys are turned */
    uint32_t at;       /* among all tokens of its line, those left out too: windows count it */
    uint32_t first,
        end; /* it sees the tokens first .. end of its sample; none where they are equal */
};

#endif
