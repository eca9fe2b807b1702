/* checkpoint.h - a Hugging Face checkpoint folder (or one safetensors file), opened for reading.
 *
 * A folder holds the shards that model.safetensors.index.json names, or one model.safetensors, or,
 * without an index, any *.safetensors files whose tensors have different names. */
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
    char *path; /* as opened, for messages and for reopening */
    struct perta_header *header;
    uint64_t dev, ino, size_bytes; /* when the header was read */
    struct timespec mtime, ctime;
};

struct perta_checkpoint {
    char *path;
    struct perta_shard *shards; /* (n_shards), sorted by name */
    uint32_t n_shards;
    struct perta_index *index; /* only while it is being opened; NULL without an index */
    json_t *config;            /* content of config.json; NULL if there is none or it is not JSON */
    /* Beside the shards, whether it exists or not; NULL for a file not named model.safetensors. */
    char *config_path;
    char *config_flaw;         /* a message saying why it is not JSON; else NULL */
    bool is_adapter;           /* opened as an adapter: config holds adapter_config.json */
    uint64_t n_tensors;        /* over all shards */
    struct perta_ref *by_name; /* (n_tensors), sorted by name */
    char *names;               /* names given by perta_checkpoint_rename; NULL: none */
};

/* A tensor and the shard it is in. */
struct perta_ref {
    const struct perta_tensor *tensor;
    uint32_t shard;
};

/* Open the folder or file at path, and check every shard's header and the index against them.
 * Shards are opened, read and closed again: no file stays open. PERTA_EINPUT for what the files
 * hold (naming folder, shard, tensor, byte), PERTA_ESYS. *out is the caller's. */
PERTA_API int perta_checkpoint_open(const char *path, struct perta_checkpoint **out,
                                    struct perta_err *err);

/* The same, even if an edit in place of the folder was interrupted, which perta_checkpoint_open
 * refuses. */
int perta_checkpoint_open_unfinished(const char *path, struct perta_checkpoint **out,
                                     struct perta_err *err);

/* Is path the folder of a PEFT adapter, rather than a checkpoint with an adapter in the same
 * folder? */
PERTA_API bool perta_checkpoint_is_adapter(const char *path);
/* Open an adapter's folder. Its only shard is adapter_model.safetensors; its config is
 * adapter_config.json, which must be JSON. Otherwise as perta_checkpoint_open. */
PERTA_API int perta_checkpoint_open_adapter(const char *path, struct perta_checkpoint **out,
                                            struct perta_err *err);

/* Find a tensor by name. NULL if there is none. Borrowed from ck. */
PERTA_API const struct perta_ref *perta_checkpoint_find(const struct perta_checkpoint *ck,
                                                        const char *name);

/* Count the tensors of all headers, and sort them by name again: for whoever changes headers.
 * PERTA_EINPUT if two tensors have the same name. */
int perta_checkpoint_sort(struct perta_checkpoint *ck, struct perta_err *err);

/* Rename every tensor: remove the first strip characters, which all names share, and prepend add.
 * PERTA_ESYS when out of memory; then nothing has changed. */
int perta_checkpoint_rename(struct perta_checkpoint *ck, size_t strip, const char *add,
                            struct perta_err *err);
/* Remove parts (an array that ends with NULL), each with its dot, from all names, wherever they
 * stand between dots. PERTA_EINPUT if two names become the same. */
int perta_checkpoint_drop(struct perta_checkpoint *ck, const char *const *parts,
                          struct perta_err *err);

/* A symbolic link in a folder may lead only into the folder itself, or to the blobs of its Hugging
 * Face cache. PERTA_EINPUT if path is a link that leads elsewhere. */
int perta_check_link(const char *folder, const char *path, struct perta_err *err);

/* Reopen a shard for reading. PERTA_EINPUT if device, inode, size or times differ from when its
 * header was read. The caller closes file, on error too. */
struct perta_file;
int perta_shard_open(const struct perta_shard *shard, bool want_direct, struct perta_file *file,
                     struct perta_err *err);
/* Check the same for every shard without opening it, and that config.json (of an adapter:
 * adapter_config.json) has the same content. PERTA_EINPUT if anything changed. */
PERTA_API int perta_checkpoint_unchanged(const struct perta_checkpoint *ck, struct perta_err *err);

PERTA_API void perta_checkpoint_close(struct perta_checkpoint *ck);

#endif
