/* manifest.h - digests of everything in a folder, down to the tensor; and the check against
 * them. Spec: docs/manifest.md */
#ifndef PERTA_STREAM_PATCH_MANIFEST_H
#define PERTA_STREAM_PATCH_MANIFEST_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

/* Digest every regular file of the folder (or the one file) at path. *manifest is the caller's:
 * {"format": "perta-manifest", "version": 1, "files": [{name, bytes, xxh3_128, sha256?,
 * tensors?: [{name, bytes, xxh3_128}]}]}, sorted by name; tensors for safetensors files whose
 * header is sound. with_sha256 false leaves SHA-256 out: faster. skip (may be NULL) is a path
 * that is left out. */
PERTA_API int perta_manifest(const char *path, bool with_sha256, const char *skip,
                             const struct perta_run *run, json_t **manifest, struct perta_err *err);

/* Compare what is there with a manifest, by all digests that it has. *summary (the caller's, also
 * with PERTA_ECHECK) lists under "differences" each file that is missing or differs and, where
 * headers allow, each tensor of it. Files that the manifest does not name are listed under
 * "unlisted". */
PERTA_API int perta_manifest_verify(const char *path, const char *manifest_path,
                                    const struct perta_run *run, json_t **summary,
                                    struct perta_err *err);

/* Check a patch folder: heads, tables, that frames are frames, SHA-256 against its manifest, and
 * where that differs what the frames hold (docs/manifest.md). As above, *summary lists all
 * differences; those of a frame with "first" and "elements" of the tensor beside. */
PERTA_API int perta_patch_verify(const char *path, const struct perta_run *run, json_t **summary,
                                 struct perta_err *err);

/* Is the model what the patch leads to (applied), or what it was made from? Chunks are found by
 * the patch's own record of the layout, so also where the model's headers are damaged. *summary
 * (the caller's, also with PERTA_ECHECK) lists under "damaged" each chunk that differs: shard,
 * tensor, first, elements, message; and each shard that is missing, or whose header or length
 * differs: shard, message. */
PERTA_API int perta_model_verify(const char *model, const char *patch, bool applied,
                                 const struct perta_run *run, json_t **summary,
                                 struct perta_err *err);

#endif
