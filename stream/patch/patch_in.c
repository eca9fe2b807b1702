#include "stream/patch/patch_in.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/format/patch_manifest.h"
#include "io/format/which.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "stream/input.h"

typedef unsigned long long ull;

bool perta_patch_in_is_patch(const char *path)
{
    struct perta_err why = {0};
    struct perta_digest_hex hex;
    json_t *manifest;
    char file[PATH_MAX];
    int n = snprintf(file, sizeof file, "%s/manifest.json", path);
    if (n < 0 || n >= PATH_MAX || access(file, F_OK))
        return false;
    /* If it cannot be read, assume that it is: opening it reports the error. */
    bool is = perta_patch_manifest_load(path, false, &manifest, &hex, &why) == PERTA_ESYS;
    is = is || perta_patch_manifest_is(manifest);
    json_decref(manifest);
    return is;
}

static int name_shard(struct perta_patch_in_shard *shard, const char *dir, const char *name,
                      struct perta_err *err)
{
    size_t len = strlen(name), suffix = sizeof PERTA_PATCH_SUFFIX - 1;
    if (len <= suffix || strcmp(name + len - suffix, PERTA_PATCH_SUFFIX))
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: %s is not the name of a patch file",
                          dir, name);
    shard->file_name = strdup(name);
    shard->name = strndup(name, len - suffix);
    if (shard->name && !perta_name_is_plain(shard->name))
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: %.300s is not a plain file name",
                          dir, name);
    shard->path = perta_path_join(dir, name);
    if (!shard->file_name || !shard->name || !shard->path)
        return perta_fail_sys(err, ENOMEM, "%s", dir);
    return 0;
}

static int read_shard(struct perta_patch_in_shard *shard, const char *dir, struct perta_err *damage,
                      struct perta_err *err)
{
    struct stat st;
    if (lstat(shard->path, &st) && errno == ENOENT)
        return perta_fail(err, PERTA_ECHECK, "%s: missing", shard->path);
    int rc = perta_check_link(dir, shard->path, err);
    int fd = rc ? rc : perta_open_regular(shard->path, &st, err);
    if (fd < 0)
        return fd;
    rc = perta_patch_read(fd, (uint64_t)st.st_size, shard->path, damage, &shard->patch, err);
    close(fd);
    return rc;
}

struct on_damage {
    void (*tell)(void *ctx, uint32_t shard, const char *message); /* NULL: damage is an error */
    void *ctx;
};

static int read_or_tell(struct perta_patch_in *in, uint32_t i, const struct on_damage *on,
                        struct perta_err *err)
{
    struct perta_err damage = {0}, why = {0};
    if (!on->tell)
        return read_shard(&in->shards[i], in->path, NULL, err);
    int rc = read_shard(&in->shards[i], in->path, &damage, &why);
    if (rc == PERTA_ESYS) {
        *err = why;
        return rc;
    }
    if (damage.code)
        on->tell(on->ctx, i, damage.msg);
    if (rc)
        on->tell(on->ctx, i, why.msg);
    return 0;
}

static int read_shards(struct perta_patch_in *in, const struct on_damage *on, struct perta_err *err)
{
    const json_t *list = json_object_get(json_object_get(in->manifest, "outputs"), "patch");
    size_t n = json_array_size(list);
    if (!n)
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: outputs.patch names no file",
                          in->path);
    in->shards = calloc(n + 1, sizeof *in->shards);
    if (!in->shards)
        return perta_fail_sys(err, ENOMEM, "%s", in->path);
    for (size_t i = 0; i < n; i++) {
        const char *name = json_string_value(json_object_get(json_array_get(list, i), "name"));
        in->shards[i].file.fd = -1;
        in->n_shards++;
        int rc = name ? name_shard(&in->shards[i], in->path, name, err)
                      : perta_fail(err, PERTA_EINPUT,
                                   "%s/manifest.json: outputs.patch[%zu] has no name", in->path, i);
        if (rc)
            return rc;
        if (i && strcmp(in->shards[i - 1].name, in->shards[i].name) >= 0)
            return perta_fail(err, PERTA_EINPUT,
                              "%s/manifest.json: outputs.patch is not sorted by name", in->path);
    }
    int rc = 0;
    for (uint32_t i = 0; i < n && !rc; i++)
        rc = read_or_tell(in, i, on, err);
    return rc;
}

static int not_a_patch(const char *path, const struct perta_err *why, struct perta_err *err)
{
    enum perta_kind kind = perta_which_kind(path);
    return kind != PERTA_KIND_UNKNOWN && kind != PERTA_KIND_PATCH
               ? perta_fail(err, why->code, "%s; is it a patch folder? It looks like %s", why->msg,
                            perta_which_name(kind))
               : perta_fail(err, why->code, "%s; is it a patch folder?", why->msg);
}

static int open_patch(struct perta_patch_in *in, const char *path, const struct on_damage *on,
                      struct perta_err *err)
{
    struct perta_err why = {0};
    *in = (struct perta_patch_in){.path = strdup(path)};
    if (!in->path)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    int rc = perta_patch_manifest_load(path, false, &in->manifest, &in->manifest_digest, &why);
    if (rc == PERTA_EINPUT)
        return not_a_patch(path, &why, err);
    if (rc) {
        *err = why;
        return rc;
    }
    if (!perta_patch_manifest_is(in->manifest))
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: not the manifest of a perta patch",
                          path);
    json_int_t version = json_integer_value(json_object_get(in->manifest, "version"));
    if (version != PERTA_PATCH_VERSION)
        return perta_fail(err, PERTA_EINPUT,
                          "%s/manifest.json: patch format %lld; this perta reads format %u", path,
                          (long long)version, PERTA_PATCH_VERSION);
    return read_shards(in, on, err);
}

int perta_patch_in_open(struct perta_patch_in *in, const char *path, struct perta_err *err)
{
    return open_patch(in, path, &(struct on_damage){0}, err);
}

int perta_patch_in_open_damaged(struct perta_patch_in *in, const char *path,
                                void (*damaged)(void *ctx, uint32_t shard, const char *message),
                                void *ctx, struct perta_err *err)
{
    return open_patch(in, path, &(struct on_damage){damaged, ctx}, err);
}

int perta_patch_in_manifest(const struct perta_patch_in *in, json_t **manifest,
                            struct perta_err *err)
{
    struct perta_digest_hex hex;
    int rc = perta_patch_manifest_load(in->path, true, manifest, &hex, err);
    if (rc)
        return rc;
    if (!strcmp(hex.sha256, in->manifest_digest.sha256))
        return 0;
    json_decref(*manifest);
    *manifest = NULL;
    return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: changed while it was read", in->path);
}

int perta_patch_in_open_files(struct perta_patch_in *in, bool direct, struct perta_err *err)
{
    for (uint32_t i = 0; i < in->n_shards; i++) {
        struct perta_patch_in_shard *shard = &in->shards[i];
        if (!shard->patch)
            continue;
        perta_file_close(&shard->file);
        int rc = perta_file_open(&shard->file, shard->path, direct, err);
        if (rc)
            return rc;
        if (shard->file.len_bytes != shard->patch->file_bytes)
            return perta_fail(err, PERTA_EINPUT, "%s: changed since its table was read",
                              shard->path);
    }
    return 0;
}

int perta_patch_in_unchanged(const struct perta_patch_in *in, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < in->n_shards && !rc; i++)
        if (in->shards[i].patch)
            rc = perta_file_unchanged(&in->shards[i].file, err);
    return rc;
}

void perta_patch_in_close(struct perta_patch_in *in)
{
    for (uint32_t i = 0; i < in->n_shards; i++) {
        free(in->shards[i].name);
        free(in->shards[i].file_name);
        free(in->shards[i].path);
        perta_patch_free(in->shards[i].patch);
        perta_file_close(&in->shards[i].file);
    }
    free(in->shards);
    free(in->path);
    json_decref(in->manifest);
    *in = (struct perta_patch_in){0};
}

void perta_patch_in_frame(struct perta_patch_in_shard *shard, const struct perta_patch_entry *entry,
                          struct perta_range *range)
{
    *range = (struct perta_range){0};
    if (entry->encoding != PERTA_ENC_ZERO)
        *range = (struct perta_range){
            .file = &shard->file, .off_bytes = entry->frame_off, .len_bytes = entry->frame_bytes};
}

int perta_patch_in_paths(const struct perta_patch_in *in, const char ***paths, size_t *n_paths,
                         struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < in->n_shards && !rc; i++)
        rc = perta_paths_add(paths, n_paths, in->shards[i].path, err);
    return rc;
}

/* ---- the table ---- */

const struct perta_tensor *perta_patch_in_tensor(const struct perta_patch_in_shard *shard,
                                                 const struct perta_patch_entry *entry)
{
    return &shard->patch->after->tensors[entry->tensor];
}

uint64_t perta_patch_in_chunk_bytes(const struct perta_patch_in_shard *shard,
                                    const struct perta_patch_entry *entry)
{
    return (uint64_t)entry->n_units *
           perta_dtype_unit_bytes(perta_patch_in_tensor(shard, entry)->dtype);
}

int perta_patch_in_starts(const struct perta_patch_in_shard *shard,
                          const struct perta_header *header, uint64_t *starts,
                          struct perta_err *err)
{
    const struct perta_patch *p = shard->patch;
    const struct perta_tensor **match = NULL;
    bool same = perta_header_same(header, p->after); /* in the same order */
    if (!same && !(match = perta_header_match(p->after, header)))
        return perta_fail_sys(err, ENOMEM, "%s: table", shard->path);
    for (uint64_t i = p->n_entries; i-- > 0;) {
        uint32_t t = p->entries[i].tensor;
        starts[same ? t : (uint64_t)(match[t] - header->tensors)] = i;
    }
    free(match);
    return 0;
}

/* ---- with a model ---- */

static int check_shard(const struct perta_patch_in_shard *shard, const struct perta_shard *have,
                       bool forward, struct perta_err *err)
{
    const struct perta_header *want = forward ? shard->patch->before : shard->patch->after;
    if (perta_header_same(have->header, want))
        return 0;
    return perta_fail(
        err, PERTA_ECHECK,
        "%s: header digest %016llx, the patch %s wants %016llx: it is for another model",
        have->path, (ull)perta_hash64(have->header->bytes, have->header->len_bytes), shard->path,
        (ull)perta_hash64(want->bytes, want->len_bytes));
}

int perta_patch_in_check_model(const struct perta_patch_in *in,
                               const struct perta_checkpoint *model, bool forward,
                               struct perta_err *err)
{
    for (uint32_t i = 0; i < model->n_shards || i < in->n_shards; i++) {
        const char *have = i < model->n_shards ? model->shards[i].name : "none";
        const char *want = i < in->n_shards ? in->shards[i].name : "none";
        /* A shard may really be called "none". */
        if (i >= model->n_shards || i >= in->n_shards || strcmp(have, want))
            return perta_fail(err, PERTA_ECHECK,
                              "%s: shard %u is %s, the patch %s wants %s: it is for another "
                              "model",
                              model->path, i + 1, have, in->path, want);
        int rc = check_shard(&in->shards[i], &model->shards[i], forward, err);
        if (rc)
            return rc;
    }
    return 0;
}

int perta_patch_in_wrong_chunk(const struct perta_patch_in_shard *shard,
                               const struct perta_patch_entry *entry, bool forward,
                               const char *path, uint64_t first_unit, uint64_t found,
                               struct perta_err *err)
{
    uint64_t wanted = forward ? entry->hash_before : entry->hash_after;
    uint64_t other = forward ? entry->hash_after : entry->hash_before;
    return perta_fail(
        err, PERTA_ECHECK,
        "%s: tensor %s, elements %llu to %llu: digest %016llx, the patch %s wants %016llx: %s",
        path, perta_patch_in_tensor(shard, entry)->name, (ull)first_unit,
        (ull)(first_unit + entry->n_units - 1), (ull)found, shard->path, (ull)wanted,
        found != other ? "it is for another model, or one of the two is damaged"
        : forward      ? "here the patch is applied already"
                       : "here the patch is not applied");
}

int perta_patch_in_move(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const void *from, void *to,
                        struct perta_err *err)
{
    const struct perta_tensor *tensor = perta_patch_in_tensor(shard, entry);
    int rc = (forward ? perta_codec_apply : perta_codec_revert)(
        codec, tensor->dtype, entry->encoding, frame, entry->frame_bytes, entry->payload_bytes,
        from, to, perta_patch_in_chunk_bytes(shard, entry), err);
    return rc ? perta_err_context(err, "%s: tensor %s, byte %llu", shard->path, tensor->name,
                                  (ull)entry->frame_off)
              : 0;
}

int perta_patch_in_check_made(const struct perta_patch_in_shard *shard,
                              const struct perta_patch_entry *entry, bool forward, const void *made,
                              struct perta_err *err)
{
    uint64_t found = perta_hash64(made, perta_patch_in_chunk_bytes(shard, entry));
    uint64_t wanted = forward ? entry->hash_after : entry->hash_before;
    if (found == wanted)
        return 0;
    return perta_fail(err, PERTA_ECHECK,
                      "%s: tensor %s, byte %llu: the chunk leads to digest %016llx, its table "
                      "says %016llx: the patch is damaged",
                      shard->path, perta_patch_in_tensor(shard, entry)->name, (ull)entry->frame_off,
                      (ull)found, (ull)wanted);
}

/* ---- one way ---- */

static bool is_one_way(const struct perta_patch_in *in)
{
    for (uint32_t s = 0; s < in->n_shards; s++)
        for (uint64_t e = 0; in->shards[s].patch && e < in->shards[s].patch->n_entries; e++)
            if (in->shards[s].patch->entries[e].encoding == PERTA_ENC_VALUES)
                return true;
    return false;
}

int perta_patch_in_refuse_one_way(const struct perta_patch_in *in, const char *what,
                                  struct perta_err *err)
{
    return is_one_way(in)
               ? perta_fail(err, PERTA_EUSAGE,
                            "%s: a one-way patch, which does not hold the old values: %s", in->path,
                            what)
               : 0;
}

/* With new values only, the rest of the chunk can be checked once it is known which units
 * change. */
static int lead_one_way(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, struct perta_codec *codec,
                        const uint8_t *frame, const char *path, uint64_t first_unit,
                        const void *from, void *to, struct perta_err *err)
{
    const struct perta_tensor *tensor = perta_patch_in_tensor(shard, entry);
    uint64_t kept;
    int rc = perta_codec_apply_values(codec, tensor->dtype, frame, entry->frame_bytes,
                                      entry->payload_bytes, from, to,
                                      perta_patch_in_chunk_bytes(shard, entry), &kept, err);
    if (rc)
        return perta_err_context(err, "%s: tensor %s, byte %llu", shard->path, tensor->name,
                                 (ull)entry->frame_off);
    return kept == entry->hash_before
               ? 0
               : perta_patch_in_wrong_chunk(shard, entry, true, path, first_unit, kept, err);
}

int perta_patch_in_lead(const struct perta_patch_in_shard *shard,
                        const struct perta_patch_entry *entry, bool forward,
                        struct perta_codec *codec, const uint8_t *frame, const char *path,
                        uint64_t first_unit, const void *from, void *to, struct perta_err *err)
{
    int rc = 0;
    if (entry->encoding == PERTA_ENC_VALUES && forward) {
        rc = lead_one_way(shard, entry, codec, frame, path, first_unit, from, to, err);
    } else {
        uint64_t found = perta_hash64(from, perta_patch_in_chunk_bytes(shard, entry));
        if (found != (forward ? entry->hash_before : entry->hash_after))
            return perta_patch_in_wrong_chunk(shard, entry, forward, path, first_unit, found, err);
        if (entry->encoding == PERTA_ENC_ZERO)
            return 0;
        rc = perta_patch_in_move(shard, entry, forward, codec, frame, from, to, err);
    }
    return rc ? rc : perta_patch_in_check_made(shard, entry, forward, to, err);
}
