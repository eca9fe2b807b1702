/* publish.h - an output folder that appears complete or not at all. It is filled under another name
 * beside its own, the partial folder, and renamed once everything in it is on disk. State diagram:
 * docs/outputs.md */
#ifndef PERTA_IO_PUBLISH_PUBLISH_H
#define PERTA_IO_PUBLISH_PUBLISH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "io/err.h"
#include "io/file.h"

struct perta_publish {
    char *path;       /* the folder's final name */
    char *partial;    /* the partial folder: path + ".perta-partial" */
    const char *like; /* borrowed: copies of this folder's files may be replaced; or NULL */
    bool adopted;     /* partial was left by an earlier run: files in it may be replaced */
    bool made;        /* partial exists, and is ours to rename or remove */
    bool keep;        /* do not remove partial: --resume continues from it */
    bool replace;
};

/* Check that these outputs may be written. PERTA_EUSAGE if one is, contains, or lies within an
 * input (NULL inputs do not count) or another output, or where perta_publish_begin would refuse.
 * Changes nothing. */
PERTA_API int perta_publish_check(const char *const *outputs, size_t n_outputs,
                                  const char *const *inputs, size_t n_inputs, bool force,
                                  struct perta_err *err);
/* Create the partial folder, and missing parents. path must not exist, or be an empty folder. With
 * force, an output that exists there is replaced once the new one is complete (io/publish/owned.h
 * says what counts as an output, and explains like, which is borrowed and must outlive out), and a
 * partial folder that an interrupted run left is removed. Without force, both are errors, the
 * second with err->resumable set. */
PERTA_API int perta_publish_begin(struct perta_publish *out, const char *path, const char *like,
                                  bool force, struct perta_err *err);
/* Resume with the partial folder that an interrupted run left for path. *found: there is one. Else
 * nothing is created, and a commit does nothing. */
PERTA_API int perta_publish_resume(struct perta_publish *out, const char *path, const char *like,
                                   bool force, bool *found, struct perta_err *err);
/* Remove the partial folder that an interrupted run left for path, if there is one. PERTA_EUSAGE if
 * it holds anything else. */
PERTA_API int perta_publish_sweep(const char *path, const char *like, struct perta_err *err);
/* Path of name within the partial folder; the caller frees it. NULL only when out of memory. */
PERTA_API char *perta_publish_path(const struct perta_publish *out, const char *name);
/* Call before creating name: removes such a file of an earlier run. */
int perta_publish_clear(const struct perta_publish *out, const char *name, struct perta_err *err);
/* Write a small file into the partial folder, and fsync it. */
PERTA_API int perta_publish_file(const struct perta_publish *out, const char *name,
                                 const void *data, uint64_t len_bytes, struct perta_err *err);
/* The same with what print writes to a stream. print returns false when out of memory. */
int perta_publish_print(const struct perta_publish *out, const char *name,
                        bool (*print)(FILE *to, void *ctx), void *ctx, struct perta_err *err);
/* Copy a regular file into the partial folder as name, and fsync it. */
PERTA_API int perta_publish_copy(const struct perta_publish *out, const char *from,
                                 const char *name, struct perta_err *err);
/* Remove a file or folder in the partial folder, if it exists. */
PERTA_API int perta_publish_remove(const struct perta_publish *out, const char *name,
                                   struct perta_err *err);
/* fsync the partial folder and its parent, so that a power cut removes no names. */
PERTA_API int perta_publish_sync(const struct perta_publish *out, struct perta_err *err);
/* fsync the partial folder, rename it to path, fsync the parent. A folder that is to be replaced is
 * checked once more: if it is no longer an output, it stays, and that is PERTA_ESYS. */
PERTA_API int perta_publish_commit(struct perta_publish *out, struct perta_err *err);
/* Remove the partial folder, which is not to be published; an error if that fails. */
int perta_publish_discard(struct perta_publish *out, struct perta_err *err);
/* Remove the partial folder unless it was committed or is to be kept, and free the rest. A zeroed
 * struct is allowed. */
PERTA_API void perta_publish_release(struct perta_publish *out);

/* Write one small file at path, complete or not at all, and fsync it. If path exists, that is
 * PERTA_EUSAGE without force. With force it is replaced if perta wrote it: a regular file with mark
 * in its first 4096 bytes, as in data. */
PERTA_API int perta_publish_single(const char *path, const char *mark, const void *data,
                                   uint64_t len_bytes, bool force, struct perta_err *err);

/* Would perta_publish_single with force replace what is at path, and what a killed run left beside
 * it? PERTA_EUSAGE if not. */
int perta_publish_check_mark(const char *path, const char *mark, struct perta_err *err);

/* Create the missing parent folders of path, and sync them. */
PERTA_API int perta_make_parents(const char *path, struct perta_err *err);

#endif
