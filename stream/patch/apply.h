/* apply.h - apply a patch to a model, or revert it. Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_PATCH_APPLY_H
#define PERTA_STREAM_PATCH_APPLY_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

enum perta_apply_mode {
    PERTA_APPLY,  /* before -> after */
    PERTA_REVERT, /* after -> before */
};

struct perta_apply {
    const char *model, *patch;
    const char *out; /* folder to write; NULL: edit the model in place */
    enum perta_apply_mode mode;
    bool force;
};

/* Every chunk is checked against the patch's digests before and after. If the patch is for another
 * model, that is PERTA_ECHECK at its first chunk, with both digests. *summary is the caller's, NULL
 * on error.
 *
 * In place, nothing is written until every chunk of the model has been found to be what the patch
 * starts from. Then the chunks that change are written to a write-ahead log in the folder
 * (io/wal.h), and from there to the shards. After a kill at any instant the same call completes the
 * edit, and the other mode reverts it. PERTA_EUSAGE for shards that are links, have several names
 * or may not be written, for a patch that changes headers, and while another process edits the
 * folder. */
PERTA_API int perta_apply(const struct perta_apply *apply, const struct perta_run *run,
                          json_t **summary, struct perta_err *err);

#endif
