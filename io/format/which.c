#include "io/format/which.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/index.h"
#include "io/format/patch_manifest.h"
#include "io/text.h"

#define SUFFIX ".safetensors"
#define SINGLE_NAME "model" SUFFIX
#define ADAPTER_NAME "adapter_model" SUFFIX

static bool begins_with(const char *name, const char *prefix)
{
    return !strncmp(name, prefix, strlen(prefix));
}

static bool exists(const char *folder, const char *name)
{
    char *path = perta_path_join(folder, name);
    bool there = path && !access(path, F_OK);
    free(path);
    return there;
}

/* ---- what it is ---- */

/* The first name, in alphabetical order, that is wanted. */
struct search {
    bool (*wanted)(const char *folder, const char *name);
    const char *folder;
    char *found;
};

static int look_at(void *ctx, const char *name, struct perta_err *err)
{
    struct search *search = ctx;
    if (!search->wanted(search->folder, name) || (search->found && strcmp(name, search->found) > 0))
        return 0;
    free(search->found);
    search->found = strdup(name);
    return search->found ? 0 : perta_fail_sys(err, ENOMEM, "%s", name);
}

/* The caller frees the result. NULL if there is none. */
static char *find(const char *folder, bool (*wanted)(const char *folder, const char *name))
{
    struct perta_err ignored = {0};
    struct search search = {wanted, folder, NULL};
    perta_folder_each(folder, look_at, &search, &ignored);
    return search.found;
}

static bool is_shard(const char *folder, const char *name)
{
    (void)folder;
    return *name != '.' && perta_text_ends_in(name, SUFFIX);
}

static bool is_patch(const char *path)
{
    struct perta_err ignored = {0};
    struct perta_patch_manifest_files files;
    perta_patch_manifest_scan(path, &files, &ignored);
    bool is = files.is_patch;
    perta_patch_manifest_release(&files);
    return is;
}

static const char *stat_of(const struct perta_header *header)
{
    return json_string_value(json_object_get(header->metadata, "perta.stat"));
}

static bool is_importance(const char *folder, const char *shard)
{
    struct perta_err ignored = {0};
    struct perta_header *header = NULL;
    struct stat st;
    char *path = perta_path_join(folder, shard);
    int fd = path ? perta_open_regular(path, &st, &ignored) : -1;
    if (fd >= 0) {
        perta_safetensors_read(fd, (uint64_t)st.st_size, path, &header, &ignored);
        close(fd);
    }
    bool is = header && stat_of(header);
    perta_header_free(header);
    free(path);
    return is;
}

static bool is_adapter(const char *folder, const char *name)
{
    char *path = perta_path_join(folder, name);
    bool is = path && perta_checkpoint_is_adapter(path);
    free(path);
    return is;
}

static bool holds(const char *folder, bool (*wanted)(const char *folder, const char *name))
{
    char *name = find(folder, wanted);
    bool is = name;
    free(name);
    return is;
}

enum perta_kind perta_which_kind(const char *path)
{
    struct stat st;
    if (stat(path, &st))
        return PERTA_KIND_UNKNOWN;
    if (!S_ISDIR(st.st_mode))
        return perta_text_ends_in(path, SUFFIX) ? PERTA_KIND_WEIGHTS : PERTA_KIND_FILE;
    if (perta_checkpoint_is_adapter(path))
        return PERTA_KIND_ADAPTER;
    if (exists(path, "snapshots") && exists(path, "blobs"))
        return PERTA_KIND_CACHE;
    char *shard = find(path, is_shard);
    enum perta_kind kind = shard && is_importance(path, shard) ? PERTA_KIND_IMPORTANCE
                           : shard                             ? PERTA_KIND_CHECKPOINT
                           : is_patch(path)                    ? PERTA_KIND_PATCH
                           : holds(path, is_adapter)           ? PERTA_KIND_ADAPTERS
                                                               : PERTA_KIND_UNKNOWN;
    free(shard);
    return kind;
}

const char *perta_which_name(enum perta_kind kind)
{
    static const char *const names[] = {
        [PERTA_KIND_UNKNOWN] = "",
        [PERTA_KIND_FILE] = "a file",
        [PERTA_KIND_WEIGHTS] = "a file of weights",
        [PERTA_KIND_ADAPTER] = "a PEFT adapter",
        [PERTA_KIND_ADAPTERS] = "a folder of PEFT adapters",
        [PERTA_KIND_CACHE] = "a folder of the Hugging Face cache",
        [PERTA_KIND_IMPORTANCE] = "an importance",
        [PERTA_KIND_CHECKPOINT] = "a checkpoint",
        [PERTA_KIND_PATCH] = "a patch",
    };
    return names[kind];
}

/* ---- nothing to open ---- */

static bool is_pickle(const char *folder, const char *name)
{
    static const char *const suffixes[] = {".bin", ".pt",      ".pth", ".ckpt",
                                           ".h5",  ".msgpack", ".pkl", ".nemo"};
    (void)folder;
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (perta_text_ends_in(name, suffixes[i]))
            return true;
    return false;
}

/* Pickles that hold a model, rather than a trainer's state. */
static bool is_pickled_model(const char *folder, const char *name)
{
    return is_pickle(folder, name) &&
           (begins_with(name, "pytorch_model") || begins_with(name, "tf_model") ||
            begins_with(name, "flax_model") || begins_with(name, "consolidated") ||
            begins_with(name, "adapter_model") || begins_with(name, "model"));
}

static bool is_gguf(const char *folder, const char *name)
{
    (void)folder;
    return perta_text_ends_in(name, ".gguf") || perta_text_ends_in(name, ".ggml");
}

/* Is it a folder with something to open? */
static bool is_worth_a_look(const char *folder, const char *name)
{
    char *path = *name == '.' ? NULL : perta_path_join(folder, name);
    enum perta_kind kind = path ? perta_which_kind(path) : PERTA_KIND_UNKNOWN;
    free(path);
    return kind != PERTA_KIND_UNKNOWN && kind != PERTA_KIND_FILE && kind != PERTA_KIND_WEIGHTS;
}

static bool is_any(const char *folder, const char *name)
{
    (void)folder;
    return *name != '.';
}

#define CONVERT_PICKLE \
    "load it with transformers and save it again (save_pretrained writes safetensors)"
#define CONVERT_GGUF                                                          \
    "GGUF is made from a model: give that one, or load it with transformers " \
    "(from_pretrained, gguf_file) and save it again (save_pretrained writes safetensors)"

static int refuse_pickle(const char *folder, const char *name, const char *how,
                         struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s: holds %s, but no " SUFFIX " file; %s", folder, name,
                      how);
}

static int refuse_cache(const char *folder, struct perta_err *err)
{
    char *snapshots = perta_path_join(folder, "snapshots");
    if (!snapshots)
        return perta_fail_sys(err, ENOMEM, "%s", folder);
    char *revision = find(snapshots, is_any);
    free(snapshots);
    int rc =
        perta_fail(err, PERTA_EINPUT,
                   "%s: a folder of the Hugging Face cache; give the folder below snapshots/%s%s"
                   "%s%s",
                   folder, revision ? ": " : "", revision ? folder : "",
                   revision ? "/snapshots/" : "", revision ? revision : "");
    free(revision);
    return rc;
}

static int refuse_inner(const char *folder, const char *inner, struct perta_err *err)
{
    char *path = perta_path_join(folder, inner);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", folder);
    enum perta_kind kind = perta_which_kind(path);
    int rc = perta_fail(err, PERTA_EINPUT,
                        "%s: no " SUFFIX " file in this folder; is %s meant?%s%s", folder, path,
                        kind == PERTA_KIND_UNKNOWN ? "" : " It is ", perta_which_name(kind));
    free(path);
    return rc;
}

int perta_which_no_folder(const char *folder, struct perta_err *err)
{
    if (exists(folder, "snapshots") && (exists(folder, "blobs") || exists(folder, "refs")))
        return refuse_cache(folder, err);
    if (exists(folder, PERTA_PATCH_MANIFEST))
        return perta_fail(err, PERTA_EINPUT, "%s: a patch, not a checkpoint", folder);
    char *pickle = find(folder, is_pickled_model), *gguf = find(folder, is_gguf);
    pickle = pickle || gguf ? pickle : find(folder, is_pickle);
    char *inner = pickle || gguf ? NULL : find(folder, is_worth_a_look);
    int rc = pickle  ? refuse_pickle(folder, pickle, CONVERT_PICKLE, err)
             : gguf  ? refuse_pickle(folder, gguf, CONVERT_GGUF, err)
             : inner ? refuse_inner(folder, inner, err)
                     : perta_fail(err, PERTA_EINPUT,
                                  "%s: no " SUFFIX " file in this folder; other formats (.bin, "
                                  ".gguf) must be converted first",
                                  folder);
    free(pickle);
    free(gguf);
    free(inner);
    return rc;
}

int perta_which_no_file(const char *path, struct perta_err *err)
{
    const char *how = is_gguf(NULL, path)     ? CONVERT_GGUF
                      : is_pickle(NULL, path) ? CONVERT_PICKLE
                                              : NULL;
    return perta_fail(err, PERTA_EINPUT, "%s: neither a folder nor a " SUFFIX " file%s%s", path,
                      how ? "; " : "", how ? how : "");
}

/* ---- one of several ---- */

static bool is_loaded(const struct perta_checkpoint *ck, const char *name)
{
    for (uint32_t i = 0; i < ck->n_shards; i++)
        if (!strcmp(ck->shards[i].name, name))
            return true;
    return false;
}

/* If there is both, transformers loads the single file and perta the index. */
static int check_single(const struct perta_checkpoint *ck, struct perta_err *err)
{
    bool single = ck->n_shards == 1 && is_loaded(ck, SINGLE_NAME);
    if (single || !ck->index || !exists(ck->path, SINGLE_NAME))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: holds two models: " SINGLE_NAME ", which transformers loads, and the "
                      "shards that " PERTA_INDEX_NAME " names (%s, ...); move one of them away, or "
                      "give %s/" SINGLE_NAME " itself",
                      ck->path, ck->n_shards ? ck->shards[0].name : "none", ck->path);
}

/* If an adapter is in the same folder, transformers loads the model with the adapter on top. */
static int check_adapter(const struct perta_checkpoint *ck, struct perta_err *err)
{
    const char *weights = exists(ck->path, ADAPTER_NAME) ? ADAPTER_NAME : "adapter_model.bin";
    if (!exists(ck->path, PERTA_ADAPTER_CONFIG) || !exists(ck->path, weights))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: holds a model (%s) and a PEFT adapter (" PERTA_ADAPTER_CONFIG
                      ", %s), which transformers loads on top of it; merge it "
                      "(merge_and_unload, save_pretrained), or move one of them to a folder of its "
                      "own",
                      ck->path, ck->n_shards ? ck->shards[0].name : "none", weights);
}

static int check_config(const struct perta_checkpoint *ck, struct perta_err *err)
{
    static const char key[] = "transformers_weights";
    const char *named = json_string_value(json_object_get(ck->config, key));
    if (!named || (ck->index && !strcmp(named, PERTA_INDEX_NAME)) ||
        (ck->n_shards == 1 && is_loaded(ck, named)))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s/config.json: %s is %s, which transformers loads; perta would take %s; "
                      "move that away, or remove the key",
                      ck->path, key, named, ck->n_shards ? ck->shards[0].name : "none");
}

/* The family of a shard, by its name. Shards of different families are never loaded together. */
static int family_of(const char *name)
{
    return begins_with(name, "consolidated") ? 1 : begins_with(name, "adapter_") ? 2 : 0;
}

static int check_families(const struct perta_checkpoint *ck, struct perta_err *err)
{
    for (uint32_t i = 1; i < ck->n_shards && !ck->index; i++)
        if (family_of(ck->shards[i].name) != family_of(ck->shards[0].name))
            return perta_fail(
                err, PERTA_EINPUT,
                "%s: no " PERTA_INDEX_NAME " says which files are the model's, and %s "
                "and %s do not belong together; move one of them away, or give one itself",
                ck->path, ck->shards[0].name, ck->shards[i].name);
    return 0;
}

int perta_which_one(const struct perta_checkpoint *ck, struct perta_err *err)
{
    int rc = check_single(ck, err);
    if (!rc)
        rc = check_adapter(ck, err);
    if (!rc)
        rc = check_config(ck, err);
    return rc ? rc : check_families(ck, err);
}

/* ---- a model ---- */

static bool is_of_adapter(const struct perta_checkpoint *ck)
{
    for (uint64_t i = 0; i < ck->n_tensors; i++)
        if (!begins_with(ck->by_name[i].tensor->name, "base_model.model."))
            return false;
    return ck->n_tensors;
}

int perta_which_model(const struct perta_checkpoint *ck, struct perta_err *err)
{
    const char *stat = NULL;
    for (uint32_t i = 0; i < ck->n_shards && !stat; i++)
        stat = stat_of(ck->shards[i].header);
    if (stat)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: an importance (its metadata say perta.stat %s), where a model is "
                          "wanted; --forget and --retain take it",
                          ck->path, stat);
    if (ck->is_adapter || !is_of_adapter(ck))
        return 0;
    const char *slash = strrchr(ck->path, '/');
    return perta_fail(
        err, PERTA_EINPUT,
        "%s: the weights of a PEFT adapter, where a model is wanted; as --tuned, give "
        "the folder that holds them and " PERTA_ADAPTER_CONFIG ": %.*s",
        ck->path, slash ? (int)(slash - ck->path) : 1, slash ? ck->path : ".");
}
