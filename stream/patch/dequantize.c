#include "stream/patch/dequantize.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/format/dequantise.h"
#include "io/format/quant_config.h"
#include "io/fpenv.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/input.h"
#include "stream/patch/model_out.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

enum { IN_DATA, IN_SCALES, N_IN };

/* A shard that is written; of those without tensors there is none. */
struct out_shard {
    struct perta_tensor *tensors; /* (n), names and shapes are the model's */
    uint64_t n, file_bytes;
    uint8_t *header; /* (header_bytes) */
    uint64_t header_bytes;
};

struct job {
    const struct perta_dequantize *what;
    struct perta_input model; /* as dequantised */
    struct perta_dequantise *how;
    struct out_shard *shards; /* (n_shards), by number in the model */
    char *config;             /* text of config.json to be written (config_bytes) */
    size_t config_bytes;
    struct perta_model_out out;
    struct perta_resume resume; /* counts[0]: pieces */
    struct perta_stream *stream;
    uint32_t shard; /* position of next() */
    uint64_t tensor, unit;
    uint32_t shards_begun; /* used by commit() */
};

/* ---- pieces ---- */

static const struct perta_quant *coded_at(const struct job *job, uint32_t shard, uint64_t tensor)
{
    return &job->how->shards[shard][tensor];
}

/* Units of a tensor's piece. */
static uint64_t piece_units(const struct job *job, uint32_t shard, uint64_t tensor)
{
    const struct perta_quant *coded = coded_at(job, shard, tensor);
    return coded->coding == PERTA_CODING_MXFP4 ? perta_quant_unit(coded) : PERTA_CHUNK_ELEMS;
}

static uint64_t units_of(const struct perta_tensor *t)
{
    return t->len_bytes / perta_dtype_unit_bytes(t->dtype);
}

/* Move on to a tensor that has units left. */
static bool reach_units(struct job *job)
{
    const struct perta_checkpoint *ck = job->model.ck;
    for (; job->shard < ck->n_shards; job->shard++, job->tensor = 0)
        for (; job->tensor < ck->shards[job->shard].header->n_tensors; job->tensor++, job->unit = 0)
            if (job->unit < units_of(&ck->shards[job->shard].header->tensors[job->tensor]))
                return true;
    return false;
}

static void set_range(struct job *job, const struct perta_extent *extent, struct perta_range *range)
{
    *range =
        (struct perta_range){.file = job->model.files ? &job->model.files[extent->shard] : NULL,
                             .off_bytes = extent->off_bytes,
                             .len_bytes = extent->len_bytes};
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    (void)err;
    if (!reach_units(job))
        return 0;
    const struct perta_tensor *t = &job->model.ck->shards[job->shard].header->tensors[job->tensor];
    const struct perta_quant *coded = coded_at(job, job->shard, job->tensor);
    uint64_t left = units_of(t) - job->unit, most = piece_units(job, job->shard, job->tensor);
    uint64_t n = left < most ? left : most, width = perta_dtype_unit_bytes(t->dtype);
    struct perta_extent need[N_IN] = {{job->shard, t->off_bytes + job->unit * width, n * width},
                                      {0}};
    piece->shard = job->shard;
    piece->tensor = (uint32_t)job->tensor;
    piece->first_elem = job->unit;
    piece->n_elems = n;
    piece->out_bytes = 0;
    if (coded->coding != PERTA_CODING_NONE) {
        perta_quant_need(coded, job->unit, n, &need[IN_DATA], &need[IN_SCALES]);
        set_range(job, &need[IN_SCALES], &piece->in[IN_SCALES]);
        piece->out_bytes = n * width;
    }
    set_range(job, &need[IN_DATA], &piece->in[IN_DATA]);
    job->unit += n;
    return 1;
}

/* Go through all pieces once, for their sizes. */
static void measure(struct job *job, struct perta_job *sizes)
{
    struct perta_range in[N_IN] = {{0}};
    struct perta_piece piece = {.in = in};
    struct perta_err never = {0};
    while (next(job, &piece, &never) > 0) {
        uint64_t bytes = in[IN_DATA].len_bytes + in[IN_SCALES].len_bytes;
        sizes->in_bytes_max = perta_max(bytes, sizes->in_bytes_max);
        sizes->out_bytes_max = perta_max(piece.out_bytes, sizes->out_bytes_max);
        sizes->total_bytes += bytes;
        memset(in, 0, sizeof in);
    }
    job->shard = 0;
    job->tensor = job->unit = 0;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_quant *coded = coded_at(job, piece->shard, piece->tensor);
    (void)worker;
    return coded->coding == PERTA_CODING_NONE
               ? 0
               : perta_quant_form(coded, piece->first_elem, piece->n_elems, piece->in[IN_DATA].data,
                                  piece->in[IN_SCALES].data, piece->out, job->model.ck, err);
}

/* ---- shards ---- */

static int build_shard(struct job *job, uint32_t s, struct perta_err *err)
{
    const struct perta_header *header = job->model.ck->shards[s].header;
    struct out_shard *out = &job->shards[s];
    out->n = header->n_tensors;
    out->tensors = malloc((out->n + 1) * sizeof *out->tensors);
    if (!out->tensors)
        return perta_fail_sys(err, ENOMEM, "%s", job->model.ck->shards[s].path);
    if (out->n)
        memcpy(out->tensors, header->tensors, out->n * sizeof *out->tensors);
    int rc = perta_safetensors_build(out->tensors, out->n, header->metadata, &out->header,
                                     &out->header_bytes, err);
    if (rc)
        return perta_err_context(err, "%s", job->model.ck->shards[s].path);
    const struct perta_tensor *last = out->n ? &out->tensors[out->n - 1] : NULL;
    out->file_bytes = last ? last->off_bytes + last->len_bytes : 0;
    return 0;
}

static int build_shards(struct job *job, struct perta_err *err)
{
    uint32_t n = job->model.ck->n_shards;
    job->shards = calloc(n + 1u, sizeof *job->shards);
    int rc = job->shards ? 0 : perta_fail_sys(err, ENOMEM, "%s", job->what->out);
    for (uint32_t s = 0; s < n && !rc; s++)
        rc = build_shard(job, s, err);
    return rc;
}

/* Finish the shards before this one, and begin it. */
static int reach_shard(struct job *job, uint32_t shard, struct perta_err *err)
{
    const struct perta_shard *all = job->model.ck->shards;
    int rc = 0;
    for (; !rc && job->shards_begun <= shard; job->shards_begun++) {
        uint32_t s = job->shards_begun;
        if (s && job->shards[s - 1].n)
            rc = perta_model_out_shard_end(&job->out, all[s - 1].name, err);
        if (!rc && s < job->model.ck->n_shards && job->shards[s].n)
            rc = perta_model_out_shard(&job->out, all[s].name, job->shards[s].header,
                                       job->shards[s].header_bytes, job->shards[s].file_bytes, err);
    }
    return rc;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_range *data = &piece->in[IN_DATA];
    job->resume.counts[0]++;
    int rc = reach_shard(job, piece->shard, err);
    if (!rc && piece->out_bytes)
        rc = perta_model_out_append(&job->out, piece->out, piece->out_bytes, err);
    else if (!rc)
        rc = perta_model_out_append(&job->out, data->data, data->len_bytes, err);
    return rc ? rc : perta_resume_point(&job->resume, piece, job->stream, err);
}

/* ---- the files beside the shards ---- */

static uint32_t count_shards(const struct job *job, uint32_t before)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < before; s++)
        n += job->shards[s].n > 0;
    return n;
}

static bool print_index(FILE *to, void *ctx)
{
    const struct job *job = ctx;
    const struct perta_checkpoint *ck = job->model.ck;
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < ck->n_tensors; i++)
        bytes += ck->by_name[i].tensor->len_bytes;
    fprintf(to, "{\n  \"metadata\": {\n    \"total_size\": %llu\n  },\n  \"weight_map\": {",
            (unsigned long long)bytes);
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        json_t *name = json_string(ck->by_name[i].tensor->name);
        json_t *shard = json_string(ck->shards[ck->by_name[i].shard].name);
        fputs(i ? ",\n    " : "\n    ", to);
        bool good = name && shard && !json_dumpf(name, to, JSON_ENCODE_ANY) &&
                    fputs(": ", to) >= 0 && !json_dumpf(shard, to, JSON_ENCODE_ANY);
        json_decref(name);
        json_decref(shard);
        if (!good)
            return false;
    }
    fputs("\n  }\n}\n", to);
    return true;
}

/* An index, unless the only shard is found by its name. */
static int write_index(struct job *job, struct perta_err *err)
{
    const struct perta_checkpoint *ck = job->model.ck;
    bool is_single = count_shards(job, ck->n_shards) == 1;
    for (uint32_t s = 0; s < ck->n_shards; s++)
        is_single =
            is_single && (!job->shards[s].n || !strcmp(ck->shards[s].name, "model.safetensors"));
    int rc = perta_publish_remove(&job->out.folder, PERTA_INDEX_NAME, err);
    return rc || is_single
               ? rc
               : perta_publish_print(&job->out.folder, PERTA_INDEX_NAME, print_index, job, err);
}

static int write_config(struct job *job, struct perta_err *err)
{
    int rc = perta_publish_remove(&job->out.folder, "config.json", err);
    return rc ? rc
              : perta_publish_file(&job->out.folder, "config.json", job->config, job->config_bytes,
                                   err);
}

/* ---- open, run, close ---- */

static int open_inputs(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    const struct perta_dequantize *what = job->what;
    int rc = perta_input_open(&job->model, "model", what->model, err);
    if (!rc)
        rc = perta_dequantise_open(job->model.ck, &job->how, err);
    if (!rc && !job->how)
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: its config.json has no \"quantization_config\", and its weights are "
                        "not quantised: there is nothing to dequantise",
                        what->model);
    if (!rc)
        rc = perta_quant_config_cut(job->model.ck, &job->config, &job->config_bytes, err);
    if (!rc)
        rc = build_shards(job, err);
    return rc || perta_resume_found(run, what->out)
               ? rc
               : perta_publish_check(&what->out, 1, &what->model, 1, what->force, err);
}

static int begin_output(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    const struct perta_dequantize *what = job->what;
    json_t *inputs = json_pack("{s:o, s:o}", "model", perta_journal_checkpoint(job->model.ck),
                               "config", perta_journal_config(job->model.ck));
    job->resume.models = &job->out;
    job->resume.n_models = 1;
    int rc = perta_resume_begin(&job->resume, run, what->out,
                                perta_resume_identity("dequantize", json_object(), inputs),
                                what->force, err);
    return rc ? rc
              : perta_model_out_begin(&job->out, what->out, what->model, &job->resume.journal,
                                      what->force, err);
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = {
        .ctx = job, .n_in = N_IN, .next = next, .work = work, .commit = commit};
    const char **paths = NULL;
    size_t n_paths = 0;
    measure(job, &sizes);
    int rc = perta_input_paths(&job->model, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, 1, &job->stream, err);
    free(paths);
    if (rc)
        return rc;
    job->out.engine = perta_stream_engine(job->stream);
    job->out.writer_bufs = perta_stream_writer_bufs(job->stream, 0);
    return perta_input_open_files(&job->model, job->out.engine->wants_direct, err);
}

/* Restore the state that was recorded, and the position of next(). */
static int restore(struct job *job, struct perta_err *err)
{
    const struct perta_resume *r = &job->resume;
    const struct perta_checkpoint *ck = job->model.ck;
    int rc = perta_resume_restore(&job->resume, job->stream, err);
    if (rc || !r->journal.resuming)
        return rc;
    bool is_there = r->shard < ck->n_shards && r->tensor < ck->shards[r->shard].header->n_tensors;
    if (!is_there || !perta_walk_is_place(ck->shards[r->shard].header, r->tensor, r->unit,
                                          piece_units(job, r->shard, r->tensor)))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: no chunk ends where its last record says; --force starts over",
                          r->journal.path);
    const struct perta_tensor *t = &job->shards[r->shard].tensors[r->tensor];
    job->shard = r->shard;
    job->tensor = r->tensor;
    job->unit = r->unit;
    job->shards_begun = r->shard + 1;
    return perta_model_out_reopen(&job->out, count_shards(job, r->shard), ck->shards[r->shard].name,
                                  t->off_bytes + r->unit * perta_dtype_unit_bytes(t->dtype), err);
}

static int finish(struct job *job, json_t **left_behind, struct perta_err *err)
{
    int rc = perta_input_unchanged(&job->model, err);
    if (!rc)
        rc = perta_checkpoint_unchanged(job->model.ck, err);
    if (!rc)
        rc = reach_shard(job, job->model.ck->n_shards, err);
    if (!rc)
        rc = perta_model_out_copy_rest(&job->out, job->model.ck, left_behind, err);
    if (!rc)
        rc = write_index(job, err);
    return rc ? rc : write_config(job, err);
}

/* What is done, whether or not it is done yet. */
static json_t *describe(const struct job *job)
{
    const char *dtype = NULL;
    json_int_t bytes = 0;
    for (uint32_t s = 0; s < job->model.ck->n_shards; s++) {
        bytes += (json_int_t)job->shards[s].file_bytes;
        for (uint64_t t = 0; t < job->shards[s].n; t++)
            if (coded_at(job, s, t)->coding != PERTA_CODING_NONE)
                dtype = perta_dtype_name(coded_at(job, s, t)->dtype);
    }
    return json_pack("{s:s?, s:I, s:I, s:I, s:I, s:I}", "dtype", dtype, "tensors",
                     (json_int_t)job->model.ck->n_tensors, "dequantised",
                     (json_int_t)job->how->n_coded, "scales", (json_int_t)job->how->n_scales,
                     "dropped", (json_int_t)job->how->n_dropped, "model_bytes", bytes);
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
    if (!rc) {
        *summary = describe(job);
        perta_json_set(summary, "chunks", json_integer((json_int_t)job->resume.counts[0]));
        perta_json_set(summary, "read_bytes",
                       json_integer((json_int_t)perta_stream_read_bytes(job->stream)));
        perta_json_set(summary, "written_bytes", json_integer((json_int_t)job->out.written_bytes));
        perta_json_set(summary, "shards", json_incref(job->out.shards));
        perta_json_set(summary, "left_behind", json_incref(left_behind));
    }
    json_decref(left_behind);
    return rc || *summary ? rc : perta_fail_sys(err, ENOMEM, "%s", job->what->out);
}

static void release(struct job *job)
{
    perta_model_out_release(&job->out);
    for (uint32_t s = 0; job->shards && s < job->model.ck->n_shards; s++) {
        free(job->shards[s].tensors);
        free(job->shards[s].header);
    }
    free(job->shards);
    free(job->config);
    perta_dequantise_close(job->how);
    perta_input_close(&job->model);
    perta_stream_close(job->stream);
}

int perta_dequantize(const struct perta_dequantize *what, const struct perta_run *run,
                     json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(what, run, summary, err);
    if (rc)
        return rc;
    const struct perta_argument needed[] = {{"MODEL", what->model}, {"--out DIR", what->out}};
    rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (rc)
        return rc;
    struct job job = {.what = what};
    rc = open_inputs(&job, run, err);
    if (!rc && run->dry_run) {
        *summary = describe(&job);
        rc = *summary ? 0 : perta_fail_sys(err, ENOMEM, "%s", what->out);
    } else if (!rc) {
        rc = run_all(&job, run, summary, err);
        rc = perta_resume_end(&job.resume, rc, summary, err);
    }
    release(&job);
    return rc;
}
