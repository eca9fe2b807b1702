/* safetensors.h - parse and build the header of a safetensors file. Spec: docs/safetensors.md (the
 * whole format, and where perta is stricter than the reference implementation).
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
    struct perta_tensor *tensors; /* (n_tensors), by off_bytes, then as in the JSON */
    uint64_t n_tensors;
    struct perta_words *words; /* memory of names and shapes */
    json_t *metadata;          /* "__metadata__", string to string; NULL if there is none */
    uint8_t *bytes;            /* the header as in the file, with the length prefix */
    uint64_t len_bytes;        /* of bytes; the data starts there */
    uint64_t file_len_bytes;
};

/* Parse the header of a file of file_len_bytes bytes from its first len_bytes bytes, which must
 * hold the whole header (8 + N). path is for messages. Free *out with perta_header_free.
 * PERTA_EINPUT, naming path, tensor and byte; PERTA_ESYS. */
PERTA_API int perta_safetensors_parse(const uint8_t *bytes, uint64_t len_bytes,
                                      uint64_t file_len_bytes, const char *path,
                                      struct perta_header **out, struct perta_err *err);

/* Read and parse the header of the open file fd, which the caller knows to be regular. */
PERTA_API int perta_safetensors_read(int fd, uint64_t file_len_bytes, const char *path,
                                     struct perta_header **out, struct perta_err *err);

/* Build the header of a new file. The tensors (n) are laid out in the order given, without holes;
 * their off_bytes and len_bytes are set. metadata may be NULL. The JSON is padded with spaces so
 * that the data starts at a multiple of 8 bytes. The caller frees *bytes. */
PERTA_API int perta_safetensors_build(struct perta_tensor *tensors, uint64_t n,
                                      const json_t *metadata, uint8_t **bytes, uint64_t *len_bytes,
                                      struct perta_err *err);

/* Pointers to the tensors (n), sorted by name; the caller frees the array. NULL only when out of
 * memory. */
const struct perta_tensor **perta_tensors_by_name(const struct perta_tensor *tensors, uint64_t n);
/* For each tensor of from, the tensor of the same name in to, which has the same names in any
 * order. The caller frees the array (from->n_tensors). NULL only when out of memory. */
const struct perta_tensor **perta_header_match(const struct perta_header *from,
                                               const struct perta_header *to);
/* Memory that perta_header_match needs while it works, for headers of n tensors. */
#define PERTA_MATCH_BYTES(n) (4 * (uint64_t)(n) * sizeof(void *))
/* Do all tensors have different names? If not, *twice is a name that occurs twice (borrowed), or
 * NULL when out of memory. */
bool perta_tensors_differ(const struct perta_tensor *tensors, uint64_t n, const char **twice);
/* Are the headers byte-identical, and the files equally long? */
PERTA_API bool perta_header_same(const struct perta_header *a, const struct perta_header *b);
/* Do they have the same name, dtype and shape? Offsets do not matter. */
PERTA_API bool perta_tensor_same(const struct perta_tensor *a, const struct perta_tensor *b);

PERTA_API void perta_header_free(struct perta_header *header);

#endif
