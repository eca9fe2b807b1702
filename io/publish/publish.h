/* publish.h - an output folder that appears whole or not at all: it is filled under another
 * name beside its own, and renamed when everything in it is on disk. */
#ifndef PERTA_IO_PUBLISH_PUBLISH_H
#define PERTA_IO_PUBLISH_PUBLISH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "io/err.h"
#include "io/file.h"

struct perta_publish {
    char *path;       /* the folder's own name */
    char *partial;    /* where it is filled: path + ".perta-partial" */
    const char *like; /* borrowed: a folder, copies of whose files may be replaced; or NULL */
    bool adopted;     /* partial was left by another run: files in it may be replaced */
    bool made;        /* partial is ours to rename or remove */
    bool keep;        /* do not remove it: a run with --resume goes on with it */
    bool replace;
};

/* May these folders be written? Not where one is, holds, or lies within an input (NULL ones do
 * not count) or another output, nor where perta_publish_begin would refuse. Touches nothing. */
PERTA_API int perta_publish_check(const char *const *outputs, size_t n_outputs,
                                  const char *const *inputs, size_t n_inputs, bool force,
                                  struct perta_err *err);
/* Make the partial folder. path may not exist, or be an empty folder; with force what stands
 * there is replaced when the new folder is complete, if it is an output: see io/publish/owned.h, also for
 * like, which is borrowed and outlives out. With force a partial folder left by an interrupted run
 * is removed; without, it is an error that says so. Creates missing parents. */
PERTA_API int perta_publish_begin(struct perta_publish *out, const char *path, const char *like,
                                  bool force, struct perta_err *err);
/* Go on with the partial folder that an interrupted run left for path. *found: it was there;
 * else nothing is made, and a commit does nothing. */
PERTA_API int perta_publish_resume(struct perta_publish *out, const char *path, const char *like,
                                   bool force, bool *found, struct perta_err *err);
/* Remove what an interrupted run left for path, if anything. PERTA_EUSAGE if anything else is in
 * it. */
PERTA_API int perta_publish_sweep(const char *path, const char *like, struct perta_err *err);
/* path of name within the partial folder; the caller's (free). NULL without memory. */
PERTA_API char *perta_publish_path(const struct perta_publish *out, const char *name);
/* Before name is created: where another run left such a file, it goes. */
int perta_publish_clear(const struct perta_publish *out, const char *name, struct perta_err *err);
/* Write a small file into the partial folder, fsynced. */
PERTA_API int perta_publish_file(const struct perta_publish *out, const char *name,
                                 const void *data, uint64_t len_bytes, struct perta_err *err);
/* The same of what print writes to a stream, which is false where memory fails. */
int perta_publish_print(const struct perta_publish *out, const char *name,
                        bool (*print)(FILE *to, void *ctx), void *ctx, struct perta_err *err);
/* Copy a regular file into the partial folder under name, fsynced. */
PERTA_API int perta_publish_copy(const struct perta_publish *out, const char *from,
                                 const char *name, struct perta_err *err);
/* Remove a file or a folder in the partial folder; it need not be there. */
PERTA_API int perta_publish_remove(const struct perta_publish *out, const char *name,
                                   struct perta_err *err);
/* fsync the partial folder and the one that it is in: a power cut takes no name away. */
PERTA_API int perta_publish_sync(const struct perta_publish *out, struct perta_err *err);
/* fsync the folder, give it its name, fsync its parent. What stands there and is to be replaced is
 * looked at once more; PERTA_ESYS, and it stays, if it is no longer an output. */
PERTA_API int perta_publish_commit(struct perta_publish *out, struct perta_err *err);
/* Remove the partial folder, which is not to be published, or say why it cannot be. */
int perta_publish_discard(struct perta_publish *out, struct perta_err *err);
/* Remove the partial folder if it was neither committed nor is to be kept, and free. Zeroed is
 * fine. */
PERTA_API void perta_publish_release(struct perta_publish *out);

/* Write one small file at path, whole or not at all, fsynced. Where something is already, it is
 * PERTA_EUSAGE without force, and with it unless that is a regular file in whose first 4096 bytes
 * mark stands, as in data: perta wrote it. */
PERTA_API int perta_publish_single(const char *path, const char *mark, const void *data,
                                   uint64_t len_bytes, bool force, struct perta_err *err);

/* Would it replace what is at path, if anything, and what a run that was killed left beside it?
 * PERTA_EUSAGE if not. */
int perta_publish_check_mark(const char *path, const char *mark, struct perta_err *err);

/* Make the folders that path is to lie in, where they are missing; synced. */
PERTA_API int perta_make_parents(const char *path, struct perta_err *err);

#endif
