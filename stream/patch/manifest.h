/* manifest.h - manifests (digests of all files in a folder, down to the tensor), and the checks of
 * folders, patches and models against digests. Spec: docs/manifest.md */
#ifndef PERTA_STREAM_PATCH_MANIFEST_H
#define PERTA_STREAM_PATCH_MANIFEST_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

/* Digest every regular file of the folder (or the one file) at path. *manifest is the caller's:
 * {"format": "perta-manifest", "version": 1, "files": [{name, bytes, xxh3_128, sha256?, tensors?:
 * [{name, bytes, xxh3_128}]}]}, sorted by name, with tensors for safetensors files whose header is
 * valid. Without with_sha256, SHA-256 is left out, which is faster. skip (may be NULL) is a path to
 * leave out. */
PERTA_API int perta_manifest(const char *path, bool with_sha256, const char *skip,
                             const struct perta_run *run, json_t **manifest, struct perta_err *err);

/* Compare the files with a manifest, by all digests that it has. *summary (the caller's, also with
 * PERTA_ECHECK) lists under "differences" each file that is missing or differs and, if headers
 * allow, each of its tensors. Files that the manifest does not name are listed under "unlisted". */
PERTA_API int perta_manifest_verify(const char *path, const char *manifest_path,
                                    const struct perta_run *run, json_t **summary,
                                    struct perta_err *err);

/* Check a patch folder: heads, tables, that every frame is one Zstandard frame, and SHA-256 against
 * its manifest; if that differs, also the content of the frames (docs/manifest.md). *summary, as
 * above, lists all differences; those of a frame have "first" and "elements" of the tensor. */
PERTA_API int perta_patch_verify(const char *path, const struct perta_run *run, json_t **summary,
                                 struct perta_err *err);

/* Check that the model is what the patch leads to (applied), or what it was made from. Chunks are
 * located by the patch's copy of the header, so also if the model's headers are damaged. *summary
 * (the caller's, also with PERTA_ECHECK) lists under "damaged" each chunk that differs (shard,
 * tensor, first, elements, message), and each shard that is missing, or whose header or length
 * differs (shard, message). */
PERTA_API int perta_model_verify(const char *model, const char *patch, bool applied,
                                 const struct perta_run *run, json_t **summary,
                                 struct perta_err *err);

#endif
