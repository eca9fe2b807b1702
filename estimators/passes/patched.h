/* patched.h - a source of weights: a model with a patch applied, chunk by chunk, as it is read.
 * Every chunk is checked against the patch's digests, before and after, as in perta_apply. */
#ifndef PERTA_ESTIMATORS_PASSES_PATCHED_H
#define PERTA_ESTIMATORS_PASSES_PATCHED_H

#include "estimators/model/source.h"
#include "stream/patch/patch_in.h"

struct perta_patched {
    struct perta_source source; /* first member */
    struct perta_patch_in patch;
    struct perta_codec *codec;
    uint64_t **
        starts; /* (n_shards, n_tensors): index of each tensor's first entry in the patch's table */
    uint64_t chunk_bytes, frame_bytes; /* of the largest */

    const struct perta_patch_entry *entry; /* the last chunk that was read; NULL: none */
    const uint8_t *after;                  /* its bytes, in room */
};

/* Open a patch on the model ck, which is borrowed. PERTA_ECHECK if it was made for another. The
 * caller calls perta_patched_close, also on error; a zeroed struct is allowed there. */
int perta_patched_open(struct perta_patched *patched, const char *path,
                       const struct perta_checkpoint *ck, struct perta_err *err);
void perta_patched_close(struct perta_patched *patched);

#endif
