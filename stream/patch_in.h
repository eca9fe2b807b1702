/* patch_in.h - a patch folder, opened to read. */
#ifndef PERTA_STREAM_PATCH_IN_H
#define PERTA_STREAM_PATCH_IN_H

#include <jansson.h>

#include "io/checkpoint.h"
#include "io/file.h"
#include "io/patch.h"

struct perta_patch_in_shard {
    char *name; /* of the model's shard */
    char *file_name, *path;
    struct perta_patch *patch;
    struct perta_file file;
};

struct perta_patch_in {
    char *path;
    json_t *manifest;
    struct perta_patch_in_shard *shards; /* (n_shards), in order of the manifest: by name */
    uint32_t n_shards;
};

/* Is the folder a patch? (It has a manifest.json that says so.) */
bool perta_patch_in_is_patch(const char *path);

/* Read manifest.json and the table of every file it lists. Zeroed before; close it on error
 * too. PERTA_EINPUT for what is no patch, PERTA_ECHECK for a damaged one. */
int perta_patch_in_open(struct perta_patch_in *in, const char *path, struct perta_err *err);
int perta_patch_in_open_files(struct perta_patch_in *in, bool direct, struct perta_err *err);
void perta_patch_in_close(struct perta_patch_in *in);

#endif
