/* quantised.h - recognise checkpoints whose weights are codes with scales beside them: FP8, MXFP4,
 * GPTQ, AWQ, bitsandbytes, compressed-tensors and the like. Arithmetic on such files would change
 * the scales and leave the codes. Spec: docs/method.md, "Quantised checkpoints" */
#ifndef PERTA_IO_FORMAT_QUANTISED_H
#define PERTA_IO_FORMAT_QUANTISED_H

#include "io/format/checkpoint.h"

/* PERTA_EINPUT if ck holds quantised weights, else 0. The message names the key of config.json, the
 * file or the tensors that say so, and what to do. Configs get lost, so tensors are examined too:
 * integers named as weights are codes, and so are integers or 8-bit floats with scales in their
 * module. Integer buffers (positions, masks, counts) and 8-bit floats without scales are not. */
PERTA_API int perta_quantised_refuse(const struct perta_checkpoint *ck, struct perta_err *err);
/* The same whatever config.json says. */
int perta_quantised_refuse_tensors(const struct perta_checkpoint *ck, struct perta_err *err);

#endif
