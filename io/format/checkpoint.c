#include "io/format/checkpoint.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/index.h"
#include "io/format/python_json.h"
#include "io/format/which.h"
#include "io/text.h"
#include "io/wal.h"

#define SUFFIX ".safetensors"
#define SINGLE_NAME "model.safetensors"
#define ADAPTER_NAME "adapter_model.safetensors"

static char *join(const char *folder, const char *name)
{
    char *path = NULL;
    return asprintf(&path, "%s/%s", folder, name) < 0 ? NULL : path;
}

static bool exists(const char *folder, const char *name)
{
    char path[PATH_MAX]; /* on the stack: the answer must not depend on memory */
    int n = snprintf(path, sizeof path, "%s/%s", folder, name);
    return n > 0 && n < PATH_MAX && !access(path, F_OK);
}

/* ---- files ---- */

static bool is_inside(const char *path, const char *folder, const char *below)
{
    size_t n = strlen(folder), m = strlen(below);
    return !strncmp(path, folder, n) && !strncmp(path + n, below, m);
}

/* The Hugging Face cache has MODEL/snapshots/REVISION/NAME -> ../../blobs/DIGEST, and deeper links
 * from folders within the revision. */
static bool is_in_cache_blobs(const char *path, const char *folder)
{
    char model[PATH_MAX];
    snprintf(model, sizeof model, "%s", folder);
    for (char *slash; (slash = strrchr(model, '/'));) {
        *slash = '\0';
        if (!perta_text_ends_in(model, "/snapshots"))
            continue;
        *strrchr(model, '/') = '\0';
        return is_inside(path, model, "/blobs/");
    }
    return false;
}

int perta_check_link(const char *folder, const char *path, struct perta_err *err)
{
    struct stat st;
    if (lstat(path, &st) || !S_ISLNK(st.st_mode))
        return 0; /* a missing file is reported when it is opened */
    char real_folder[PATH_MAX], real_path[PATH_MAX];
    if (!realpath(folder, real_folder))
        return perta_fail_sys(err, errno, "%s", folder);
    if (!realpath(path, real_path))
        return errno == ENOMEM ? perta_fail_sys(err, errno, "%s", path)
                               : perta_fail(err, PERTA_EINPUT, "%s: a broken symbolic link", path);
    if (is_inside(real_path, real_folder, "/") || is_in_cache_blobs(real_path, real_folder))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: a link to %s, outside its folder; put the file into the folder, "
                      "or name the folder that holds it",
                      path, real_path);
}

static int read_json(const char *path, json_t **out, struct perta_err *err)
{
    struct stat st;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    int rc = perta_json_load(fd, path, out, err);
    close(fd);
    return rc;
}

/* A checkpoint opens without a readable config: then only tied embeddings are not known to be tied.
 * A read error is an error. */
static int read_config(const char *path, json_t **out, char **flaw, struct perta_err *err)
{
    struct perta_err why = {0};
    struct stat st;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    int rc = perta_python_json_load(fd, path, out, &why);
    close(fd);
    if (rc == PERTA_ESYS)
        *err = why;
    else if (rc && !(*flaw = strdup(why.msg)))
        return perta_fail_sys(err, ENOMEM, "%s", path);
    return err->code;
}

/* ---- shards ---- */

static int add_shard(struct perta_checkpoint *ck, const char *folder, const char *name,
                     struct perta_err *err)
{
    if (!perta_name_is_plain(name))
        return perta_fail(
            err, PERTA_EINPUT,
            "%s: shard \"%s\": its name has a control character or a dot in front, is not "
            "UTF-8, or is longer than %u bytes; rename it",
            ck->path, name, PERTA_NAME_MAX_BYTES);
    assert(ck->path);
    struct perta_shard *shard = &ck->shards[ck->n_shards++];
    shard->name = strdup(name);
    shard->path = folder ? join(folder, name) : strdup(ck->path);
    if (!shard->name || !shard->path)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    int rc = folder ? perta_check_link(folder, shard->path, err) : 0;
    if (rc)
        return rc;
    struct stat st;
    int fd = perta_open_regular(shard->path, &st, err);
    if (fd < 0)
        return fd;
    shard->dev = st.st_dev;
    shard->ino = st.st_ino;
    shard->size_bytes = (uint64_t)st.st_size;
    shard->mtime = st.st_mtim;
    shard->ctime = st.st_ctim;
    rc = perta_safetensors_read(fd, shard->size_bytes, shard->path, &shard->header, err);
    close(fd);
    if (!rc)
        ck->n_tensors += shard->header->n_tensors;
    return rc;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Add the shards in names (n, may repeat), sorted by name. */
static int add_shards(struct perta_checkpoint *ck, const char **names, size_t n,
                      struct perta_err *err)
{
    ck->shards = calloc(n + 1, sizeof *ck->shards);
    if (!ck->shards)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    qsort(names, n, sizeof *names, compare_names);
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++)
        if (!i || strcmp(names[i], names[i - 1]))
            rc = add_shard(ck, ck->path, names[i], err);
    return rc;
}

/* ---- the index ---- */

static int check_shard_name(const char *name, const char *path, const char *tensor,
                            struct perta_err *err)
{
    if (!perta_name_is_plain(name))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: shard \"%.300s\" is not a plain file name in the "
                          "folder",
                          path, tensor, name);
    if (!perta_text_ends_in(name, SUFFIX))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: shard \"%.200s\" is not a " SUFFIX " file", path, tensor,
                          name);
    return 0;
}

static int check_entry(const struct perta_index_entry *e, const char *path, struct perta_err *err)
{
    return e->shard
               ? check_shard_name(e->shard, path, e->tensor, err)
               : perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no shard name", path, e->tensor);
}

static int open_indexed(struct perta_checkpoint *ck, const char *path, struct perta_err *err)
{
    int rc = perta_index_read(path, &ck->index, err);
    if (rc)
        return rc;
    const char **names = calloc(ck->index->n + 1, sizeof *names);
    if (!names)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    size_t n = 0;
    for (size_t i = 0; i < ck->index->n && !rc; i++) {
        const struct perta_index_entry *e = &ck->index->entries[i];
        if (n && e->shard && !strcmp(names[n - 1], e->shard))
            continue;
        rc = check_entry(e, path, err);
        names[n++] = e->shard;
    }
    if (!rc)
        rc = add_shards(ck, names, n, err);
    free(names);
    return rc;
}

/* Check that shards and index name the same tensors. Both are sorted by name. */
static int check_index(const struct perta_checkpoint *ck, struct perta_err *err)
{
    const struct perta_ref *unnamed = NULL; /* the first tensor that the index lacks */
    uint64_t t = 0;
    for (size_t i = 0; i <= ck->index->n; i++) {
        const struct perta_index_entry *e = i < ck->index->n ? &ck->index->entries[i] : NULL;
        int order = -1;
        for (; t < ck->n_tensors; t++) {
            order = e ? strcmp(ck->by_name[t].tensor->name, e->tensor) : -1;
            if (order >= 0)
                break;
            unnamed = unnamed ? unnamed : &ck->by_name[t];
        }
        if (!e)
            break;
        if (order)
            return perta_fail(err, PERTA_EINPUT,
                              "%s/" PERTA_INDEX_NAME ": tensor %s should be in %s, which does "
                              "not have it",
                              ck->path, e->tensor, e->shard);
        const char *shard = ck->shards[ck->by_name[t++].shard].name;
        if (strcmp(shard, e->shard))
            return perta_fail(err, PERTA_EINPUT,
                              "%s/" PERTA_INDEX_NAME ": tensor %s should be in %s, but is in %s",
                              ck->path, e->tensor, e->shard, shard);
    }
    return unnamed ? perta_fail(err, PERTA_EINPUT, "%s: tensor %s is not in " PERTA_INDEX_NAME,
                                ck->shards[unnamed->shard].path, unnamed->tensor->name)
                   : 0;
}

/* ---- folders without an index ---- */

struct names {
    char **all; /* (n) */
    size_t n;
};

static int add_name(void *ctx, const char *name, struct perta_err *err)
{
    struct names *names = ctx;
    if (*name == '.' || !perta_text_ends_in(name, SUFFIX))
        return 0;
    char **grown = realloc(names->all, (names->n + 1) * sizeof *grown);
    names->all = grown ? grown : names->all;
    if (!grown || !(names->all[names->n] = strdup(name)))
        return perta_fail_sys(err, ENOMEM, "%s", name);
    names->n++;
    return 0;
}

static int open_listed(struct perta_checkpoint *ck, struct perta_err *err)
{
    const char *single = SINGLE_NAME;
    if (exists(ck->path, SINGLE_NAME))
        return add_shards(ck, &single, 1, err);
    if (exists(ck->path, PERTA_ADAPTER_CONFIG))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: a PEFT adapter, not a checkpoint; perta unlearn takes it as "
                          "--tuned, for anything else merge it into its base first "
                          "(merge_and_unload, save_pretrained)",
                          ck->path);
    struct names names = {0};
    int rc = perta_folder_each(ck->path, add_name, &names, err);
    if (!rc)
        rc = names.n ? add_shards(ck, (const char **)names.all, names.n, err)
                     : perta_which_no_folder(ck->path, err);
    for (size_t i = 0; i < names.n; i++)
        free(names.all[i]);
    free(names.all);
    return rc;
}

static int open_config(struct perta_checkpoint *ck, const char *folder, struct perta_err *err)
{
    ck->config_path = join(folder, "config.json");
    if (!ck->config_path)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    int rc = perta_check_link(folder, ck->config_path, err);
    return rc || access(ck->config_path, F_OK)
               ? rc
               : read_config(ck->config_path, &ck->config, &ck->config_flaw, err);
}

static int open_folder(struct perta_checkpoint *ck, struct perta_err *err)
{
    char *index = join(ck->path, PERTA_INDEX_NAME);
    int rc = index ? perta_check_link(ck->path, index, err)
                   : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    if (!rc)
        rc = access(index, F_OK) ? open_listed(ck, err) : open_indexed(ck, index, err);
    if (!rc)
        rc = open_config(ck, ck->path, err);
    if (!rc)
        rc = perta_which_one(ck, err);
    free(index);
    return rc;
}

/* ---- all tensors ---- */

static int compare_refs(const void *a, const void *b)
{
    const struct perta_ref *x = a, *y = b;
    return strcmp(x->tensor->name, y->tensor->name);
}

static bool is_sorted(const struct perta_ref *refs, uint64_t n)
{
    for (uint64_t i = 1; i < n; i++)
        if (compare_refs(&refs[i - 1], &refs[i]) > 0)
            return false;
    return true;
}

int perta_checkpoint_sort(struct perta_checkpoint *ck, struct perta_err *err)
{
    ck->n_tensors = 0;
    for (uint32_t s = 0; s < ck->n_shards; s++)
        ck->n_tensors += ck->shards[s].header->n_tensors;
    free(ck->by_name);
    ck->by_name = calloc(ck->n_tensors + 1, sizeof *ck->by_name);
    if (!ck->by_name)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    uint64_t n = 0;
    for (uint32_t s = 0; s < ck->n_shards; s++)
        for (uint64_t i = 0; i < ck->shards[s].header->n_tensors; i++)
            ck->by_name[n++] = (struct perta_ref){&ck->shards[s].header->tensors[i], s};
    if (!is_sorted(ck->by_name, n))
        qsort(ck->by_name, n, sizeof *ck->by_name, compare_refs);
    for (uint64_t i = 1; i < n; i++) {
        const struct perta_ref *a = &ck->by_name[i - 1], *b = &ck->by_name[i];
        if (!compare_refs(a, b))
            return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is in %s and in %s", ck->path,
                              a->tensor->name, ck->shards[a->shard].name,
                              ck->shards[b->shard].name);
    }
    return 0;
}

/* ---- adapters ---- */

bool perta_checkpoint_is_adapter(const char *path)
{
    return exists(path, PERTA_ADAPTER_CONFIG) && !exists(path, SINGLE_NAME) &&
           !exists(path, PERTA_INDEX_NAME);
}

static int open_adapter(struct perta_checkpoint *ck, struct perta_err *err)
{
    const char *name = ADAPTER_NAME;
    ck->is_adapter = true;
    ck->config_path = join(ck->path, PERTA_ADAPTER_CONFIG);
    int rc = ck->config_path ? perta_check_link(ck->path, ck->config_path, err)
                             : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    if (!rc)
        rc = read_json(ck->config_path, &ck->config, err);
    if (!rc && !exists(ck->path, ADAPTER_NAME))
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: no " ADAPTER_NAME " beside " PERTA_ADAPTER_CONFIG
                        "; load the adapter with PEFT and save it again (save_pretrained writes "
                        "safetensors)",
                        ck->path);
    if (!rc)
        rc = add_shards(ck, &name, 1, err);
    return rc ? rc : perta_checkpoint_sort(ck, err);
}

/* ---- any ---- */

static int open_single(struct perta_checkpoint *ck, struct perta_err *err)
{
    if (!perta_text_ends_in(ck->path, SUFFIX))
        return perta_which_no_file(ck->path, err);
    ck->shards = calloc(1, sizeof *ck->shards);
    if (!ck->shards)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    const char *slash = strrchr(ck->path, '/'), *name = slash ? slash + 1 : ck->path;
    int rc = add_shard(ck, NULL, name, err);
    if (rc || strcmp(name, SINGLE_NAME))
        return rc;
    char *folder =
        slash ? strndup(ck->path, slash == ck->path ? 1 : (size_t)(slash - ck->path)) : strdup(".");
    rc = folder ? open_config(ck, folder, err) : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    free(folder);
    return rc;
}

static int open_any(struct perta_checkpoint *ck, struct perta_err *err)
{
    struct stat st;
    int rc = perta_path_stat(ck->path, &st, err);
    if (!rc)
        rc = S_ISDIR(st.st_mode) ? open_folder(ck, err) : open_single(ck, err);
    if (!rc)
        rc = perta_checkpoint_sort(ck, err);
    if (!rc && ck->index)
        rc = check_index(ck, err);
    perta_index_free(ck->index);
    ck->index = NULL;
    return rc;
}

static int open_as(const char *path, int (*open_it)(struct perta_checkpoint *, struct perta_err *),
                   struct perta_checkpoint **out, struct perta_err *err)
{
    *out = NULL;
    struct perta_checkpoint *ck = calloc(1, sizeof *ck);
    if (!ck || !(ck->path = strdup(path))) {
        free(ck);
        return perta_fail_sys(err, ENOMEM, "%s", path);
    }
    /* "model/" is the same folder as "model", which reads better in messages. */
    for (size_t n = strlen(ck->path); n > 1 && ck->path[n - 1] == '/'; n--)
        ck->path[n - 1] = '\0';
    int rc = open_it(ck, err);
    if (rc) {
        perta_checkpoint_close(ck);
        return rc;
    }
    *out = ck;
    return 0;
}

int perta_checkpoint_open(const char *path, struct perta_checkpoint **out, struct perta_err *err)
{
    *out = NULL;
    int rc = perta_wal_refuse(path, err);
    return rc ? rc : open_as(path, open_any, out, err);
}

int perta_checkpoint_open_unfinished(const char *path, struct perta_checkpoint **out,
                                     struct perta_err *err)
{
    return open_as(path, open_any, out, err);
}

int perta_checkpoint_open_adapter(const char *path, struct perta_checkpoint **out,
                                  struct perta_err *err)
{
    return open_as(path, open_adapter, out, err);
}

const struct perta_ref *perta_checkpoint_find(const struct perta_checkpoint *ck, const char *name)
{
    struct perta_tensor wanted = {.name = (char *)name};
    struct perta_ref key = {.tensor = &wanted};
    return bsearch(&key, ck->by_name, ck->n_tensors, sizeof key, compare_refs);
}

/* Copy name to `to` without the given parts (ending with NULL), each with its dot, at the start or
 * after a dot. Returns the end of the copy. */
static char *copy_without(char *to, const char *name, const char *const *parts)
{
    for (bool at_part = true; *name; at_part = *to++ == '.', name++) {
        for (const char *const *part = parts; at_part && *part;) {
            bool found = !strncmp(name, *part, strlen(*part));
            name += found ? strlen(*part) : 0;
            part = found ? parts : part + 1;
        }
        if (!(*to = *name))
            return to;
    }
    *to = 0;
    return to;
}

/* Rename every tensor: remove strip characters in front and the parts, then prepend add. */
static int rename_all(struct perta_checkpoint *ck, size_t strip, const char *const *parts,
                      const char *add, struct perta_err *err)
{
    size_t room = 1, added = strlen(add);
    for (uint32_t s = 0; s < ck->n_shards; s++)
        for (uint64_t i = 0; i < ck->shards[s].header->n_tensors; i++)
            room += strlen(ck->shards[s].header->tensors[i].name) - strip + added + 1;
    char *names = malloc(room), *at = names;
    if (!names)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    for (uint32_t s = 0; s < ck->n_shards; s++)
        for (uint64_t i = 0; i < ck->shards[s].header->n_tensors; i++) {
            struct perta_tensor *tensor = &ck->shards[s].header->tensors[i];
            char *end = copy_without(stpcpy(at, add), tensor->name + strip, parts);
            tensor->name = at;
            at = end + 1;
        }
    free(ck->names);
    ck->names = names;
    return 0;
}

int perta_checkpoint_rename(struct perta_checkpoint *ck, size_t strip, const char *add,
                            struct perta_err *err)
{
    static const char *const none[] = {NULL};
    return rename_all(ck, strip, none, add, err); /* the order of by_name stays */
}

int perta_checkpoint_drop(struct perta_checkpoint *ck, const char *const *parts,
                          struct perta_err *err)
{
    int rc = rename_all(ck, 0, parts, "", err);
    if (rc)
        return rc;
    qsort(ck->by_name, ck->n_tensors, sizeof *ck->by_name, compare_refs);
    for (uint64_t i = 1; i < ck->n_tensors; i++)
        if (!compare_refs(&ck->by_name[i - 1], &ck->by_name[i]))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: two tensors are %s once the parts of wrappers (%s...) "
                              "are removed from their names",
                              ck->path, ck->by_name[i].tensor->name, parts[0]);
    return 0;
}

static bool same_time(const struct timespec *a, const struct timespec *b)
{
    return a->tv_sec == b->tv_sec && a->tv_nsec == b->tv_nsec;
}

static int check_same(const struct perta_shard *shard, const struct stat *st, struct perta_err *err)
{
    if (st->st_dev == shard->dev && st->st_ino == shard->ino &&
        (uint64_t)st->st_size == shard->size_bytes && same_time(&st->st_mtim, &shard->mtime) &&
        same_time(&st->st_ctim, &shard->ctime))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: changed since its header was read; run again when nothing writes to it",
                      shard->path);
}

int perta_shard_open(const struct perta_shard *shard, bool want_direct, struct perta_file *file,
                     struct perta_err *err)
{
    struct stat st;
    int rc = perta_file_open(file, shard->path, want_direct, err);
    if (rc)
        return rc;
    return fstat(file->fd, &st) ? perta_fail_sys(err, errno, "%s", shard->path)
                                : check_same(shard, &st, err);
}

static int check_config(const struct perta_checkpoint *ck, struct perta_err *err)
{
    json_t *now = NULL;
    char *flaw = NULL;
    const char *path = ck->config_path;
    int rc = !path || access(path, F_OK) ? 0 : read_config(path, &now, &flaw, err);
    if (!rc && now != ck->config && !json_equal(now, ck->config))
        rc = perta_fail(err, PERTA_EINPUT, "%s: changed since it was first read", path);
    json_decref(now);
    free(flaw);
    return rc;
}

int perta_checkpoint_unchanged(const struct perta_checkpoint *ck, struct perta_err *err)
{
    struct stat st;
    int rc = check_config(ck, err);
    for (uint32_t i = 0; i < ck->n_shards && !rc; i++) {
        rc = perta_path_stat(ck->shards[i].path, &st, err);
        if (!rc)
            rc = check_same(&ck->shards[i], &st, err);
    }
    return rc;
}

void perta_checkpoint_close(struct perta_checkpoint *ck)
{
    if (!ck)
        return;
    for (uint32_t s = 0; s < ck->n_shards; s++) {
        free(ck->shards[s].name);
        free(ck->shards[s].path);
        perta_header_free(ck->shards[s].header);
    }
    free(ck->shards);
    free(ck->by_name);
    free(ck->names);
    json_decref(ck->config);
    free(ck->config_flaw);
    free(ck->config_path);
    free(ck->path);
    free(ck);
}
