#include "stream/patch/apply.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/fpenv.h"
#include "stream/arguments.h"
#include "stream/input.h"
#include "stream/patch/in_place.h"
#include "stream/patch/model_out.h"
#include "stream/patch/patch_in.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

enum { IN_MODEL, IN_FRAME, N_IN };

struct job {
    const struct perta_apply *apply;
    bool forward; /* apply: the model is the side before the patch */
    struct perta_input model;
    struct perta_patch_in patch;
    struct perta_model_out out;
    struct perta_resume resume; /* counts[0]: chunks */
    struct perta_stream *stream;
    struct perta_codec **codecs;

    /* position of next(): chunks in order of the output's header */
    uint32_t shard;
    uint64_t tensor, entry; /* entry: the table's, of that tensor's next chunk */
    uint64_t unit;          /* that chunk's first unit in the tensor */
    uint64_t *starts;       /* first entry of each tensor of this shard */
    uint32_t shards_begun;  /* used by commit() */
};

static const struct perta_header *out_header(const struct job *job, uint32_t shard)
{
    const struct perta_patch *p = job->patch.shards[shard].patch;
    return job->forward ? p->after : p->before;
}

/* Find where each tensor's entries start: the output's order may differ from the table's. */
static int index_shard(struct job *job, struct perta_err *err)
{
    const struct perta_header *header = out_header(job, job->shard);
    free(job->starts);
    job->starts = calloc(header->n_tensors + 1, sizeof *job->starts);
    return job->starts
               ? perta_patch_in_starts(&job->patch.shards[job->shard], header, job->starts, err)
               : perta_fail_sys(err, ENOMEM, "table");
}

/* Advance to the next tensor that has chunks. 1: there is one. */
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
                job->entry = job->starts[job->tensor];
                return 1;
            }
        job->shard++;
        job->tensor = 0;
    }
}

/* Advance past the tensor. next_tensor takes unit 0 of tensor 0 for a new shard. */
static void end_tensor(struct job *job)
{
    job->unit = 0;
    job->tensor++;
    if (job->tensor == out_header(job, job->shard)->n_tensors) {
        job->tensor = 0;
        job->shard++;
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
    piece->shard = job->shard;
    piece->tensor = (uint32_t)job->tensor;
    piece->first_elem = job->unit;
    piece->n_elems = entry->n_units;
    piece->tag = job->entry;
    perta_input_range(&job->model, from, job->unit, entry->n_units, &piece->in[IN_MODEL]);
    perta_patch_in_frame(shard, entry, &piece->in[IN_FRAME]);
    piece->out_bytes = entry->encoding == PERTA_ENC_ZERO ? 0 : piece->in[IN_MODEL].len_bytes;
    job->entry++;
    job->unit += entry->n_units;
    if (job->unit * perta_dtype_unit_bytes(to->dtype) == to->len_bytes)
        end_tensor(job);
    return 1;
}

/* piece->out gets the resulting bytes. */
static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *entry = &shard->patch->entries[piece->tag];
    const struct perta_range *model = &piece->in[IN_MODEL];
    return perta_patch_in_lead(shard, entry, job->forward, job->codecs[worker],
                               piece->in[IN_FRAME].data, model->file->path, piece->first_elem,
                               model->data, piece->out, err);
}

/* Finish the shards before this one, and begin it. */
static int reach_shard(struct job *job, uint32_t shard, struct perta_err *err)
{
    int rc = 0;
    while (!rc && job->shards_begun <= shard) {
        if (job->shards_begun)
            rc = perta_model_out_shard_end(&job->out, job->patch.shards[job->shards_begun - 1].name,
                                           err);
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

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_patch_entry *entry =
        &job->patch.shards[piece->shard].patch->entries[piece->tag];
    const struct perta_range *model = &piece->in[IN_MODEL];
    job->resume.counts[0]++;
    int rc = reach_shard(job, piece->shard, err);
    if (rc)
        return rc;
    const void *after = entry->encoding == PERTA_ENC_ZERO ? model->data : piece->out;
    rc = perta_model_out_append(&job->out, after, model->len_bytes, err);
    return rc ? rc : perta_resume_point(&job->resume, piece, job->stream, err);
}

static void measure(const struct job *job, struct perta_job *sizes, uint64_t *chunk_bytes)
{
    uint64_t frame_max = 0, n_tensors = 0;
    *chunk_bytes = 0;
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        n_tensors = perta_max(p->after->n_tensors, n_tensors);
        for (uint64_t t = 0; t < p->after->n_tensors; t++) {
            uint64_t chunk = perta_walk_chunk_bytes(&p->after->tensors[t]);
            *chunk_bytes = perta_max(chunk, *chunk_bytes);
            sizes->total_bytes += p->after->tensors[t].len_bytes;
        }
        for (uint64_t e = 0; e < p->n_entries; e++) {
            frame_max = perta_max(p->entries[e].frame_bytes, frame_max);
            sizes->total_bytes += p->entries[e].frame_bytes;
        }
    }
    sizes->in_bytes_max = *chunk_bytes + frame_max;
    sizes->out_bytes_max = *chunk_bytes;
    sizes->later_bytes = PERTA_MATCH_BYTES(n_tensors) + n_tensors * sizeof *job->starts;
}

static int open_inputs(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    const struct perta_apply *apply = job->apply;
    int rc = perta_patch_in_open(&job->patch, apply->patch, err);
    if (!rc && !job->forward)
        rc = perta_patch_in_refuse_one_way(&job->patch, "it cannot be reverted", err);
    if (!rc)
        rc = perta_input_open(&job->model, "model", apply->model, err);
    if (!rc)
        rc = perta_patch_in_check_model(&job->patch, job->model.ck, job->forward, err);
    return rc || perta_resume_found(run, apply->out)
               ? rc
               : perta_publish_check(&apply->out, 1, (const char *[]){apply->model, apply->patch},
                                     2, apply->force, err);
}

static int begin_output(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    const struct perta_apply *apply = job->apply;
    json_t *inputs = json_pack("{s:o, s:s}", "model", perta_journal_checkpoint(job->model.ck),
                               "patch", job->patch.manifest_digest.sha256);
    job->resume.models = &job->out;
    job->resume.n_models = 1;
    int rc = perta_resume_begin(
        &job->resume, run, apply->out,
        perta_resume_identity(job->forward ? "apply" : "revert", json_object(), inputs),
        apply->force, err);
    return rc ? rc
              : perta_model_out_begin(&job->out, apply->out, apply->model, &job->resume.journal,
                                      apply->force, err);
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = {
        .ctx = job, .n_in = N_IN, .next = next, .work = work, .commit = commit};
    const char **paths = NULL;
    size_t n_paths = 0;
    uint64_t chunk_bytes;
    measure(job, &sizes, &chunk_bytes);
    sizes.worker_bytes = perta_codec_bytes(chunk_bytes);
    int rc = perta_input_paths(&job->model, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, 1, &job->stream, err);
    free(paths);
    if (rc)
        return rc;
    if (!(job->codecs = perta_codecs_new(perta_stream_workers(job->stream), chunk_bytes, err)))
        return err->code;
    job->out.engine = perta_stream_engine(job->stream);
    job->out.writer_bufs = perta_stream_writer_bufs(job->stream, 0);
    rc = perta_input_open_files(&job->model, job->out.engine->wants_direct, err);
    return rc ? rc : perta_patch_in_open_files(&job->patch, job->out.engine->wants_direct, err);
}

/* Restore the state that was recorded, and the position of next(). */
static int restore(struct job *job, struct perta_err *err)
{
    const struct perta_resume *r = &job->resume;
    int rc = perta_resume_restore(&job->resume, job->stream, err);
    if (rc || !r->journal.resuming)
        return rc;
    if (r->shard >= job->patch.n_shards ||
        !perta_walk_is_place(out_header(job, r->shard), r->tensor, r->unit, 0))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: no chunk ends where its last record says; --force starts over",
                          r->journal.path);
    const struct perta_tensor *t = &out_header(job, r->shard)->tensors[r->tensor];
    uint64_t width = perta_dtype_unit_bytes(t->dtype);
    job->shard = r->shard;
    job->shards_begun = r->shard + 1;
    job->tensor = r->tensor;
    rc = index_shard(job, err);
    job->entry = rc ? 0 : job->starts[r->tensor] + r->unit / PERTA_CHUNK_ELEMS;
    job->unit = r->unit;
    if (r->unit == t->len_bytes / width)
        end_tensor(job);
    return rc ? rc
              : perta_model_out_reopen(&job->out, r->shard, job->patch.shards[r->shard].name,
                                       t->off_bytes + r->unit * width, err);
}

/* Check that the shards written have the digests that the manifest promises. */
static int check_promise(const struct job *job, struct perta_err *err)
{
    const json_t *outputs = json_object_get(job->patch.manifest, "outputs");
    const json_t *promised = json_object_get(outputs, "model");
    for (size_t i = 0; job->forward && i < json_array_size(promised); i++) {
        const char *want =
            json_string_value(json_object_get(json_array_get(promised, i), "sha256"));
        const char *have =
            json_string_value(json_object_get(json_array_get(job->out.shards, i), "sha256"));
        if (!want || !have || strcmp(want, have))
            return perta_fail(err, PERTA_ECHECK,
                              "%s: SHA-256 %s, %s/manifest.json says %s: the patch is damaged",
                              job->patch.shards[i].name, have ? have : "none", job->patch.path,
                              want ? want : "none");
    }
    return 0;
}

static int finish(struct job *job, json_t **left_behind, struct perta_err *err)
{
    int rc = perta_input_unchanged(&job->model, err);
    if (rc)
        return rc;
    rc = reach_shard(job, job->patch.n_shards, err);
    if (!rc)
        rc = check_promise(job, err);
    return rc ? rc : perta_model_out_copy_rest(&job->out, job->model.ck, left_behind, err);
}

static int run_all(struct job *job, const struct perta_run *run, json_t **summary,
                   struct perta_err *err)
{
    int rc = begin_output(job, run, err);
    if (rc || perta_resume_is_publishing(&job->resume, summary))
        return rc;
    rc = open_stream(job, run, err);
    if (!rc)
        rc = restore(job, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    json_t *left_behind = json_array();
    if (!rc)
        rc = finish(job, &left_behind, err);
    if (!rc)
        *summary =
            json_pack("{s:I, s:I, s:I, s:O?, s:O}", "chunks", (json_int_t)job->resume.counts[0],
                      "read_bytes", (json_int_t)perta_stream_read_bytes(job->stream),
                      "written_bytes", (json_int_t)job->out.written_bytes, "shards",
                      job->out.shards, "left_behind", left_behind);
    json_decref(left_behind);
    return rc || *summary ? rc : perta_fail_sys(err, ENOMEM, "%s", job->apply->out);
}

static int check_arguments(const struct perta_apply *apply, struct perta_err *err)
{
    const struct perta_argument needed[] = {{"MODEL", apply->model}, {"PATCH", apply->patch}};
    const struct perta_argument out = {"--out", apply->out};
    int rc = perta_arguments_choice("mode", (int)apply->mode, PERTA_REVERT + 1, err);
    if (!rc)
        rc = perta_arguments_optional(&out, 1, err);
    return rc ? rc : perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
}

int perta_apply(const struct perta_apply *apply, const struct perta_run *run, json_t **summary,
                struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(apply, run, summary, err);
    if (!rc)
        rc = check_arguments(apply, err);
    if (rc || !apply->out)
        return rc ? rc : perta_in_place(apply, run, summary, err);
    struct job job = {
        .apply = apply,
        .forward = apply->mode == PERTA_APPLY,
    };
    rc = open_inputs(&job, run, err);
    if (!rc && run->dry_run) {
        *summary = json_object();
        rc = *summary ? 0 : perta_fail_sys(err, ENOMEM, "%s", apply->out);
    } else if (!rc) {
        rc = run_all(&job, run, summary, err);
        rc = perta_resume_end(&job.resume, rc, summary, err);
    }
    perta_model_out_release(&job.out);
    perta_patch_in_close(&job.patch);
    perta_input_close(&job.model);
    perta_codecs_free(job.codecs);
    free(job.starts);
    perta_stream_close(job.stream);
    return rc;
}
