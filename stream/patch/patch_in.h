/* patch_in.h - a patch folder, opened for reading; and its chunks applied or reverted, with all
 * checks. */
#ifndef PERTA_STREAM_PATCH_PATCH_IN_H
#define PERTA_STREAM_PATCH_PATCH_IN_H

#include <jansson.h>

#include "io/file.h"
#include "io/format/checkpoint.h"
#include "io/format/patch.h"
#include "io/hash.h"
#include "stream/stream.h"

struct perta_patch_in_shard {
    char *name; /* the name of the model's shard */
    char *file_name, *path;
    struct perta_patch *patch;
    struct perta_file file;
};

struct perta_patch_in {
    char *path;
    json_t *manifest; /* without "tensors", unless it is laid out unusually */
    struct perta_digest_hex manifest_digest; /* of manifest.json, as it was read */
    struct perta_patch_in_shard *shards;     /* (n_shards), in the manifest's order: by name */
    uint32_t n_shards;
};

/* Is the folder a patch? (Its manifest.json says so.) */
bool perta_patch_in_is_patch(const char *path);

/* Read manifest.json and the table of every file it lists. Close in on error too. PERTA_EINPUT if
 * it is not a patch, PERTA_ECHECK if it is damaged. */
int perta_patch_in_open(struct perta_patch_in *in, const char *path, struct perta_err *err);
/* The same, but damage to a file is reported to damaged(), and the next file is read. The file's
 * patch stays NULL if its frames and chunks cannot be determined. */
int perta_patch_in_open_damaged(struct perta_patch_in *in, const char *path,
                                void (*damaged)(void *ctx, uint32_t shard, const char *message),
                                void *ctx, struct perta_err *err);
/* Read all of manifest.json; *manifest is the caller's. PERTA_EINPUT if it changed since it was
 * opened. */
int perta_patch_in_manifest(const struct perta_patch_in *in, json_t **manifest,
                            struct perta_err *err);
/* Open the files whose patch was read, reopening those that are open. */
int perta_patch_in_open_files(struct perta_patch_in *in, bool direct, struct perta_err *err);
/* PERTA_EINPUT if a file changed while it was read. */
int perta_patch_in_unchanged(const struct perta_patch_in *in, struct perta_err *err);
void perta_patch_in_close(struct perta_patch_in *in);

/* Append the paths of all files to *paths (*n_paths long). The array is the caller's; the strings
 * stay the patch's. */
int perta_patch_in_paths(const struct perta_patch_in *in, const char ***paths, size_t *n_paths,
                         struct perta_err *err);

/* Set starts (header->n_tensors) to each tensor's first entry in the table. header has the same
 * tensors as the patch, in any order. Empty tensors have no entry. */
int perta_patch_in_starts(const struct perta_patch_in_shard *shard,
                          const struct perta_header *header, uint64_t *starts,
                          struct perta_err *err);

/* Set range to the chunk's frame, or leave it empty if the chunk does not change. */
void perta_patch_in_frame(struct perta_patch_in_shard *shard, const struct perta_patch_entry *entry,
                          struct perta_range *range);

/* In the functions below, forward means from the model before the patch to the one after; else the
 * reverse. */

/* Check that the model has the shards and headers that the patch starts from; else PERTA_ECHECK. */
int perta_patch_in_check_model(const struct perta_patch_in *in,
                               const struct perta_checkpoint *model, bool forward,
                               struct perta_err *err);
/* Fail because a chunk of the model at path is not what the patch starts from: PERTA_ECHECK, with
 * both digests. first_unit is the chunk's first unit within its tensor. */
int perta_patch_in_wrong_chunk(const struct perta_patch_in_shard *shard,
                               const struct perta_patch_entry *entry, bool forward,
                               const char *path, uint64_t first_unit, uint64_t found,
                               struct perta_err *err);
/* PERTA_EUSAGE for a one-way patch (one with chunks of PERTA_ENC_VALUES), which cannot be reverted.
 * what: what cannot be done with it. */
int perta_patch_in_refuse_one_way(const struct perta_patch_in *in, const char *what,
                                  struct perta_err *err);

/* Apply or revert one chunk, with all checks: from (of the model at path, first_unit within its
 * tensor) must be what the patch starts from; to gets what it leads to, which is checked too. If
 * the chunk does not change (PERTA_ENC_ZERO), to is not written. */
int perta_patch_in_lead(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const char *path,
                        uint64_t first_unit, const void *from, void *to, struct perta_err *err);
/* Compute a chunk's bytes on one side from those on the other and its frame, without checks. */
int perta_patch_in_move(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const void *from, void *to,
                        struct perta_err *err);
/* Check that the resulting bytes have the table's digest. */
int perta_patch_in_check_made(const struct perta_patch_in_shard *shard,
                              const struct perta_patch_entry *entry, bool forward, const void *made,
                              struct perta_err *err);
/* The length in bytes of an entry's chunk; and its tensor. */
uint64_t perta_patch_in_chunk_bytes(const struct perta_patch_in_shard *shard,
                                    const struct perta_patch_entry *entry);
const struct perta_tensor *perta_patch_in_tensor(const struct perta_patch_in_shard *shard,
                                                 const struct perta_patch_entry *entry);

#endif
