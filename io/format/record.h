/* record.h - read the manifest.json of a patch folder. Spec: docs/manifest.md */
#ifndef PERTA_IO_FORMAT_RECORD_H
#define PERTA_IO_FORMAT_RECORD_H

#include <jansson.h>
#include <stdbool.h>

#include "io/err.h"
#include "io/hash.h"

#define PERTA_RECORD_NAME "manifest.json"

/* Read the manifest.json of the folder dir, and digest it. whole: with its member "tensors", which
 * takes 100 MB for 100,000 tensors. Else that is left out, unless the file is laid out unusually.
 * *manifest is the caller's. PERTA_EINPUT if it is not JSON. */
int perta_record_load(const char *dir, bool whole, json_t **manifest, struct perta_digest_hex *hex,
                      struct perta_err *err);
/* Does the manifest say that it belongs to a patch? NULL does not. */
bool perta_record_is_patch(const json_t *manifest);

struct perta_record_file {
    const char *name; /* (len), as in the text, with escapes */
    size_t len;
};

struct perta_record_files {
    char *text;
    bool is_whole; /* the whole text is one JSON object */
    bool is_patch;
    bool short_of_memory;
    struct perta_record_file *all; /* (n), from outputs.patch */
    size_t n;
};

/* For a folder that may hold anything: is its manifest.json that of a patch, and which files does
 * it list? Parsed without a tree. Invalid JSON is not an error. Release files on error too. */
int perta_record_scan(const char *dir, struct perta_record_files *files, struct perta_err *err);
void perta_record_files_release(struct perta_record_files *files);

#endif
