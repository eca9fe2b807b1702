#include "stream/patch/model_out.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/text.h"
#include "io/wal.h"
#include "stream/blob.h"

int perta_model_out_begin(struct perta_model_out *out, const char *path, const char *like,
                          const struct perta_journal *journal, bool force, struct perta_err *err)
{
    *out = (struct perta_model_out){.has_folder = path != NULL, .shards = json_array()};
    return path ? perta_journal_folder(journal, &out->folder, path, like, force, err) : 0;
}

void perta_model_out_known(struct perta_model_out *out, json_t *shards)
{
    out->is_known = true;
    json_decref(out->shards);
    out->shards = json_incref(shards);
}

int perta_model_out_shard(struct perta_model_out *out, const char *name, const uint8_t *header,
                          uint64_t header_bytes, uint64_t file_bytes, struct perta_err *err)
{
    if (out->is_known)
        return 0;
    if (out->has_folder) {
        char *path = perta_publish_path(&out->folder, name);
        if (!path)
            return perta_fail_sys(err, ENOMEM, "%s", name);
        int rc = perta_publish_clear(&out->folder, name, err);
        if (!rc)
            rc = perta_writer_open(&out->writer, out->engine, path, file_bytes, out->writer_bufs,
                                   err);
        free(path);
        if (rc)
            return rc;
    } else if (!(out->digest = perta_digest_new(true))) {
        return perta_fail_sys(err, ENOMEM, "%s", name);
    } else {
        perta_digest_offload(out->digest, out->engine->hasher);
    }
    return perta_model_out_append(out, header, header_bytes, err);
}

int perta_model_out_append(struct perta_model_out *out, const void *data, uint64_t len_bytes,
                           struct perta_err *err)
{
    if (out->is_known)
        return 0;
    if (out->has_folder)
        return perta_writer_append(&out->writer, data, len_bytes, err);
    perta_digest_update(out->digest, data, len_bytes);
    return 0;
}

int perta_model_out_shard_end(struct perta_model_out *out, const char *name, struct perta_err *err)
{
    struct perta_digest_hex hex;
    if (out->is_known)
        return 0;
    if (out->has_folder) {
        int rc = perta_writer_close(&out->writer, &hex, err);
        if (rc)
            return rc;
        out->written_bytes += hex.len_bytes;
    } else {
        perta_digest_finish(out->digest, &hex);
        perta_digest_free(out->digest);
        out->digest = NULL;
    }
    perta_json_append(&out->shards, json_pack("{s:s, s:I, s:s, s:s}", "name", name, "bytes",
                                              (json_int_t)hex.len_bytes, "xxh3_128", hex.xxh128,
                                              "sha256", hex.sha256));
    return out->shards ? 0 : perta_fail_sys(err, ENOMEM, "%s", name);
}

/* Is it named as weights, or as an index of weights other than the model's own? A suffix may
 * follow, as in a backup's name. */
static bool is_named_weights(const char *name)
{
    static const char *const suffixes[] = {
        ".safetensors", ".bin",  ".pt",  ".pth", ".gguf",   ".ggml",      ".h5",      ".msgpack",
        ".onnx",        ".ckpt", ".npz", ".npy", ".pkl",    ".onnx_data", ".ot",      ".tflite",
        ".pb",          ".nemo", ".tar", ".zip", ".pickle", ".engine",    ".mlmodel", ".dduf"};
    if (!strcmp(name, PERTA_INDEX_NAME))
        return false;
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (perta_text_ends_in(name, suffixes[i]))
            return true;
    return strstr(name, ".safetensors") || perta_text_ends_in(name, ".index.json");
}

/* Does the file begin like weights, whatever its name? GGUF, safetensors, ZIP (as PyTorch writes
 * it), pickle, HDF5, gzip, Zstandard. */
static bool is_weights_inside(const char *path)
{
    static const struct {
        const char *bytes;
        size_t n;
    } starts[] = {{"GGUF", 4},    {"PK\x03\x04", 4}, {"\x80\x02", 2},        {"\x80\x04", 2},
                  {"\x89HDF", 4}, {"\x1f\x8b", 2},   {"\x28\xb5\x2f\xfd", 4}};
    char start[16] = "";
    int fd = perta_open_any(path, O_RDONLY);
    ssize_t n = fd < 0 ? 0 : pread(fd, start, sizeof start, 0);
    if (fd >= 0)
        close(fd);
    bool is = n == sizeof start && start[8] == '{' && !memcmp(start + 5, "\0\0\0", 3);
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        is = is || (n >= (ssize_t)starts[i].n && !memcmp(start, starts[i].bytes, starts[i].n));
    return is;
}

static bool is_shard(const struct perta_checkpoint *ck, const char *name)
{
    for (uint32_t i = 0; i < ck->n_shards; i++)
        if (!strcmp(ck->shards[i].name, name))
            return true;
    return false;
}

struct copy {
    struct perta_model_out *out;
    const struct perta_checkpoint *from;
    json_t **skipped;
};

static int copy_entry(void *ctx, const char *name, struct perta_err *err)
{
    const struct copy *copy = ctx;
    struct stat st = {0};
    if (is_shard(copy->from, name))
        return 0;
    char *path = perta_path_join(copy->from->path, name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    struct perta_err why = {0};
    bool is_file = !stat(path, &st) && S_ISREG(st.st_mode);
    int rc = is_named_weights(name) ? 0 : perta_check_link(copy->from->path, path, &why);
    if (rc == PERTA_ESYS) {
        *err = why;
    } else if (is_named_weights(name) || rc || (is_file && is_weights_inside(path))) {
        rc = 0;
        perta_json_append(copy->skipped, perta_text_json("%s", name));
    } else if (is_file) {
        rc = perta_publish_copy(&copy->out->folder, path, name, err);
    } else if (S_ISDIR(st.st_mode) && *name != '.') {
        perta_json_append(copy->skipped, perta_text_json("%s/", name));
    }
    free(path);
    return rc;
}

int perta_model_out_copy_rest(struct perta_model_out *out, const struct perta_checkpoint *from,
                              json_t **skipped, struct perta_err *err)
{
    struct stat st;
    if (!out->has_folder || stat(from->path, &st) || !S_ISDIR(st.st_mode))
        return 0;
    return perta_folder_each(from->path, copy_entry, &(struct copy){out, from, skipped}, err);
}

struct others {
    const struct perta_checkpoint *ck;
    json_t **names;
};

static int add_other(void *ctx, const char *name, struct perta_err *err)
{
    const struct others *others = ctx;
    struct stat st;
    char *path = perta_path_join(others->ck->path, name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    if (!is_shard(others->ck, name) && !stat(path, &st) && S_ISREG(st.st_mode) &&
        strcmp(name, PERTA_WAL_NAME) && (is_named_weights(name) || is_weights_inside(path)))
        perta_json_append(others->names, perta_text_json("%s", name));
    free(path);
    return 0;
}

int perta_model_out_others(const struct perta_checkpoint *ck, json_t **names, struct perta_err *err)
{
    struct stat st;
    if (stat(ck->path, &st) || !S_ISDIR(st.st_mode))
        return 0;
    return perta_folder_each(ck->path, add_other, &(struct others){ck, names}, err);
}

/* ---- for the journal ---- */

int perta_model_out_sync(struct perta_model_out *out, struct perta_err *err)
{
    return out->writer.open ? perta_writer_sync(&out->writer, err) : 0;
}

json_t *perta_model_out_save(struct perta_model_out *out)
{
    json_t *finished = json_array();
    const struct perta_digest *digest = out->writer.open ? out->writer.digest : out->digest;
    for (; out->n_saved < json_array_size(out->shards) && !out->is_known; out->n_saved++)
        perta_json_append(&finished, json_incref(json_array_get(out->shards, out->n_saved)));
    json_t *state =
        json_pack("{s:o, s:I}", "finished", finished, "written", (json_int_t)out->written_bytes);
    if (digest)
        perta_json_set(&state, "digest", perta_blob_of_digest(digest));
    return state;
}

int perta_model_out_restore(struct perta_model_out *out, const json_t *state, struct perta_err *err)
{
    const json_t *digest = json_object_get(state, "digest");
    const json_t *finished = json_object_get(state, "finished");
    if (!json_is_array(finished))
        return perta_fail(err, PERTA_EINPUT, "a record lacks the state of a model");
    if (!out->is_known)
        perta_json_extend(&out->shards, finished);
    out->n_saved = json_array_size(out->shards);
    out->written_bytes = (uint64_t)json_integer_value(json_object_get(state, "written"));
    perta_digest_free(out->digest); /* of the current shard, until it is reopened */
    out->digest = digest ? perta_digest_new(true) : NULL;
    if (!out->shards || (digest && !out->digest))
        return perta_fail_sys(err, ENOMEM, "journal");
    return !digest || perta_blob_get_digest(digest, out->digest)
               ? 0
               : perta_fail(err, PERTA_EINPUT, "a record has an invalid digest state");
}

int perta_model_out_reopen(struct perta_model_out *out, uint32_t shard, const char *name,
                           uint64_t at_bytes, struct perta_err *err)
{
    if (!name || out->is_known)
        return 0;
    if (!out->digest || perta_digest_bytes(out->digest) != at_bytes ||
        json_array_size(out->shards) != shard)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: its records do not lead to byte %llu; --force "
                          "starts over",
                          name, (unsigned long long)at_bytes);
    perta_digest_offload(out->digest, out->engine->hasher);
    if (!out->has_folder)
        return 0;
    char *path = perta_publish_path(&out->folder, name);
    int rc = path ? perta_writer_reopen(&out->writer, out->engine, path, out->digest,
                                        out->writer_bufs, err)
                  : perta_fail_sys(err, ENOMEM, "%s", name);
    free(path);
    out->digest = NULL; /* the writer owns it now */
    return rc;
}

uint64_t perta_model_out_tell(const struct perta_model_out *out)
{
    return out->written_bytes + (out->writer.open ? perta_writer_tell(&out->writer) : 0);
}

void perta_model_out_release(struct perta_model_out *out)
{
    perta_writer_abort(&out->writer);
    perta_digest_free(out->digest);
    perta_publish_release(&out->folder);
    json_decref(out->shards);
    *out = (struct perta_model_out){0};
}
