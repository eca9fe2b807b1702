/* patch.h - the container of one shard's patch, NAME.perta: a legal multi-frame Zstandard file.
 * Spec: docs/patch-format.md.
 *
 *   skippable frame: head (the shard's safetensors header before; and after, where it differs)
 *   zstd frames, one for each chunk that changed, in order of the table
 *   skippable frame: table (one entry for each chunk) and its digest
 *
 * These functions work on memory and parse what may be hostile; files are the caller's. */
#ifndef PERTA_IO_FORMAT_PATCH_H
#define PERTA_IO_FORMAT_PATCH_H

#include <stdint.h>

#include "io/err.h"
#include "io/format/codec.h"
#include "io/format/safetensors.h"

#define PERTA_PATCH_SUFFIX ".perta"
#define PERTA_PATCH_VERSION 1u

/* One chunk: PERTA_CHUNK_ELEMS units of one tensor, or what is left of it at its end. */
struct perta_patch_entry {
    uint64_t frame_off; /* from the start of the file; 0 for PERTA_ENC_ZERO */
    uint32_t frame_bytes;
    uint32_t payload_bytes;
    uint32_t tensor;  /* position in the header after, in order of off_bytes */
    uint32_t n_units; /* perta_dtype_unit_bytes each */
    enum perta_encoding encoding;
    uint64_t hash_before; /* XXH3-64 of the chunk's bytes before and after */
    uint64_t hash_after;
};

struct perta_patch {
    struct perta_header *before;
    struct perta_header *after;        /* same pointer as before where the headers are the same */
    struct perta_patch_entry *entries; /* (n_entries): tensors of after in order, chunks in order */
    uint64_t n_entries;
    uint64_t head_bytes; /* length of the head frame, where the first chunk frame starts */
    uint64_t table_off;  /* where the table frame starts */
    uint64_t file_bytes;
};

/* Length of the head frame for a shard. */
uint64_t perta_patch_head_bytes(const struct perta_header *before,
                                const struct perta_header *after);
/* The head frame for a shard. after may be before. *bytes is the caller's (free). */
PERTA_API int perta_patch_head_build(const struct perta_header *before,
                                     const struct perta_header *after, uint8_t **bytes,
                                     uint64_t *len_bytes, struct perta_err *err);

/* The table frame, to stand at the end of the file. *bytes is the caller's (free). */
PERTA_API int perta_patch_table_build(const struct perta_patch_entry *entries, uint64_t n,
                                      uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err);

/* Parse a patch shard held in memory, or mapped, whole. Checks everything but the chunk frames:
 * magic, version, both headers (tensors of both agree in name, dtype and shape), that entries
 * cover every tensor of after exactly, in order, with PERTA_CHUNK_ELEMS units each, that frames
 * are laid out from head to table without holes, and the table's digest. path for messages.
 * PERTA_EINPUT for another format or version, PERTA_ECHECK for a damaged one. */
PERTA_API int perta_patch_parse(const uint8_t *bytes, uint64_t len_bytes, const char *path,
                                struct perta_patch **out, struct perta_err *err);

/* The same for an open file, reading head and table only. damage NULL: any damage is an error.
 * Else a digest of head or table that differs is written there, and the file is read on, so
 * that its frames can be checked, if all else holds together. */
PERTA_API int perta_patch_read(int fd, uint64_t file_bytes, const char *path,
                               struct perta_err *damage, struct perta_patch **out,
                               struct perta_err *err);

PERTA_API void perta_patch_free(struct perta_patch *patch);

#endif
