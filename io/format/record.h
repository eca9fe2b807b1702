/* record.h - manifest.json of a patch folder. Spec: docs/patch-format.md */
#ifndef PERTA_IO_FORMAT_RECORD_H
#define PERTA_IO_FORMAT_RECORD_H

#include <jansson.h>
#include <stdbool.h>

#include "io/err.h"
#include "io/hash.h"

#define PERTA_RECORD_NAME "manifest.json"

/* Read the manifest.json of the folder dir, and digest it. whole: with what it says of the tensors,
 * which of 100,000 of them takes 100 MB; else without, unless it is written oddly. *manifest is the
 * caller's. PERTA_EINPUT for what is not JSON. */
int perta_record_load(const char *dir, bool whole, json_t **manifest, struct perta_digest_hex *hex,
                      struct perta_err *err);
/* Does it say that it is a patch's? NULL is none. */
bool perta_record_is_patch(const json_t *manifest);

struct perta_record_file {
    const char *name; /* (len), as it stands in the text */
    size_t len;
};

struct perta_record_files {
    char *text;
    bool is_whole; /* all of it is one JSON object */
    bool is_patch;
    bool short_of_memory;
    struct perta_record_file *all; /* (n), of outputs.patch */
    size_t n;
};

/* The same without a tree, for what one has no reason to trust: is the manifest.json of dir a patch's,
 * and which files does it list? Not JSON is no error. Release it on error, too. */
int perta_record_scan(const char *dir, struct perta_record_files *files, struct perta_err *err);
void perta_record_files_release(struct perta_record_files *files);

#endif
