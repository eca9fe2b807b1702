/* quant_config.h - what config.json says of quantised weights: by which method, in which blocks.
 * Spec: docs/dequantize.md */
#ifndef PERTA_IO_FORMAT_QUANT_CONFIG_H
#define PERTA_IO_FORMAT_QUANT_CONFIG_H

#include <stdbool.h>

#include "io/format/checkpoint.h"

/* How codes and scales are stored and named. */
enum perta_quant_method {
    PERTA_QUANT_FP8,        /* fp8 (DeepSeek's and its like), mxfp8 */
    PERTA_QUANT_FBGEMM,     /* fbgemm_fp8 */
    PERTA_QUANT_COMPRESSED, /* compressed-tensors, float-quantized */
    PERTA_QUANT_MXFP4,      /* mxfp4, as GptOss has it */
};

struct perta_quant_config {
    enum perta_quant_method method;
    uint64_t block[2];      /* rows and columns that share a scale; 0, 0: not said */
    enum perta_dtype dtype; /* that the model's weights have once dequantised: BF16, F16 or F32 */
};

/* Find the first key of config, or of an object in it (text_config, ...), that announces quantised
 * weights, and its *value (borrowed). NULL if there is none; values that are null or empty are none
 * either. config may be NULL. */
const char *perta_quant_config_key(const json_t *config, const json_t **value);

/* Parse what perta_quant_config_key found. PERTA_EINPUT, naming the key and what of it is unknown,
 * if perta cannot dequantise such weights. */
int perta_quant_config_parse(const struct perta_checkpoint *ck, const char *key,
                             const json_t *value, struct perta_quant_config *out,
                             struct perta_err *err);

/* The text of ck's config.json without the keys that announce quantised weights; else it is as in
 * the file. The caller frees *text (len bytes). PERTA_EINPUT if it cannot be cut out, PERTA_ESYS. */
int perta_quant_config_cut(const struct perta_checkpoint *ck, char **text, size_t *len,
                           struct perta_err *err);

#endif
