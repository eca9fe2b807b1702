#include "estimators/edit/box.h"

#include <errno.h>
#include <stdlib.h>

#include "io/text.h"
#include "stream/blob.h"

#define SIZES "perta.sizes"

json_t *perta_box_metadata(const float *sizes, uint64_t n)
{
    json_t *metadata = json_pack("{s:s, s:s}", "format", "pt", "perta.stat", "sign");
    perta_json_set(&metadata, SIZES, perta_blob_json(sizes, n * sizeof *sizes));
    return metadata;
}

int perta_box_sizes(const struct perta_checkpoint *ck, float **sizes, struct perta_err *err)
{
    const json_t *metadata = ck->n_shards ? ck->shards[0].header->metadata : NULL;
    uint64_t n = ck->n_tensors;
    *sizes = malloc((n + 1) * sizeof **sizes);
    if (!*sizes)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    return perta_blob_get(json_object_get(metadata, SIZES), *sizes, n * sizeof **sizes)
               ? 0
               : perta_fail_sys(err, EIO, "%s: " SIZES " in the metadata", ck->path);
}
