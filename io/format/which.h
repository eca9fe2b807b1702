/* which.h - tell what a path is, for messages when the wrong kind of path was given; and which of
 * several models in one folder is meant. Spec: docs/safetensors.md */
#ifndef PERTA_IO_FORMAT_WHICH_H
#define PERTA_IO_FORMAT_WHICH_H

#include "io/format/checkpoint.h"

/* What a path is. */
enum perta_kind {
    PERTA_KIND_UNKNOWN,
    PERTA_KIND_FILE,
    PERTA_KIND_WEIGHTS, /* a file of weights */
    PERTA_KIND_ADAPTER,
    PERTA_KIND_ADAPTERS, /* a folder of them */
    PERTA_KIND_CACHE,    /* a model's folder in the Hugging Face cache */
    PERTA_KIND_IMPORTANCE,
    PERTA_KIND_CHECKPOINT,
    PERTA_KIND_PATCH,
};

/* Judged by names of files and by one header. */
enum perta_kind perta_which_kind(const char *path);
/* "a patch", "a PEFT adapter", ..., for messages; "" for PERTA_KIND_UNKNOWN. */
const char *perta_which_name(enum perta_kind kind);

/* Fail because the folder, or the file, holds no safetensors weights: PERTA_EINPUT, saying what it
 * is instead, or where weights are. */
int perta_which_no_folder(const char *folder, struct perta_err *err);
int perta_which_no_file(const char *path, struct perta_err *err);

/* Check that transformers would load the same model from the folder as perta did. PERTA_EINPUT,
 * naming both, if it would load another one: model.safetensors beside an index of other shards, an
 * adapter on top, the one that config.json names. Also if shards without an index cannot belong to
 * one model. */
int perta_which_one(const struct perta_checkpoint *ck, struct perta_err *err);

/* Check that it is a model: PERTA_EINPUT for an importance, and for the weights of an adapter. */
int perta_which_model(const struct perta_checkpoint *ck, struct perta_err *err);

#endif
