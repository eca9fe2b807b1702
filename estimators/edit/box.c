#include "estimators/edit/box.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "io/text.h"
#include "stream/blob.h"

#define RMS "perta.rms"

json_t *perta_box_metadata(const float *rms, uint64_t n)
{
    json_t *metadata = json_pack("{s:s, s:s}", "format", "pt", "perta.stat", "sign");
    perta_json_set(&metadata, RMS, perta_blob_json(rms, n * sizeof *rms));
    return metadata;
}

int perta_box_sizes(const struct perta_checkpoint *ck, double c, float **sizes,
                    struct perta_err *err)
{
    const json_t *metadata = ck->n_shards ? ck->shards[0].header->metadata : NULL;
    uint64_t n = ck->n_tensors;
    *sizes = malloc((n + 1) * sizeof **sizes);
    if (!*sizes)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    if (!perta_blob_get(json_object_get(metadata, RMS), *sizes, n * sizeof **sizes))
        return perta_fail_sys(err, EIO, "%s: " RMS " in the metadata", ck->path);
    for (uint64_t i = 0; i < n; i++) {
        (*sizes)[i] *= (float)c;
        if (!isfinite((*sizes)[i]))
            return perta_fail(err, PERTA_EINPUT,
                              "--model: tensor %s: its root mean square, times the box's size %g, "
                              "is not a finite number",
                              ck->by_name[i].tensor->name, c);
    }
    return 0;
}
