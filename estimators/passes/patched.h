/* patched.h - a source of weights: the model after a patch, chunk by chunk, as it is read.
 * Every chunk is checked against the patch's digests before and after, as perta_apply does.
 */
#ifndef PERTA_ESTIMATORS_PASSES_PATCHED_H
#define PERTA_ESTIMATORS_PASSES_PATCHED_H

#include "estimators/model/source.h"
#include "stream/patch/patch_in.h"

struct perta_patched {
    struct perta_source source; /* first: it is this */
    struct perta_patch_in patch;
    struct perta_codec *codec;
    uint64_t **starts; /* (n_shards), each (n_tensors): first entries in the patch's table */
    uint64_t chunk_bytes, frame_bytes; /* of the largest */

    const struct perta_patch_entry *entry; /* the chunk that was read last; NULL: none */
    const uint8_t *after;                  /* its bytes, in room */
};

/* A patch on the model that ck is of; ck is borrowed. PERTA_ECHECK if it is for another.
 * Closed with perta_patched_close, on error too; zeroed is fine. */
int perta_patched_open(struct perta_patched *patched, const char *path,
                       const struct perta_checkpoint *ck, struct perta_err *err);
void perta_patched_close(struct perta_patched *patched);

#endif
