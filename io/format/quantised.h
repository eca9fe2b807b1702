/* quantised.h - checkpoints whose weights are codes, with scales beside them: FP8, MXFP4, GPTQ,
 * AWQ, bitsandbytes, compressed-tensors and their like. Arithmetic on what is stored would move the
 * scales and leave the codes. Spec: docs/method.md, "Quantised checkpoints" */
#ifndef PERTA_IO_FORMAT_QUANTISED_H
#define PERTA_IO_FORMAT_QUANTISED_H

#include "io/format/checkpoint.h"

/* PERTA_EINPUT, naming config.json's key, the file or the tensors that say so, and what to do, if
 * ck holds quantised weights; else 0. Configs get lost, so tensors are looked at too: codes are
 * integers named as a weight, and integers or 8-bit floats that have scales in their own module.
 * Buffers of integers (positions, masks, counts) and 8-bit floats without scales are none. */
PERTA_API int perta_quantised_refuse(const struct perta_checkpoint *ck, struct perta_err *err);

#endif
