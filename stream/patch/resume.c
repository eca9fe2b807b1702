#include "stream/patch/resume.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <xxhash.h>
#include <zstd.h>

#include "io/text.h"
#include "stream/blob.h"

json_t *perta_resume_identity(const char *verb, json_t *flags, json_t *inputs)
{
    return json_pack("{s:s, s:s, s:o, s:o, s:{s:s, s:s, s:i}}", "tool", "perta " PERTA_VERSION,
                     "verb", verb, "flags", flags, "inputs", inputs, "libraries", "zstd",
                     ZSTD_versionString(), "OpenSSL", OpenSSL_version(OPENSSL_VERSION_STRING),
                     "xxHash", (int)XXH_versionNumber());
}

bool perta_resume_found(const struct perta_run *run, const char *output)
{
    return run->resume && perta_journal_found(output);
}

int perta_resume_begin(struct perta_resume *resume, const struct perta_run *run, const char *output,
                       json_t *identity, bool force, struct perta_err *err)
{
    int rc = perta_journal_open(&resume->journal, output, identity, run->resume, force, err);
    json_decref(identity);
    return rc;
}

bool perta_resume_is_publishing(const struct perta_resume *resume, json_t **summary)
{
    bool publishing = perta_journal_is_publishing(&resume->journal);
    if (publishing) {
        json_decref(*summary);
        *summary = perta_journal_summary(&resume->journal);
    }
    return publishing;
}

/* ---- a record ---- */

/* Save the input digests that advanced since the last record. */
static json_t *save_inputs(const struct perta_resume *r)
{
    json_t *all = json_array();
    for (unsigned i = 0; i < r->n_inputs; i++) {
        struct perta_input *in = &r->inputs[i];
        for (uint32_t s = 0; in->ck && s < in->ck->n_shards; s++) {
            if (in->read_bytes[s] == in->saved_bytes[s])
                continue;
            in->saved_bytes[s] = in->read_bytes[s];
            perta_json_append(&all, json_pack("{s:i, s:I, s:I, s:I, s:o}", "input", (int)i, "shard",
                                              (json_int_t)s, "seen", (json_int_t)in->seen_bytes[s],
                                              "read", (json_int_t)in->read_bytes[s], "digest",
                                              perta_blob_of_digest(in->digests[s])));
        }
    }
    return all;
}

static json_t *save_outputs(const struct perta_resume *r)
{
    json_t *all = json_array();
    for (unsigned i = 0; i < r->n_patches; i++)
        perta_json_append(&all, perta_patch_out_save(&r->patches[i]));
    for (unsigned i = 0; i < r->n_models; i++)
        if (r->models[i].has_folder)
            perta_json_append(&all, perta_model_out_save(&r->models[i]));
    return all;
}

static json_t *record_of(const struct perta_resume *r, const struct perta_piece *piece,
                         uint64_t done_bytes)
{
    return json_pack(
        "{s:[I,I,I], s:I, s:[I,I], s:o, s:o}", "place", (json_int_t)piece->shard,
        (json_int_t)piece->tensor, (json_int_t)piece->first_elem + (json_int_t)piece->n_elems,
        "read", (json_int_t)done_bytes, "counts", (json_int_t)r->counts[0],
        (json_int_t)r->counts[1], "inputs", save_inputs(r), "outputs", save_outputs(r));
}

static int sync_outputs(const struct perta_resume *r, struct perta_err *err)
{
    int rc = 0;
    for (unsigned i = 0; i < r->n_patches && !rc; i++) {
        struct perta_patch_out *p = &r->patches[i];
        rc = perta_patch_out_sync(p, err);
        if (!rc)
            rc = perta_publish_sync(&p->folder, err);
        if (!rc && p->model.has_folder)
            rc = perta_publish_sync(&p->model.folder, err);
    }
    for (unsigned i = 0; i < r->n_models && !rc; i++)
        if (r->models[i].has_folder && !(rc = perta_model_out_sync(&r->models[i], err)))
            rc = perta_publish_sync(&r->models[i].folder, err);
    return rc;
}

static uint64_t written(const struct perta_resume *r)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < r->n_patches; i++) {
        const struct perta_patch_out *p = &r->patches[i];
        sum += p->written_bytes + (p->shard_open ? perta_writer_tell(&p->writer) : 0) +
               perta_model_out_tell(&p->model);
    }
    for (unsigned i = 0; i < r->n_models; i++)
        sum += perta_model_out_tell(&r->models[i]);
    return sum;
}

static bool is_due(const struct perta_resume *r, uint64_t bytes)
{
    bool due = perta_journal_due(&r->journal, bytes);
    for (unsigned i = 0; i < r->n_patches; i++)
        due = due || perta_patch_out_is_due(&r->patches[i]);
    return due;
}

int perta_resume_point(struct perta_resume *r, const struct perta_piece *piece,
                       struct perta_stream *stream, struct perta_err *err)
{
    uint64_t bytes = written(r);
    if (!is_due(r, bytes))
        return 0;
    int rc = sync_outputs(r, err);
    if (rc)
        return rc;
    json_t *record = record_of(r, piece, r->done_bytes + perta_stream_read_bytes(stream));
    /* Only now all digests are computed; check that all their bytes were readable. */
    rc = perta_engine_check(perta_stream_engine(stream), err);
    if (!rc)
        rc = record ? perta_journal_commit(&r->journal, record, bytes, err)
                    : perta_fail_sys(err, ENOMEM, "journal");
    json_decref(record);
    return rc;
}

/* ---- resume ---- */

static uint64_t uint_at(const json_t *array, size_t i)
{
    json_int_t value = json_integer_value(json_array_get(array, i));
    return value < 0 ? UINT64_MAX : (uint64_t)value;
}

static bool restore_input(const struct perta_resume *r, const json_t *json)
{
    uint64_t i = (uint64_t)json_integer_value(json_object_get(json, "input"));
    uint64_t s = (uint64_t)json_integer_value(json_object_get(json, "shard"));
    if (i >= r->n_inputs || !r->inputs[i].ck || s >= r->inputs[i].ck->n_shards)
        return false;
    struct perta_input *in = &r->inputs[i];
    in->seen_bytes[s] = (uint64_t)json_integer_value(json_object_get(json, "seen"));
    in->read_bytes[s] = in->saved_bytes[s] =
        (uint64_t)json_integer_value(json_object_get(json, "read"));
    return perta_blob_get_digest(json_object_get(json, "digest"), in->digests[s]) &&
           perta_digest_bytes(in->digests[s]) == in->seen_bytes[s] &&
           in->seen_bytes[s] <= in->ck->shards[s].size_bytes &&
           in->read_bytes[s] <= in->ck->shards[s].size_bytes;
}

static int restore_outputs(const struct perta_resume *r, const json_t *states,
                           struct perta_err *err)
{
    size_t at = 0;
    int rc = 0;
    for (unsigned i = 0; i < r->n_patches && !rc; i++)
        rc = perta_patch_out_restore(&r->patches[i], json_array_get(states, at++), err);
    for (unsigned i = 0; i < r->n_models && !rc; i++)
        if (r->models[i].has_folder)
            rc = perta_model_out_restore(&r->models[i], json_array_get(states, at++), err);
    return rc;
}

static int take_record(void *ctx, json_t *record, struct perta_err *err)
{
    struct perta_resume *r = ctx;
    const json_t *place = json_object_get(record, "place"), *input;
    const json_t *counts = json_object_get(record, "counts");
    size_t i;
    r->shard = (uint32_t)uint_at(place, 0);
    r->tensor = uint_at(place, 1);
    r->unit = uint_at(place, 2);
    r->done_bytes = (uint64_t)json_integer_value(json_object_get(record, "read"));
    for (i = 0; i < PERTA_RESUME_COUNTS; i++)
        r->counts[i] = uint_at(counts, i);
    bool good =
        json_array_size(place) == 3 && uint_at(place, 0) < UINT32_MAX && r->done_bytes <= INT64_MAX;
    json_array_foreach (json_object_get(record, "inputs"), i, input)
        good = good && restore_input(r, input);
    if (!good)
        return perta_fail(err, PERTA_EINPUT, "a record lacks a place");
    return restore_outputs(r, json_object_get(record, "outputs"), err);
}

int perta_resume_restore(struct perta_resume *r, struct perta_stream *stream, struct perta_err *err)
{
    if (!r->journal.resuming)
        return 0;
    int rc = perta_journal_replay(&r->journal, take_record, r, err);
    if (!rc && r->walk && !perta_walk_to(r->walk, r->shard, r->tensor, r->unit))
        rc = perta_fail(err, PERTA_EINPUT, "no chunk ends where its last record says");
    if (rc)
        return rc == PERTA_EINPUT
                   ? perta_err_context(err, "%s: damaged; --force starts over", r->journal.path)
                   : rc;
    for (unsigned i = 0; i < r->n_patches && !rc; i++)
        rc = perta_patch_out_reopen(&r->patches[i], r->shard, r->tensor, r->unit, err);
    r->journal.bytes = written(r);
    perta_stream_skip(stream, r->done_bytes);
    return rc;
}

/* ---- the end ---- */

#define FOLDERS_MAX (2 * PERTA_RESUME_PATCHES_MAX + PERTA_RESUME_MODELS_MAX)

/* List all folders: patches first, then models. */
static size_t list_folders(const struct perta_resume *r, struct perta_publish *folders[FOLDERS_MAX])
{
    size_t n = 0;
    for (unsigned i = 0; i < r->n_patches; i++)
        folders[n++] = &r->patches[i].folder;
    for (unsigned i = 0; i < r->n_patches; i++)
        if (r->patches[i].model.has_folder)
            folders[n++] = &r->patches[i].model.folder;
    for (unsigned i = 0; i < r->n_models; i++)
        if (r->models[i].has_folder)
            folders[n++] = &r->models[i].folder;
    return n;
}

int perta_resume_end(struct perta_resume *r, int rc, json_t **summary, struct perta_err *err)
{
    struct perta_publish *folders[FOLDERS_MAX];
    size_t n = list_folders(r, folders);
    if (!rc)
        rc = perta_journal_publish(&r->journal, folders, n, *summary, err);
    if (rc)
        perta_journal_abandon(&r->journal, folders, n, rc, err);
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    perta_journal_close(&r->journal);
    return rc;
}
