#include "stream/apply.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "stream/input.h"
#include "stream/model_out.h"
#include "stream/patch_in.h"
#include "stream/walk.h"

#define OUT_ALIGN 64

enum { IN_MODEL, IN_FRAME, N_IN };

struct job {
    const struct perta_apply *apply;
    bool forward;  /* the model should be the before side */
    bool checking; /* digests alone */
    struct perta_input model;
    struct perta_patch_in patch;
    struct perta_model_out out;
    struct perta_codec **codecs;
    unsigned n_workers;
    json_t *damaged;
    uint64_t n_chunks;

    /* where next() stands: chunks in order of the output's header */
    uint32_t shard;
    uint64_t tensor, entry;    /* entry: next chunk of that tensor, in the table */
    uint64_t unit;             /* first of that chunk, in the tensor */
    json_t *table_start;       /* of this shard: tensor's name -> its first entry */
    uint32_t shards_begun;     /* the owner's, for commit() */
};

static const struct perta_header *out_header(const struct job *job, uint32_t shard)
{
    const struct perta_patch *p = job->patch.shards[shard].patch;
    return job->forward ? p->after : p->before;
}

static const struct perta_header *in_header(const struct job *job, uint32_t shard)
{
    const struct perta_patch *p = job->patch.shards[shard].patch;
    return job->forward ? p->before : p->after;
}

/* Where each tensor's entries start, for the order of the output may not be the table's. */
static int index_shard(struct job *job, struct perta_err *err)
{
    const struct perta_patch *p = job->patch.shards[job->shard].patch;
    json_decref(job->table_start);
    job->table_start = json_object();
    for (uint64_t i = 0; i < p->n_entries; i++)
        if (!i || p->entries[i].tensor != p->entries[i - 1].tensor)
            if (json_object_set_new(job->table_start,
                                    p->after->tensors[p->entries[i].tensor].name,
                                    json_integer((json_int_t)i)))
                return perta_fail_sys(err, ENOMEM, "table");
    return 0;
}

/* Go to the next tensor that has chunks. 1: there is one. */
static int next_tensor(struct job *job, struct perta_err *err)
{
    for (;;) {
        if (job->shard == job->patch.n_shards)
            return 0;
        if (!job->tensor && !job->unit) {
            int rc = index_shard(job, err);
            if (rc)
                return rc;
        }
        const struct perta_header *header = out_header(job, job->shard);
        for (; job->tensor < header->n_tensors; job->tensor++)
            if (header->tensors[job->tensor].len_bytes) {
                const char *name = header->tensors[job->tensor].name;
                job->entry = (uint64_t)json_integer_value(
                    json_object_get(job->table_start, name));
                return 1;
            }
        job->shard++;
        job->tensor = 0;
    }
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    if (!job->unit) {
        int rc = next_tensor(job, err);
        if (rc <= 0)
            return rc;
    }
    const struct perta_tensor *to = &out_header(job, job->shard)->tensors[job->tensor];
    const struct perta_ref *from = perta_checkpoint_find(job->model.ck, to->name);
    struct perta_patch_in_shard *shard = &job->patch.shards[job->shard];
    const struct perta_patch_entry *entry = &shard->patch->entries[job->entry];
    uint64_t width = perta_dtype_unit_bytes(to->dtype);
    uint64_t len_bytes = entry->n_units * width;
    piece->shard = job->shard;
    piece->tensor = (uint32_t)job->tensor;
    piece->first_elem = job->unit;
    piece->n_elems = entry->n_units;
    piece->tag = job->entry;
    perta_input_range(&job->model, from, job->unit * width, len_bytes, &piece->in[IN_MODEL]);
    if (entry->encoding != PERTA_ENC_ZERO && !job->checking) {
        piece->in[IN_FRAME] = (struct perta_range){
            .file = &shard->file, .off_bytes = entry->frame_off, .len_bytes = entry->frame_bytes};
        piece->out_bytes = OUT_ALIGN + len_bytes;
    } else {
        piece->out_bytes = OUT_ALIGN;
    }
    job->entry++;
    job->unit += entry->n_units;
    if (job->unit * width == to->len_bytes) {
        job->unit = 0;
        /* unit 0 of tensor 0 means a new shard to next_tensor */
        job->tensor++;
        if (job->tensor == out_header(job, job->shard)->n_tensors) {
            job->tensor = 0;
            job->shard++;
        }
    }
    return 1;
}

static int wrong_chunk(const struct job *job, const struct perta_piece *piece, uint64_t found,
                       struct perta_err *err)
{
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *entry = &shard->patch->entries[piece->tag];
    uint64_t wanted = job->forward ? entry->hash_before : entry->hash_after;
    uint64_t other = job->forward ? entry->hash_after : entry->hash_before;
    return perta_fail(
        err, PERTA_ECHECK,
        "%s: tensor %s, elements %llu to %llu: digest %016llx, the patch %s wants %016llx: %s",
        piece->in[IN_MODEL].file->path,
        out_header(job, piece->shard)->tensors[piece->tensor].name,
        (unsigned long long)piece->first_elem,
        (unsigned long long)(piece->first_elem + piece->n_elems - 1), (unsigned long long)found,
        shard->path, (unsigned long long)wanted,
        found != other     ? "it is for another model, or one of the two is damaged"
        : job->forward ? "here the patch is applied already"
                       : "here the patch is not applied");
}

/* First word of a piece's room: the digest found. Bytes of the result follow. */
static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *entry = &shard->patch->entries[piece->tag];
    const struct perta_tensor *to = &out_header(job, piece->shard)->tensors[piece->tensor];
    const struct perta_range *model = &piece->in[IN_MODEL], *frame = &piece->in[IN_FRAME];
    uint64_t *found = (uint64_t *)(void *)piece->out;
    *found = perta_hash64(model->data, model->len_bytes);
    if (job->checking)
        return 0;
    if (*found != (job->forward ? entry->hash_before : entry->hash_after))
        return wrong_chunk(job, piece, *found, err);
    if (entry->encoding == PERTA_ENC_ZERO)
        return 0;
    uint8_t *after = piece->out + OUT_ALIGN;
    int rc = (job->forward ? perta_codec_apply : perta_codec_revert)(
        job->codecs[worker], to->dtype, entry->encoding, frame->data, frame->len_bytes,
        entry->payload_bytes, model->data, after, model->len_bytes, err);
    if (rc)
        return perta_err_context(err, "%s: tensor %s, byte %llu", shard->path, to->name,
                                 (unsigned long long)entry->frame_off);
    uint64_t made = perta_hash64(after, model->len_bytes);
    uint64_t wanted = job->forward ? entry->hash_after : entry->hash_before;
    if (made != wanted)
        return perta_fail(err, PERTA_ECHECK,
                          "%s: tensor %s, byte %llu: the chunk leads to digest %016llx, its "
                          "table says %016llx: the patch is damaged",
                          shard->path, to->name, (unsigned long long)entry->frame_off,
                          (unsigned long long)made, (unsigned long long)wanted);
    return 0;
}

/* Finish shards before this one and begin it. */
static int reach_shard(struct job *job, uint32_t shard, struct perta_err *err)
{
    int rc = 0;
    while (!rc && job->shards_begun <= shard) {
        if (job->shards_begun)
            rc = perta_model_out_shard_end(&job->out,
                                           job->patch.shards[job->shards_begun - 1].name, err);
        if (!rc && job->shards_begun < job->patch.n_shards) {
            const struct perta_header *header = out_header(job, job->shards_begun);
            rc = perta_model_out_shard(&job->out, job->patch.shards[job->shards_begun].name,
                                       header->bytes, header->len_bytes, header->file_len_bytes,
                                       err);
        }
        job->shards_begun++;
    }
    return rc;
}

static void note_damage(struct job *job, const struct perta_piece *piece, uint64_t found)
{
    struct perta_err text = {0};
    wrong_chunk(job, piece, found, &text);
    json_array_append_new(
        job->damaged,
        json_pack("{s:s, s:s, s:I, s:I, s:s}", "shard", job->patch.shards[piece->shard].name,
                  "tensor", out_header(job, piece->shard)->tensors[piece->tensor].name, "first",
                  (json_int_t)piece->first_elem, "elements", (json_int_t)piece->n_elems,
                  "message", text.msg));
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_patch_entry *entry =
        &job->patch.shards[piece->shard].patch->entries[piece->tag];
    uint64_t found = *(const uint64_t *)(const void *)piece->out;
    const struct perta_range *model = &piece->in[IN_MODEL];
    job->n_chunks++;
    if (job->checking) {
        if (found != (job->forward ? entry->hash_before : entry->hash_after))
            note_damage(job, piece, found);
        return 0;
    }
    int rc = reach_shard(job, piece->shard, err);
    if (rc)
        return rc;
    const void *after =
        entry->encoding == PERTA_ENC_ZERO ? model->data : piece->out + OUT_ALIGN;
    return perta_model_out_append(&job->out, after, model->len_bytes, err);
}

static int check_shard(const struct job *job, uint32_t i, struct perta_err *err)
{
    const struct perta_shard *have = &job->model.ck->shards[i];
    const struct perta_header *want = in_header(job, i);
    if (have->header->len_bytes == want->len_bytes &&
        have->header->file_len_bytes == want->file_len_bytes &&
        !memcmp(have->header->bytes, want->bytes, want->len_bytes))
        return 0;
    return perta_fail(
        err, PERTA_ECHECK,
        "%s: header digest %016llx, the patch %s wants %016llx: it is for another model",
        have->path, (unsigned long long)perta_hash64(have->header->bytes, have->header->len_bytes),
        job->patch.shards[i].path,
        (unsigned long long)perta_hash64(want->bytes, want->len_bytes));
}

static int check_shards(const struct job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->model.ck;
    for (uint32_t i = 0; i < model->n_shards || i < job->patch.n_shards; i++) {
        const char *have = i < model->n_shards ? model->shards[i].name : "none";
        const char *want = i < job->patch.n_shards ? job->patch.shards[i].name : "none";
        if (strcmp(have, want))
            return perta_fail(err, PERTA_ECHECK,
                              "%s: shard %u is %s, the patch %s wants %s: it is for another "
                              "model",
                              model->path, i + 1, have, job->patch.path, want);
        int rc = check_shard(job, i, err);
        if (rc)
            return rc;
    }
    return 0;
}

static void measure(const struct job *job, struct perta_job *sizes, uint64_t *chunk_bytes)
{
    uint64_t frame_max = 0;
    *chunk_bytes = 0;
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        for (uint64_t t = 0; t < p->after->n_tensors; t++) {
            uint64_t chunk = perta_walk_chunk_bytes(&p->after->tensors[t]);
            *chunk_bytes = chunk > *chunk_bytes ? chunk : *chunk_bytes;
            sizes->total_bytes += p->after->tensors[t].len_bytes;
        }
        for (uint64_t e = 0; e < p->n_entries && !job->checking; e++) {
            frame_max = p->entries[e].frame_bytes > frame_max ? p->entries[e].frame_bytes
                                                              : frame_max;
            sizes->total_bytes += p->entries[e].frame_bytes;
        }
    }
    sizes->in_bytes_max = *chunk_bytes + frame_max;
    sizes->out_bytes_max = OUT_ALIGN + (job->checking ? 0 : *chunk_bytes);
}

static int prepare(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    int rc = perta_patch_in_open(&job->patch, job->apply->patch, err);
    if (!rc)
        rc = perta_input_open(&job->model, "model", job->apply->model, err);
    if (!rc)
        rc = check_shards(job, err);
    if (!rc && !job->checking)
        rc = perta_publish_check(&job->apply->out, 1,
                                 (const char *[]){job->apply->model, job->apply->patch}, 2,
                                 job->apply->force, err);
    if (!rc && !job->checking && !run->dry_run)
        rc = perta_model_out_begin(&job->out, job->apply->out, job->apply->force, err);
    return rc;
}

static int open_stream(struct job *job, const struct perta_run *run,
                       struct perta_stream **stream, struct perta_err *err)
{
    struct perta_job sizes = {
        .ctx = job, .n_in = N_IN, .next = next, .work = work, .commit = commit};
    const char **paths = NULL;
    size_t n_paths = 0;
    uint64_t chunk_bytes;
    measure(job, &sizes, &chunk_bytes);
    job->n_workers = perta_run_threads(run);
    if (!job->checking && !(job->codecs = perta_codecs_new(job->n_workers, chunk_bytes, err)))
        return err->code;
    int rc = perta_input_paths(&job->model, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, job->checking ? 0 : 1, stream, err);
    free(paths);
    if (rc)
        return rc;
    bool direct = perta_stream_engine(*stream)->wants_direct;
    rc = perta_input_open_files(&job->model, direct, err);
    if (!rc)
        rc = perta_patch_in_open_files(&job->patch, direct, err);
    if (!job->checking) {
        job->out.engine = perta_stream_engine(*stream);
        job->out.writer_bufs = perta_stream_writer_bufs(*stream, 0);
    }
    return rc;
}

/* The shards that came out must be those the manifest promised. */
static int check_promise(const struct job *job, struct perta_err *err)
{
    const json_t *outputs = json_object_get(job->patch.manifest, "outputs");
    const json_t *promised = json_object_get(outputs, "model");
    for (size_t i = 0; job->forward && i < json_array_size(promised); i++) {
        const char *want =
            json_string_value(json_object_get(json_array_get(promised, i), "sha256"));
        const char *have = json_string_value(
            json_object_get(json_array_get(job->out.shards, i), "sha256"));
        if (!want || !have || strcmp(want, have))
            return perta_fail(err, PERTA_ECHECK,
                              "%s: SHA-256 %s, %s/manifest.json says %s: the patch is damaged",
                              job->patch.shards[i].name, have ? have : "none", job->patch.path,
                              want ? want : "none");
    }
    return 0;
}

static int finish(struct job *job, struct perta_err *err)
{
    int rc = perta_input_unchanged(&job->model, err);
    if (rc)
        return rc;
    if (job->checking)
        return json_array_size(job->damaged)
                   ? perta_fail(err, PERTA_ECHECK, "%s: %zu of %llu chunks differ",
                                job->apply->model, json_array_size(job->damaged),
                                (unsigned long long)job->n_chunks)
                   : 0;
    rc = reach_shard(job, job->patch.n_shards, err);
    if (!rc)
        rc = check_promise(job, err);
    if (!rc)
        rc = perta_model_out_copy_rest(&job->out, job->model.ck, NULL, err);
    return rc ? rc : perta_model_out_commit(&job->out, err);
}

static int run_all(struct job *job, const struct perta_run *run, struct perta_stream **stream,
                   json_t **summary, struct perta_err *err)
{
    int rc = open_stream(job, run, stream, err);
    if (!rc)
        rc = perta_stream_run(*stream, err);
    if (rc)
        return rc;
    rc = finish(job, err);
    if (!rc || (job->checking && rc == PERTA_ECHECK))
        *summary = json_pack("{s:I, s:I, s:I, s:O, s:O?}", "chunks", (json_int_t)job->n_chunks,
                             "read_bytes", (json_int_t)perta_stream_read_bytes(*stream),
                             "written_bytes", (json_int_t)job->out.written_bytes, "damaged",
                             job->damaged, "shards", job->out.shards);
    return rc;
}

int perta_apply(const struct perta_apply *apply, const struct perta_run *run, json_t **summary,
                struct perta_err *err)
{
    struct job job = {
        .apply = apply,
        .forward = apply->mode == PERTA_APPLY || apply->mode == PERTA_CHECK_ORIGINAL,
        .checking = apply->mode == PERTA_CHECK_ORIGINAL || apply->mode == PERTA_CHECK_APPLIED,
        .damaged = json_array(),
    };
    struct perta_stream *stream = NULL;
    *summary = NULL;
    int rc = prepare(&job, run, err);
    if (!rc && run->dry_run)
        *summary = json_object();
    else if (!rc)
        rc = run_all(&job, run, &stream, summary, err);
    perta_model_out_release(&job.out);
    perta_patch_in_close(&job.patch);
    perta_input_close(&job.model);
    perta_codecs_free(job.codecs, job.n_workers);
    json_decref(job.damaged);
    json_decref(job.table_start);
    perta_stream_close(stream);
    return rc;
}
