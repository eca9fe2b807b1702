/* tied.h - tied embeddings of which a checkpoint stores both tensors. */
#ifndef PERTA_IO_FORMAT_TIED_H
#define PERTA_IO_FORMAT_TIED_H

#include "io/format/checkpoint.h"

/* If config.json ties embedding and head and both are stored, they must be byte-identical.
 * PERTA_EINPUT if they differ, naming the folder and both tensors, because the files do not say
 * which one is meant. 0 also if at most one is stored, or they are not tied. Reads both, through 1
 * MiB of memory. */
PERTA_API int perta_tied_check(const struct perta_checkpoint *ck, struct perta_err *err);

/* Do tensor a of ck and tensor b of other have the same dtype and shape, and identical bytes? Names
 * do not matter. Reads both, through 1 MiB of memory, unless dtype or shape differ. */
int perta_tied_compare(const struct perta_checkpoint *ck, const struct perta_ref *a,
                       const struct perta_checkpoint *other, const struct perta_ref *b, bool *same,
                       struct perta_err *err);

#endif
