/* tied.h - embeddings that are tied, of which a checkpoint stores both names. */
#ifndef PERTA_IO_FORMAT_TIED_H
#define PERTA_IO_FORMAT_TIED_H

#include "io/format/checkpoint.h"

/* Where config.json says that embedding and head are tied and both are stored: are they the same,
 * byte for byte? PERTA_EINPUT, naming the folder and both tensors, if not: which of them is meant
 * the files do not say. 0 too where at most one of them is stored, or where they are not tied.
 * Reads both, where both are there, through 1 MiB of memory. */
PERTA_API int perta_tied_check(const struct perta_checkpoint *ck, struct perta_err *err);

/* Are tensor a of ck and b of the other, whatever their names, of one dtype and shape, and the same
 * byte for byte? Reads both through 1 MiB of memory, unless dtype or shape differ. */
int perta_tied_compare(const struct perta_checkpoint *ck, const struct perta_ref *a,
                       const struct perta_checkpoint *other, const struct perta_ref *b, bool *same,
                       struct perta_err *err);

#endif
