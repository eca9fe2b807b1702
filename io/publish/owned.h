/* owned.h - does a folder hold only what perta or a writer of checkpoints made? Judged by content:
 * it decides what --force may replace or remove. Spec: docs/outputs.md */
#ifndef PERTA_IO_PUBLISH_OWNED_H
#define PERTA_IO_PUBLISH_OWNED_H

#include <stdbool.h>

#include "io/err.h"

enum perta_owned {
    /* A complete output: a patch (its manifest.json says so), or a checkpoint, an importance or an
     * adapter (the headers of its safetensors files and its config parse), and nothing else. */
    PERTA_OWNED_OUTPUT,
    /* A leftover of an interrupted run: parts of such outputs and of the run's work, and nothing
     * else. */
    PERTA_OWNED_LEFTOVER,
};

/* Check that the folder at path, which must exist, is of that kind, or empty. A file counts as a
 * copy, and so as part of it, if the folder like (NULL: none) has a file of the same name with the
 * same bytes; in a leftover the beginning of such a copy is enough. PERTA_EUSAGE, naming the files
 * that do not belong. A symbolic link, a mount point, and a folder within an output never
 * belong. */
int perta_owned_check(const char *path, enum perta_owned as, const char *like,
                      struct perta_err *err);
/* The same check, then remove exactly the files that were checked. A file that was added meanwhile
 * stays, and is an error. */
int perta_owned_remove(const char *path, enum perta_owned as, const char *like,
                       struct perta_err *err);

/* Is path a mount point? Such a folder can be neither renamed nor removed. */
bool perta_is_mount_point(const char *path);

#endif
