/* owned.h - whose a folder is, by its content: what --force may replace or remove.
 * Spec: docs/outputs.md */
#ifndef PERTA_IO_PUBLISH_OWNED_H
#define PERTA_IO_PUBLISH_OWNED_H

#include <stdbool.h>

#include "io/err.h"

enum perta_owned {
    /* Whole: a patch (its manifest.json says so), or a checkpoint, an importance or an adapter (the
     * headers of its safetensors files and its config parse), and nothing else. */
    PERTA_OWNED_OUTPUT,
    /* Of a run that was interrupted: parts of these and of the run's own work, and nothing else. */
    PERTA_OWNED_LEFTOVER,
};

/* Is the folder at path, which exists, of that kind, or empty? A file that the folder like (NULL:
 * none) has too, under the same name and with the same bytes, is a copy, and counts as of it; of a
 * leftover its beginning is enough. PERTA_EUSAGE, which names what is not of it; a link, a mount
 * point, and a folder within an output never are. */
int perta_owned_check(const char *path, enum perta_owned as, const char *like,
                      struct perta_err *err);
/* The same, then remove exactly what was looked at. What came meanwhile stays, and is an error. */
int perta_owned_remove(const char *path, enum perta_owned as, const char *like,
                       struct perta_err *err);

/* Is something mounted there? Such a folder can be neither renamed nor removed. */
bool perta_is_mount_point(const char *path);

#endif
