/* patch_manifest.h - read the manifest.json of a patch folder. Spec: docs/manifest.md */
#ifndef PERTA_IO_FORMAT_PATCH_MANIFEST_H
#define PERTA_IO_FORMAT_PATCH_MANIFEST_H

#include <jansson.h>
#include <stdbool.h>

#include "io/err.h"
#include "io/hash.h"

#define PERTA_PATCH_MANIFEST "manifest.json"

/* Read the manifest.json of the folder dir, and digest it. whole: with its member "tensors", which
 * takes 100 MB for 100,000 tensors. Else that is left out, unless the file is laid out unusually.
 * *manifest is the caller's. PERTA_EINPUT if it is not JSON. */
int perta_patch_manifest_load(const char *dir, bool whole, json_t **manifest,
                              struct perta_digest_hex *hex, struct perta_err *err);
/* Does the manifest say that it belongs to a patch? NULL does not. */
bool perta_patch_manifest_is(const json_t *manifest);

struct perta_patch_manifest_file {
    const char *name; /* (len), as in the text, with escapes */
    size_t len;
};

struct perta_patch_manifest_files {
    char *text;
    bool is_whole; /* the whole text is one JSON object */
    bool is_patch;
    bool short_of_memory;
    struct perta_patch_manifest_file *all; /* (n), from outputs.patch */
    size_t n;
};

/* For a folder that may hold anything: is its manifest.json that of a patch, and which files does
 * it list? Parsed without a tree. Invalid JSON is not an error. Release files on error too. */
int perta_patch_manifest_scan(const char *dir, struct perta_patch_manifest_files *files,
                              struct perta_err *err);
void perta_patch_manifest_release(struct perta_patch_manifest_files *files);

#endif
