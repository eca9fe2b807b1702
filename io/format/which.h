/* which.h - what a path is, where another kind of folder was wanted, and which of several models in
 * one folder is meant. Spec: docs/safetensors.md */
#ifndef PERTA_IO_FORMAT_WHICH_H
#define PERTA_IO_FORMAT_WHICH_H

#include "io/format/checkpoint.h"

/* "a patch", "a PEFT adapter", "an importance", "a checkpoint", ...; NULL where it is none that is
 * known. By a look at names and at one header. */
const char *perta_which_kind(const char *path);

/* PERTA_EINPUT: the folder, or the file, holds no safetensors weights; say what it is instead, or
 * where they are. */
int perta_which_no_folder(const char *folder, struct perta_err *err);
int perta_which_no_file(const char *path, struct perta_err *err);

/* Does transformers load the model that was opened from the folder? PERTA_EINPUT, naming both, where
 * it would load another one of those in it: model.safetensors beside an index of other shards, an
 * adapter on top, the one that config.json names; or where shards without an index cannot be of one
 * model. */
int perta_which_one(const struct perta_checkpoint *ck, struct perta_err *err);

/* Is it a model? PERTA_EINPUT for an importance and for the weights of an adapter. */
int perta_which_model(const struct perta_checkpoint *ck, struct perta_err *err);

#endif
