/* dequantised.h - quantised weights as a source of tensors: each is dequantised as it is read.
 * Spec: docs/dequantize.md */
#ifndef PERTA_ESTIMATORS_MODEL_DEQUANTISED_H
#define PERTA_ESTIMATORS_MODEL_DEQUANTISED_H

#include "estimators/model/source.h"
#include "io/format/dequantise.h"

struct perta_dequantised {
    struct perta_source source;   /* first member */
    struct perta_dequantise *how; /* NULL: the weights are stored as they are */
    uint64_t codes_bytes;         /* of source.room; scales are behind */
    const struct perta_checkpoint *ck;
};

/* If ck is quantised, turn it into the dequantised checkpoint (perta_dequantise_open), whose
 * tensors the source then forms. ck is borrowed. The caller calls perta_dequantised_close, also on
 * error. */
int perta_dequantised_open(struct perta_dequantised *d, struct perta_checkpoint *ck,
                           struct perta_err *err);
void perta_dequantised_close(struct perta_dequantised *d);

/* Bytes that a tensor of the dequantised checkpoint takes in the files. */
uint64_t perta_dequantised_stored(const struct perta_dequantised *d, const struct perta_ref *ref);

#endif
