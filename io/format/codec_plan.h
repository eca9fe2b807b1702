/* codec_plan.h - how to lay a chunk's payload out, estimated from a sample of its units.
 * Internal to io/. Any plan is correct; a good one makes a small frame. The same for every
 * CPU. */
#ifndef PERTA_IO_FORMAT_CODEC_PLAN_H
#define PERTA_IO_FORMAT_CODEC_PLAN_H

#include "io/format/codec_kernels.h"
#include "io/format/dtype.h"

/* Units of a sample, at most. */
#define PERTA_SAMPLE_MAX (1u << 15)
/* Exponents told apart, from the largest down. */
#define PERTA_WINDOW 24u

struct perta_codec_plan {
    struct perta_grouping grouping;     /* n 1: not grouped */
    uint8_t low;                        /* bits of z that are written as they are */
    uint8_t bits[PERTA_GROUPS_MAX + 1]; /* of a field, for each group, crossers last */
};

/* Scratch: room for PERTA_SAMPLE_MAX units, or for a chunk if that is less. */
struct perta_codec_sample {
    uint8_t *before, *after, *z;           /* units */
    uint8_t *values, *keys;                /* bytes */
    uint32_t (*counts)[PERTA_WINDOW][256]; /* (2) values of what crosses not, and crosses */
    uint32_t n_counted[2][PERTA_WINDOW];   /* their sums */
};

/* Is the dtype one of sign and magnitude, mapped to ordered integers? */
bool perta_codec_is_ordered(enum perta_dtype dtype);
/* Where its exponent is; e_bits 0 for dtypes that are not grouped. */
struct perta_grouping perta_codec_exponent(enum perta_dtype dtype);

void perta_codec_plan(const struct perta_codec_kernels *kernels, enum perta_dtype dtype,
                      const void *before, const void *after, size_t n,
                      struct perta_codec_sample *sample, struct perta_codec_plan *plan);
/* The plan that bounds what any units take: all bits as they are. */
void perta_codec_plan_raw(enum perta_dtype dtype, struct perta_codec_plan *plan);

#endif
