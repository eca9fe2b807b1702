/* dequantise.h - quantised weights as the numbers that they stand for. A checkpoint whose weights
 * are codes with scales beside them is turned into one that looks dequantised: names, dtypes and
 * shapes are those that transformers has after dequantising. Its tensors are formed from codes and
 * scales, some elements at a time. Spec: docs/dequantize.md */
#ifndef PERTA_IO_FORMAT_DEQUANTISE_H
#define PERTA_IO_FORMAT_DEQUANTISE_H

#include "io/format/checkpoint.h"

enum perta_coding {
    PERTA_CODING_NONE,  /* stored as it is */
    PERTA_CODING_E4M3,  /* FP8, one scale for each block of rows and columns */
    PERTA_CODING_MXFP4, /* E2M1 in blocks of 32 along the rows, stored transposed */
};

/* How a tensor of the dequantised checkpoint is stored. */
struct perta_quant {
    enum perta_coding coding;
    enum perta_dtype dtype; /* once dequantised */
    /* Of the product of code and scale, before it is rounded to dtype; F32: none. */
    enum perta_dtype first;
    uint32_t shard, scale_shard;
    struct perta_tensor codes, scale; /* as stored; names and shapes are the checkpoint's */
    uint64_t rows, cols;              /* of each of its matrices, as stored */
    uint64_t block_rows, block_cols;  /* that share a scale */
    uint64_t grid_rows, grid_cols;    /* scales of a matrix */
    bool is_shared;                   /* there is one scale for all matrices */
};

struct perta_dequantise {
    struct perta_quant **shards; /* (n_shards), each in order of the dequantised header */
    uint32_t n_shards;
    uint64_t n_coded;   /* tensors that are dequantised */
    uint64_t n_scales;  /* tensors of scales, which are gone from the checkpoint */
    uint64_t n_dropped; /* scales of activations and of the KV cache, which are gone too */
};

/* Turn ck into the dequantised checkpoint: by_name and the tensors of its headers change, but the
 * headers' bytes, config and files stay as stored. *out describes the storage, and is the
 * caller's; it refers to ck. If ck holds no quantised weights, *out is NULL and nothing changes.
 * PERTA_EINPUT, naming key or tensor, if the weights are quantised in a way that is not known, if
 * scales are missing or do not fit, or if tensors are there that belong to another format. After an
 * error ck can only be closed. */
int perta_dequantise_open(struct perta_checkpoint *ck, struct perta_dequantise **out,
                          struct perta_err *err);
void perta_dequantise_close(struct perta_dequantise *d);

/* The storage of a tensor of the dequantised checkpoint. Borrowed. */
const struct perta_quant *perta_dequantise_find(const struct perta_dequantise *d,
                                                const struct perta_checkpoint *ck,
                                                const struct perta_ref *ref);

/* Elements that can be formed at a time: any number, or of MXFP4 whole multiples of this (a matrix
 * of the tensor), beginning at such a multiple. */
uint64_t perta_quant_unit(const struct perta_quant *coded);

/* Bytes of a tensor, from its file's start. */
struct perta_extent {
    uint32_t shard;
    uint64_t off_bytes, len_bytes;
};

/* Which codes and which scales are needed for elements first .. first + n - 1, n > 0 (of MXFP4: of
 * one unit). */
void perta_quant_need(const struct perta_quant *coded, uint64_t first, uint64_t n,
                      struct perta_extent *codes, struct perta_extent *scales);

/* Form elements first .. first + n - 1 in coded->dtype, from what perta_quant_need asked for.
 * PERTA_EINPUT, naming the tensor and its element, if one is not finite. ck is for messages. */
int perta_quant_form(const struct perta_quant *coded, uint64_t first, uint64_t n,
                     const uint8_t *codes, const uint8_t *scales, void *to,
                     const struct perta_checkpoint *ck, struct perta_err *err);

#endif
