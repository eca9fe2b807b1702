/* patch.h - the container of one shard's patch, NAME.perta: a legal multi-frame Zstandard file.
 * Spec: docs/patch-format.md.
 *
 *   skippable frame: head (the shard's safetensors header before; and after, if it differs)
 *   zstd frames, one for each chunk that changed, in order of the table
 *   skippable frame: table (one entry for each chunk) and its digest
 *
 * These functions work on memory, and parse input that may be hostile. Files are the caller's. */
#ifndef PERTA_IO_FORMAT_PATCH_H
#define PERTA_IO_FORMAT_PATCH_H

#include <stdint.h>

#include "io/err.h"
#include "io/format/codec.h"
#include "io/format/safetensors.h"

#define PERTA_PATCH_SUFFIX ".perta"
#define PERTA_PATCH_VERSION 1u

/* The table's entry for one chunk: PERTA_CHUNK_ELEMS units of one tensor, or the rest at its
 * end. */
struct perta_patch_entry {
    uint64_t frame_off; /* from the start of the file; 0 for PERTA_ENC_ZERO */
    uint32_t frame_bytes;
    uint32_t payload_bytes;
    uint32_t tensor;  /* index in the header after, in order of off_bytes */
    uint32_t n_units; /* perta_dtype_unit_bytes each */
    enum perta_encoding encoding;
    uint64_t hash_before; /* XXH3-64 of the chunk's bytes before and after */
    uint64_t hash_after;
};

struct perta_patch {
    struct perta_header *before;
    struct perta_header *after;        /* the same pointer as before if the headers are the same */
    struct perta_patch_entry *entries; /* (n_entries): by tensor of after, then by chunk */
    uint64_t n_entries;
    uint64_t head_bytes; /* length of the head frame; the first chunk's frame follows */
    uint64_t table_off;  /* where the table frame starts */
    uint64_t file_bytes;
};

/* Length of the head frame for a shard. */
uint64_t perta_patch_head_bytes(const struct perta_header *before,
                                const struct perta_header *after);
/* Build the head frame for a shard. after may be the same as before. The caller frees *bytes. */
PERTA_API int perta_patch_head_build(const struct perta_header *before,
                                     const struct perta_header *after, uint8_t **bytes,
                                     uint64_t *len_bytes, struct perta_err *err);

/* Build the table frame, which ends the file. The caller frees *bytes. */
PERTA_API int perta_patch_table_build(const struct perta_patch_entry *entries, uint64_t n,
                                      uint8_t **bytes, uint64_t *len_bytes, struct perta_err *err);

/* Parse the patch of a shard, whole in memory or mapped. Checks everything except the chunks'
 * frames: magic, version, both headers (whose tensors must agree in name, dtype and shape), that
 * entries cover every tensor of after exactly, in order, with PERTA_CHUNK_ELEMS units each, that
 * frames are laid out from head to table without holes, and the digests of head and table. path is
 * for messages. PERTA_EINPUT for another format or version, PERTA_ECHECK for a damaged one. */
PERTA_API int perta_patch_parse(const uint8_t *bytes, uint64_t len_bytes, const char *path,
                                struct perta_patch **out, struct perta_err *err);

/* The same for an open file; reads only head and table. If damage is NULL, any damage is an error.
 * Else a wrong digest of head or table is reported there and parsing continues, so that the frames
 * can be checked if everything else is consistent. */
PERTA_API int perta_patch_read(int fd, uint64_t file_bytes, const char *path,
                               struct perta_err *damage, struct perta_patch **out,
                               struct perta_err *err);

PERTA_API void perta_patch_free(struct perta_patch *patch);

#endif
