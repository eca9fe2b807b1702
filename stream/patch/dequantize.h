/* dequantize.h - write a checkpoint of quantised weights as one of BF16. Spec: docs/dequantize.md */
#ifndef PERTA_STREAM_PATCH_DEQUANTIZE_H
#define PERTA_STREAM_PATCH_DEQUANTIZE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_dequantize {
    const char *model, *out; /* folders */
    bool force;              /* replace outputs that exist */
};

/* Write model, whose weights are FP8 or MXFP4, to out: the same shards with dequantised weights, an
 * index, config.json without its quantization_config, and copies of the other files. The folder
 * appears complete or not at all; an interrupted run can be resumed. The caller releases *summary
 * (read_bytes, written_bytes, dtype, dequantised and dropped tensors, shards, left_behind).
 * PERTA_EUSAGE, PERTA_EINPUT (naming key or tensor, also if model is not quantised), PERTA_ESYS. */
PERTA_API int perta_dequantize(const struct perta_dequantize *dequantize,
                               const struct perta_run *run, json_t **summary,
                               struct perta_err *err);

#endif
