#include "io/publish/owned.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/index.h"
#include "io/format/patch_manifest.h"
#include "io/format/plain.h"
#include "io/format/safetensors.h"
#include "io/text.h"

#define SINGLE "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define ADAPTER "adapter_model.safetensors"
#define SHOWN_MAX 5 /* names listed in a message */

/* What writers of checkpoints put beside weights. Any other file may be somebody's only copy. */
static const char *const beside[] = {"config.json",
                                     INDEX,
                                     "adapter_config.json",
                                     "generation_config.json",
                                     "tokenizer*.json",
                                     "tokenizer.model*",
                                     "tekken.json",
                                     "special_tokens_map.json",
                                     "added_tokens.json",
                                     "vocab.json",
                                     "vocab.txt",
                                     "vocab.bpe",
                                     "merges.txt",
                                     "spiece.model",
                                     "spm.model",
                                     "sentencepiece.bpe.model",
                                     "*.tiktoken",
                                     "chat_template.jinja",
                                     "chat_template.json",
                                     "preprocessor_config.json",
                                     "processor_config.json",
                                     "video_preprocessor_config.json",
                                     "image_processor_config.json",
                                     "configuration.json",
                                     "params.json",
                                     "trainer_state.json",
                                     "modules.json",
                                     "README.md",
                                     "MODEL_CARD.md",
                                     "USE_POLICY.md",
                                     "LICENSE",
                                     "LICENSE.*",
                                     "LICENCE",
                                     "NOTICE",
                                     "NOTICE.*",
                                     "Notice",
                                     ".gitattributes"};

struct look {
    const char *path, *like;
    enum perta_owned as;
    char **names; /* (n), sorted */
    size_t n;
    struct perta_patch_manifest_files manifest;
    struct perta_index *index; /* NULL: no index */
    size_t n_shards;           /* how many of the names are *.safetensors */
    bool has_config;           /* config.json is that of a model */
    bool has_adapter;
    bool whole;        /* weights were found */
    char foreign[512]; /* names that do not belong, for the message */
    unsigned n_foreign;
};

/* ---- names ---- */

static int add_name(void *ctx, const char *name, struct perta_err *err)
{
    struct look *look = ctx;
    char **grown = realloc(look->names, (look->n + 1) * sizeof *grown);
    look->names = grown ? grown : look->names;
    if (!grown || !(look->names[look->n] = strdup(name)))
        return perta_fail_sys(err, ENOMEM, "%s", name);
    look->n++;
    look->n_shards += *name != '.' && perta_text_ends_in(name, ".safetensors");
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool has(const struct look *look, const char *name)
{
    return look->n && bsearch(&name, look->names, look->n, sizeof *look->names, compare_names);
}

static void add_foreign(struct look *look, const char *name, const char *why)
{
    size_t at = strlen(look->foreign);
    if (look->n_foreign++ < SHOWN_MAX)
        snprintf(look->foreign + at, sizeof look->foreign - at, "%s%.80s%s", at ? ", " : "", name,
                 why);
}

/* ---- files ---- */

/* Read the first n bytes of the file at path; missing ones are 0. */
static int read_start(const char *path, uint8_t *to, size_t n, uint64_t *len_bytes,
                      struct perta_err *err)
{
    struct stat st;
    memset(to, 0, n);
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    *len_bytes = (uint64_t)st.st_size;
    int rc = perta_pread_all(fd, to, *len_bytes < n ? *len_bytes : n, 0, path, err);
    close(fd);
    return rc;
}

/* Could a killed run have left this beginning of a shard? It is empty, zeros, or a valid start. */
static bool begins_as_shard(const uint8_t *start)
{
    static const uint8_t zeros[16] = {0}, frame[4] = {0x50, 0x2A, 0x4D, 0x18};
    return !memcmp(start, zeros, sizeof zeros) || start[8] == '{' || !memcmp(start, frame, 4);
}

static int is_shard_part(const char *path, bool *ours, struct perta_err *err)
{
    uint8_t start[16];
    uint64_t len_bytes;
    int rc = read_start(path, start, sizeof start, &len_bytes, err);
    *ours = !rc && begins_as_shard(start);
    return rc;
}

/* Is the whole file one JSON object? Parsed without a tree, and Python's extensions are
 * accepted. */
static int is_object(const struct look *look, const char *name, bool *ours, struct perta_err *err)
{
    char *path = perta_path_join(look->path, name), *text = NULL;
    size_t len_bytes = 0;
    int rc = path ? perta_file_text(path, &text, &len_bytes, err)
                  : perta_fail_sys(err, ENOMEM, "%s", name);
    struct perta_plain all = {text, text + len_bytes}, at = all;
    *ours =
        !rc && perta_plain_word(&at, "{") && perta_plain_pass(&all) && perta_plain_word(&all, "");
    free(text);
    free(path);
    return rc;
}

static bool has_key_of_model(struct perta_plain at)
{
    static const char *const keys[] = {"model_type", "architectures", "_class_name"};
    const char *key;
    size_t len;
    for (const char *mark = "{"; perta_plain_word(&at, mark); mark = ",") {
        if (!perta_plain_raw(&at, &key, &len) || !perta_plain_word(&at, ":"))
            return false;
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            if (perta_plain_is(key, len, keys[i]))
                return true;
        if (!perta_plain_pass(&at))
            return false;
    }
    return false;
}

/* Is there a config.json that names a model? Other programs have a config.json too. */
static int find_config(struct look *look, struct perta_err *err)
{
    struct stat st;
    size_t len_bytes = 0;
    char *path = perta_path_join(look->path, "config.json"), *text = NULL;
    int rc = path ? 0 : perta_fail_sys(err, ENOMEM, "%s", look->path);
    if (!rc && !lstat(path, &st) && S_ISREG(st.st_mode))
        rc = perta_file_text(path, &text, &len_bytes, err);
    look->has_config =
        !rc && text && has_key_of_model((struct perta_plain){text, text + len_bytes});
    free(text);
    free(path);
    return rc;
}

/* Read a safetensors header; *header is the caller's. If it does not parse, *header is NULL, which
 * is not an error. */
static int read_header(const char *path, struct perta_header **header, struct perta_err *err)
{
    struct perta_err why = {0};
    struct stat st;
    *header = NULL;
    int fd = perta_open_regular(path, &st, &why);
    int rc = fd < 0 ? fd : perta_safetensors_read(fd, (uint64_t)st.st_size, path, header, &why);
    if (fd >= 0)
        close(fd);
    if (rc == PERTA_ESYS)
        *err = why;
    return rc == PERTA_ESYS ? rc : 0;
}

static int parses(const char *path, bool *ours, struct perta_err *err)
{
    struct perta_header *header;
    int rc = read_header(path, &header, err);
    *ours = header;
    perta_header_free(header);
    return rc;
}

/* 1 if the files at a and b are byte-identical, or, with beginning, b begins with the bytes of a;
 * else 0. */
static int compare_files(const char *a, const char *b, bool beginning, struct perta_err *err)
{
    struct stat sa, sb;
    if (stat(b, &sb) || !S_ISREG(sb.st_mode)) /* follow links: a cache links to its files */
        return 0;
    int fa = perta_open_regular(a, &sa, err);
    int fb = fa < 0 ? fa : perta_open_regular(b, &sb, err);
    int same = fb < 0 ? fb : sa.st_size == sb.st_size || (beginning && sa.st_size < sb.st_size);
    for (uint64_t at = 0, n; same == 1 && at < (uint64_t)sa.st_size; at += n) {
        char x[16384], y[16384];
        n = (uint64_t)sa.st_size - at;
        n = n < sizeof x ? n : sizeof x;
        int rc = perta_pread_all(fa, x, n, at, a, err);
        if (!rc)
            rc = perta_pread_all(fb, y, n, at, b, err);
        same = rc ? rc : !memcmp(x, y, n);
    }
    if (fa >= 0)
        close(fa);
    if (fb >= 0)
        close(fb);
    return same;
}

/* Find the file called name in like, a folder or a file. *other is the caller's; NULL if there is
 * none. */
static int find_like(const struct look *look, const char *name, char **other, struct perta_err *err)
{
    struct stat st;
    *other = NULL;
    if (!look->like)
        return 0;
    const char *slash = strrchr(look->like, '/');
    bool is_folder = !stat(look->like, &st) && S_ISDIR(st.st_mode);
    if (!is_folder && strcmp(slash ? slash + 1 : look->like, name))
        return 0;
    *other = is_folder ? perta_path_join(look->like, name) : strdup(look->like);
    return *other ? 0 : perta_fail_sys(err, ENOMEM, "%s", name);
}

static int is_copy(const struct look *look, const char *path, const char *name, bool *ours,
                   struct perta_err *err)
{
    char *other;
    int rc = find_like(look, name, &other, err);
    int same = other ? compare_files(path, other, look->as == PERTA_OWNED_LEFTOVER, err) : 0;
    free(other);
    *ours = same > 0;
    return rc ? rc : same < 0 ? same : 0;
}

/* Was the shard made from the one of the same name in like? An edit keeps the header. */
static int is_made_from(const struct look *look, const char *path, const char *name, bool *ours,
                        struct perta_err *err)
{
    struct stat st;
    struct perta_header *mine = NULL, *theirs = NULL;
    char *other;
    int rc = find_like(look, name, &other, err);
    if (!rc && other && !stat(other, &st) && S_ISREG(st.st_mode))
        rc = read_header(other, &theirs, err);
    if (!rc && theirs)
        rc = read_header(path, &mine, err);
    *ours = mine && perta_header_same(mine, theirs);
    perta_header_free(mine);
    perta_header_free(theirs);
    free(other);
    return rc;
}

/* ---- files of an output ---- */

static bool is_of_patch(const struct look *look, const char *name)
{
    for (size_t i = 0; i < look->manifest.n; i++)
        if (perta_plain_is(look->manifest.all[i].name, look->manifest.all[i].len, name))
            return true;
    return !strcmp(name, PERTA_PATCH_MANIFEST);
}

static bool is_indexed(const struct look *look, const char *name)
{
    for (size_t i = 0; look->index && i < look->index->n; i++)
        if (look->index->entries[i].shard && !strcmp(look->index->entries[i].shard, name))
            return true;
    return false;
}

/* Is it named as weights of this model? A folder of unrelated adapters or models is not an
 * output. */
static bool is_weights(const struct look *look, const char *name)
{
    return !strcmp(name, SINGLE) || is_indexed(look, name) ||
           !fnmatch("model-[0-9]*-of-[0-9]*.safetensors", name, 0) ||
           (look->has_adapter && !strcmp(name, ADAPTER)) ||
           (look->has_config &&
            (!fnmatch("model.*.safetensors", name, 0) ||
             !fnmatch("consolidated*.safetensors", name, 0) || look->n_shards == 1));
}

static bool is_beside(const char *name)
{
    for (size_t i = 0; i < sizeof beside / sizeof *beside; i++)
        if (!fnmatch(beside[i], name, FNM_PERIOD))
            return true;
    return false;
}

static int judge_output(struct look *look, const char *path, const char *name, bool *ours,
                        const char **why, struct perta_err *err)
{
    if (look->manifest.is_patch) {
        *ours = is_of_patch(look, name);
        return 0;
    }
    if (*name != '.' && perta_text_ends_in(name, ".safetensors")) {
        bool named = is_weights(look, name);
        int rc = named ? parses(path, ours, err) : is_made_from(look, path, name, ours, err);
        *why = named ? " (damaged)" : "";
        look->whole |= *ours;
        return rc;
    }
    if (!strcmp(name, "config.json") || !strcmp(name, "adapter_config.json")) {
        *why = " (not a JSON object)";
        return is_object(look, name, ours, err);
    }
    if (!strcmp(name, INDEX) && !look->index)
        *why = " (damaged)";
    else
        *ours = is_beside(name);
    return 0;
}

/* ---- files of a leftover ---- */

#define SCRATCH "perta-scratch"

static bool is_scratch(const struct look *look, const char *name)
{
    return perta_text_ends_in(look->path, "/" SCRATCH) &&
           (!fnmatch("x-[0-9]*", name, 0) || !fnmatch("dx-[0-9]*", name, 0) ||
            !fnmatch("tune-[0-9]*", name, 0));
}

static int judge_leftover(struct look *look, const char *path, const char *name, bool *ours,
                          struct perta_err *err)
{
    uint8_t first;
    uint64_t len_bytes;
    if (*name == '.') { /* perta writes no hidden files */
        *ours = is_beside(name);
        return 0;
    }
    if (perta_text_ends_in(name, ".safetensors") || perta_text_ends_in(name, ".perta"))
        return is_shard_part(path, ours, err);
    if (!strcmp(name, PERTA_PATCH_MANIFEST)) { /* one that is incomplete is not JSON */
        int rc = read_start(path, &first, 1, &len_bytes, err);
        *ours = !rc &&
                (look->manifest.is_patch || (!look->manifest.is_whole && (first == '{' || !first)));
        return rc;
    }
    *ours = is_beside(name) || perta_text_ends_in(name, ".perta-journal") || is_scratch(look, name);
    return 0;
}

/* Is it a work folder of estimate or of steps? */
static bool is_work_folder(const char *name)
{
    static const char *const work[] = {SCRATCH,
                                       "scales-[0-9]*",
                                       "gradients-[0-9]*",
                                       "box",
                                       "taught-[0-9]*",
                                       "sum-[0-9]*",
                                       "mean",
                                       "meansq",
                                       "*.perta-partial",
                                       "*.perta-replaced"};
    for (size_t i = 0; i < sizeof work / sizeof *work; i++)
        if (!fnmatch(work[i], name, FNM_PERIOD))
            return true;
    return false;
}

/* ---- the folder ---- */

bool perta_is_mount_point(const char *path)
{
    struct statx sx;
    return !statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &sx) &&
           (sx.stx_attributes & STATX_ATTR_MOUNT_ROOT);
}

static int judge_file(struct look *look, const char *path, const char *name, struct perta_err *err)
{
    bool ours = false;
    const char *why = "";
    int rc = look->as == PERTA_OWNED_OUTPUT ? judge_output(look, path, name, &ours, &why, err)
                                            : judge_leftover(look, path, name, &ours, err);
    if (!rc && !ours)
        rc = is_copy(look, path, name, &ours, err);
    if (!rc && !ours)
        add_foreign(look, name, why);
    return rc;
}

static int judge(struct look *look, const char *path, const char *name, struct perta_err *err)
{
    struct stat st;
    if (lstat(path, &st))
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", path);
    if (perta_is_mount_point(path))
        add_foreign(look, name, " (a mount point)");
    else if (S_ISREG(st.st_mode))
        return judge_file(look, path, name, err);
    else if (look->as == PERTA_OWNED_LEFTOVER && S_ISLNK(st.st_mode) &&
             (is_scratch(look, name) || !strcmp(name, SCRATCH)))
        return 0; /* the link is removed, not what it leads to */
    else if (!S_ISDIR(st.st_mode))
        add_foreign(look, name, S_ISLNK(st.st_mode) ? " (a link)" : " (not a regular file)");
    else if (look->as == PERTA_OWNED_LEFTOVER && is_work_folder(name))
        return perta_owned_check(path, look->as, NULL, err);
    else
        add_foreign(look, name, "/");
    return 0;
}

static int open_index(struct look *look, struct perta_err *err)
{
    struct perta_err why = {0};
    char *path = perta_path_join(look->path, INDEX);
    int rc = path ? perta_index_read(path, &look->index, &why)
                  : perta_fail_sys(&why, ENOMEM, "%s", look->path);
    free(path);
    if (rc == PERTA_ESYS)
        *err = why;
    return rc == PERTA_ESYS ? rc : 0;
}

static int look_open(struct look *look, const char *path, enum perta_owned as, const char *like,
                     struct perta_err *err)
{
    *look = (struct look){.path = path, .as = as, .like = like};
    int rc = perta_folder_each(path, add_name, look, err);
    if (look->n)
        qsort(look->names, look->n, sizeof *look->names, compare_names);
    look->has_adapter = has(look, "adapter_config.json");
    if (!rc && as == PERTA_OWNED_OUTPUT)
        rc = find_config(look, err);
    if (!rc && has(look, PERTA_PATCH_MANIFEST))
        rc = perta_patch_manifest_scan(path, &look->manifest, err);
    return rc || !has(look, INDEX) || as != PERTA_OWNED_OUTPUT ? rc : open_index(look, err);
}

static void look_close(struct look *look)
{
    for (size_t i = 0; i < look->n; i++)
        free(look->names[i]);
    free(look->names);
    perta_patch_manifest_release(&look->manifest);
    perta_index_free(look->index);
}

static int refuse(const struct look *look, struct perta_err *err)
{
    char more[32] = "";
    if (look->n_foreign > SHOWN_MAX)
        snprintf(more, sizeof more, " and %u more", look->n_foreign - SHOWN_MAX);
    if (look->as == PERTA_OWNED_LEFTOVER)
        return perta_fail(
            err, PERTA_EUSAGE,
            "%s: holds files that no run of perta left there: %s%s; nothing is removed; "
            "move them away, or choose another output",
            look->path, look->foreign, more);
    if (!look->manifest.is_patch && !look->whole)
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: exists and is neither a checkpoint nor a patch (it holds %s%s); "
                          "--force does not replace it",
                          look->path, *look->foreign ? look->foreign : "no weights", more);
    return perta_fail(
        err, PERTA_EUSAGE,
        "%s: exists and holds files that are not part of a %s: %s%s; --force does not replace "
        "it; move them away, or choose another name",
        look->path, look->manifest.is_patch ? "patch" : "checkpoint", look->foreign, more);
}

static int check(struct look *look, struct perta_err *err)
{
    int rc =
        perta_is_mount_point(look->path)
            ? perta_fail(err, PERTA_EUSAGE, "%s: exists and is a mount point; it stays", look->path)
            : 0;
    for (size_t i = 0; i < look->n && !rc; i++) {
        char *path = perta_path_join(look->path, look->names[i]);
        rc = path ? judge(look, path, look->names[i], err)
                  : perta_fail_sys(err, ENOMEM, "%s", look->path);
        free(path);
    }
    bool whole =
        look->manifest.is_patch || look->whole || !look->n || look->as == PERTA_OWNED_LEFTOVER;
    return rc || (whole && !look->n_foreign) ? rc : refuse(look, err);
}

int perta_owned_check(const char *path, enum perta_owned as, const char *like,
                      struct perta_err *err)
{
    struct look look;
    int rc = look_open(&look, path, as, like, err);
    if (!rc)
        rc = check(&look, err);
    look_close(&look);
    return rc;
}

/* Remove the names that were checked, and no others. */
static int remove_names(const struct look *look, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < look->n && !rc; i++) {
        struct stat st;
        char *path = perta_path_join(look->path, look->names[i]);
        if (!path)
            rc = perta_fail_sys(err, ENOMEM, "%s", look->path);
        else if (look->as == PERTA_OWNED_LEFTOVER && !lstat(path, &st) && S_ISDIR(st.st_mode))
            rc = perta_owned_remove(path, look->as, NULL, err);
        else if (unlink(path) && errno != ENOENT)
            rc = perta_fail_sys(err, errno, "%s", path);
        free(path);
    }
    if (!rc && rmdir(look->path) && errno != ENOENT)
        rc = perta_fail_sys(err, errno, "%s: not removed", look->path);
    return rc;
}

int perta_owned_remove(const char *path, enum perta_owned as, const char *like,
                       struct perta_err *err)
{
    struct look look;
    int rc = look_open(&look, path, as, like, err);
    if (!rc)
        rc = check(&look, err);
    if (!rc)
        rc = remove_names(&look, err);
    look_close(&look);
    return rc;
}
