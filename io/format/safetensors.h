/* safetensors.h - the header of a safetensors file: parse it, build it.
 * Spec: docs/safetensors.md (the whole format, and where we are stricter than the reference).
 *
 * A file is 8 bytes of little-endian header length N, N bytes of JSON, then the data. */
#ifndef PERTA_IO_FORMAT_SAFETENSORS_H
#define PERTA_IO_FORMAT_SAFETENSORS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"
#include "io/format/dtype.h"

#define PERTA_HEADER_MAX_BYTES 100000000u

struct perta_words;

struct perta_tensor {
    char *name;
    enum perta_dtype dtype;
    uint32_t n_dims;
    uint64_t *shape;    /* (n_dims); may be NULL for a scalar */
    uint64_t n_elems;   /* product of shape; 1 for a scalar */
    uint64_t off_bytes; /* from the start of the file */
    uint64_t len_bytes;
};

struct perta_header {
    struct perta_tensor *tensors; /* (n_tensors), in order of off_bytes, then as in the JSON */
    uint64_t n_tensors;
    struct perta_words *words; /* what names and shapes lie in */
    json_t *metadata;          /* "__metadata__", string to string; NULL where there is none */
    uint8_t *bytes;            /* the header as it stands in the file, length prefix included */
    uint64_t len_bytes;        /* of bytes: where the data starts */
    uint64_t file_len_bytes;
};

/* Parse the header of a file of file_len_bytes bytes from its first len_bytes bytes, which must
 * hold the whole header (8 + N). path is for messages only. *out is the caller's, freed with
 * perta_header_free. Errors: PERTA_EINPUT, naming path, tensor and byte; PERTA_ESYS. */
PERTA_API int perta_safetensors_parse(const uint8_t *bytes, uint64_t len_bytes,
                                      uint64_t file_len_bytes, const char *path,
                                      struct perta_header **out, struct perta_err *err);

/* Read and parse the header of the open file fd (regular, checked by the caller). */
PERTA_API int perta_safetensors_read(int fd, uint64_t file_len_bytes, const char *path,
                                     struct perta_header **out, struct perta_err *err);

/* Build the header of a new file: tensors (n) laid out in the order given, without holes;
 * off_bytes and len_bytes of each are set. metadata may be NULL. The data starts at a multiple
 * of 8 bytes (the JSON is padded with spaces). *bytes is the caller's, freed with free(). */
PERTA_API int perta_safetensors_build(struct perta_tensor *tensors, uint64_t n,
                                      const json_t *metadata, uint8_t **bytes, uint64_t *len_bytes,
                                      struct perta_err *err);

/* The same tensors (n) in order of their names; the caller's (free). NULL without memory. */
const struct perta_tensor **perta_tensors_by_name(const struct perta_tensor *tensors, uint64_t n);
/* to has tensors of the same names as from, in any order: for each tensor of from (n_tensors) that
 * of to; the caller's (free). NULL without memory. */
const struct perta_tensor **perta_header_match(const struct perta_header *from,
                                               const struct perta_header *to);
/* Memory that perta_header_match takes of headers of n tensors, while it works. */
#define PERTA_MATCH_BYTES(n) (4 * (uint64_t)(n) * sizeof(void *))
/* Have all of them names of their own? If not, *twice is one that two have (borrowed), or NULL
 * without memory. */
bool perta_tensors_differ(const struct perta_tensor *tensors, uint64_t n, const char **twice);
/* The same bytes, of files of one length. */
PERTA_API bool perta_header_same(const struct perta_header *a, const struct perta_header *b);
/* The same name, dtype and shape, wherever they lie. */
PERTA_API bool perta_tensor_same(const struct perta_tensor *a, const struct perta_tensor *b);

PERTA_API void perta_header_free(struct perta_header *header);

#endif
