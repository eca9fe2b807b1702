/* patch_in.h - a patch folder, opened to read. */
#ifndef PERTA_STREAM_PATCH_PATCH_IN_H
#define PERTA_STREAM_PATCH_PATCH_IN_H

#include <jansson.h>

#include "io/file.h"
#include "io/format/checkpoint.h"
#include "io/format/patch.h"
#include "io/hash.h"
#include "stream/stream.h"

struct perta_patch_in_shard {
    char *name; /* of the model's shard */
    char *file_name, *path;
    struct perta_patch *patch;
    struct perta_file file;
};

struct perta_patch_in {
    char *path;
    json_t *manifest; /* but for what it says of tensors, unless that is written oddly */
    struct perta_digest_hex manifest_digest; /* of manifest.json, as it was read */
    struct perta_patch_in_shard *shards;     /* (n_shards), in order of the manifest: by name */
    uint32_t n_shards;
};

/* Is the folder a patch? (It has a manifest.json that says so.) */
bool perta_patch_in_is_patch(const char *path);

/* Read manifest.json and the table of every file it lists. Zeroed before; close it on error
 * too. PERTA_EINPUT for what is no patch, PERTA_ECHECK for a damaged one. */
int perta_patch_in_open(struct perta_patch_in *in, const char *path, struct perta_err *err);
/* The same, but what is wrong with a file is told to damaged, and the next one is read. The
 * file's patch stays NULL where frames and chunks cannot be told from it. */
int perta_patch_in_open_damaged(struct perta_patch_in *in, const char *path,
                                void (*damaged)(void *ctx, uint32_t shard, const char *message),
                                void *ctx, struct perta_err *err);
/* All of manifest.json, the caller's: it must still be what was read. */
int perta_patch_in_record(const struct perta_patch_in *in, json_t **record, struct perta_err *err);
/* Files whose patch was read; those that are open are opened anew. */
int perta_patch_in_open_files(struct perta_patch_in *in, bool direct, struct perta_err *err);
/* No file changed while it was read. */
int perta_patch_in_unchanged(const struct perta_patch_in *in, struct perta_err *err);
void perta_patch_in_close(struct perta_patch_in *in);

/* Append the paths of all files to *paths (n of *n_paths); the strings stay the patch's. */
int perta_patch_in_paths(const struct perta_patch_in *in, const char ***paths, size_t *n_paths,
                         struct perta_err *err);

/* starts (header->n_tensors): each tensor's first entry in the table. header names the same
 * tensors, in any order; those that are empty have no entry. */
int perta_patch_in_starts(const struct perta_patch_in_shard *shard,
                          const struct perta_header *header, uint64_t *starts,
                          struct perta_err *err);

/* Point range at the chunk's frame; at nothing where the chunk does not change. */
void perta_patch_in_frame(struct perta_patch_in_shard *shard, const struct perta_patch_entry *entry,
                          struct perta_range *range);

/* Forward: from the model before the patch to the one after. Else the way back. */

/* Shards and headers of the model must be those that the patch goes out from; PERTA_ECHECK. */
int perta_patch_in_check_model(const struct perta_patch_in *in,
                               const struct perta_checkpoint *model, bool forward,
                               struct perta_err *err);
/* The chunk that was found in the model at path is not what the patch goes out from: say so,
 * with both digests. first_unit is the chunk's first within its tensor. PERTA_ECHECK. */
int perta_patch_in_wrong_chunk(const struct perta_patch_in_shard *shard,
                               const struct perta_patch_entry *entry, bool forward,
                               const char *path, uint64_t first_unit, uint64_t found,
                               struct perta_err *err);
/* PERTA_EUSAGE, with what cannot be done, for a patch that does not lead back: it has chunks of
 * values only. */
int perta_patch_in_refuse_one_way(const struct perta_patch_in *in, const char *what,
                                  struct perta_err *err);

/* The whole way of one chunk: from, found in the model at path, first_unit within its tensor, must
 * be what the patch goes out from; to gets what it leads to, checked too. Of a chunk that does not
 * change (PERTA_ENC_ZERO) to is left alone. */
int perta_patch_in_lead(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const char *path,
                        uint64_t first_unit, const void *from, void *to, struct perta_err *err);
/* From a chunk's bytes on one side and its frame to those on the other. */
int perta_patch_in_move(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const void *from, void *to,
                        struct perta_err *err);
/* The bytes that it led to must have the table's digest. */
int perta_patch_in_check_made(const struct perta_patch_in_shard *shard,
                              const struct perta_patch_entry *entry, bool forward, const void *made,
                              struct perta_err *err);
/* Bytes of an entry's chunk, and its tensor. */
uint64_t perta_patch_in_chunk_bytes(const struct perta_patch_in_shard *shard,
                                    const struct perta_patch_entry *entry);
const struct perta_tensor *perta_patch_in_tensor(const struct perta_patch_in_shard *shard,
                                                 const struct perta_patch_entry *entry);

#endif
