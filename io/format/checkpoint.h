/* checkpoint.h - a Hugging Face checkpoint folder (or one safetensors file), opened to read.
 *
 * A folder holds shards named by model.safetensors.index.json, or one model.safetensors, or,
 * without an index, any *.safetensors files whose tensors do not overlap. */
#ifndef PERTA_IO_FORMAT_CHECKPOINT_H
#define PERTA_IO_FORMAT_CHECKPOINT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "io/err.h"
#include "io/format/safetensors.h"

#define PERTA_INDEX_NAME "model.safetensors.index.json"
#define PERTA_ADAPTER_CONFIG "adapter_config.json"

struct perta_shard {
    char *name; /* within the folder */
    char *path; /* as opened: for messages and for opening it again */
    struct perta_header *header;
    uint64_t dev, ino, size_bytes; /* as found when the header was read */
    struct timespec mtime, ctime;
};

struct perta_checkpoint {
    char *path;
    struct perta_shard *shards; /* (n_shards), sorted by name */
    uint32_t n_shards;
    struct perta_index *index; /* while it is opened; NULL without one */
    json_t *config;     /* what config.json holds, NULL without one or where it is not JSON: */
    char *config_path;  /* of that file, beside the shards, whether or not it is there; NULL: of a
                              file of another name than model.safetensors */
    char *config_flaw;  /* why not, a message; else NULL */
    bool is_adapter;    /* opened as one: config is adapter_config.json's */
    uint64_t n_tensors; /* over all shards */
    struct perta_ref *by_name; /* (n_tensors), sorted by name */
    char *names;               /* what perta_checkpoint_rename gave them; NULL: nothing */
};

/* Where a tensor lies. */
struct perta_ref {
    const struct perta_tensor *tensor;
    uint32_t shard;
};

/* Open the folder or file at path, check every shard's header and the index against them.
 * Shards are opened, read and closed again: no file stays open. Errors: PERTA_EINPUT for what
 * the files hold (names folder, shard, tensor, byte), PERTA_ESYS. *out is the caller's. */
PERTA_API int perta_checkpoint_open(const char *path, struct perta_checkpoint **out,
                                    struct perta_err *err);

/* The same of a folder with a journal of an edit in place, which perta_checkpoint_open refuses. */
int perta_checkpoint_open_unfinished(const char *path, struct perta_checkpoint **out,
                                     struct perta_err *err);

/* Is path the folder of a PEFT adapter, and not of a checkpoint that has one beside it? */
PERTA_API bool perta_checkpoint_is_adapter(const char *path);
/* Open such a folder: its one shard is adapter_model.safetensors, its config is
 * adapter_config.json, which must be JSON. Otherwise as above. */
PERTA_API int perta_checkpoint_open_adapter(const char *path, struct perta_checkpoint **out,
                                            struct perta_err *err);

/* NULL where the checkpoint has no tensor of that name. Borrowed from ck. */
PERTA_API const struct perta_ref *perta_checkpoint_find(const struct perta_checkpoint *ck,
                                                        const char *name);

/* From now on every tensor goes by its name without the first strip characters, which all of them
 * share, and with add in front. PERTA_ESYS without memory, and then nothing changed. */
int perta_checkpoint_rename(struct perta_checkpoint *ck, size_t strip, const char *add,
                            struct perta_err *err);
/* From now on names go without parts (up to NULL), each with its dot, wherever they stand between
 * dots. PERTA_EINPUT if that makes one name of two. */
int perta_checkpoint_drop(struct perta_checkpoint *ck, const char *const *parts,
                          struct perta_err *err);

/* A link in a folder may lead to where the folder's owner put it, not to anywhere: PERTA_EINPUT if
 * path is one that leads neither into the folder nor to the blobs of its Hugging Face cache. */
int perta_check_link(const char *folder, const char *path, struct perta_err *err);

/* Open a shard again, to read it: PERTA_EINPUT if it is not, by device, inode, size and times, the
 * file whose header was read. The caller closes it, on error too. */
struct perta_file;
int perta_shard_open(const struct perta_shard *shard, bool want_direct, struct perta_file *file,
                     struct perta_err *err);
/* The same of every shard's path, without opening it, and config.json holds what it held. */
PERTA_API int perta_checkpoint_unchanged(const struct perta_checkpoint *ck, struct perta_err *err);

PERTA_API void perta_checkpoint_close(struct perta_checkpoint *ck);

#endif
