/* patch_out_own.h - what the files of patch_out.h share: patch_out.c (writing) and
 * patch_out_resume.c (the state at a commit point). */
#ifndef PERTA_STREAM_PATCH_PATCH_OUT_OWN_H
#define PERTA_STREAM_PATCH_PATCH_OUT_OWN_H

#include "stream/patch/patch_out.h"

/* The name of a shard's file in the patch. The caller's; NULL only when out of memory. */
char *perta_patch_out_name(const char *shard);
/* Make room for the entries of the current shard, and for at least `least`. Entries that are there
 * are kept. False only when out of memory. */
bool perta_patch_out_room(struct perta_patch_out *p, uint64_t least);

#endif
