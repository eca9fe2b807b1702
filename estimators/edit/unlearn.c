#include "estimators/edit/unlearn.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/unlearn_arguments.h"
#include "estimators/edit/unlearn_job.h"
#include "io/checked.h"
#include "io/fpenv.h"
#include "io/text.h"

#define OUT_ALIGN 64

_Static_assert(PERTA_COUNT_BINS == PERTA_WEIGHT_BINS, "patches record the histogram of weights");

/* What work() passes to commit() for each alpha; precedes the bytes in the piece's output. */
struct result {
    struct perta_edit_counts counts;
    struct perta_coded coded;
    uint64_t hash_before, hash_after;
};

/* Layout of a piece's output: results (n_alphas), then for each alpha the edited bytes and the
 * patch frame. */
struct layout {
    uint64_t after_at, frame_at, stride, frame_room, whole;
};

static struct layout lay_out(unsigned n_alphas, uint64_t len_bytes)
{
    struct layout l;
    l.after_at = perta_align_up(n_alphas * sizeof(struct result), OUT_ALIGN);
    l.frame_at = perta_align_up(len_bytes, OUT_ALIGN);
    l.frame_room = perta_codec_bound(len_bytes);
    l.stride = l.frame_at + perta_align_up(l.frame_room, OUT_ALIGN);
    l.whole = l.after_at + n_alphas * l.stride;
    return l;
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct perta_unlearn_job *job = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&job->walk, &at, piece))
        return 0;
    const struct perta_unlearn_row *row = &job->rows[at.index];
    for (int i = 0; i < PERTA_N_ROLES; i++)
        if (row->in[i])
            perta_input_range(&job->in[i], row->in[i], at.first_unit, at.n_units, &piece->in[i]);
    piece->out_bytes = lay_out(job->n_outs, at.len_bytes).whole;
    return 1;
}

static int bad_number(const struct perta_unlearn_job *job, unsigned worker,
                      const struct perta_unlearn_row *row, const struct perta_piece *piece,
                      const struct result *result, struct perta_err *err)
{
    int role = result->counts.bad_operand == PERTA_IN_RESULT ? PERTA_ROLE_MODEL
                                                             : (int)result->counts.bad_operand;
    const struct perta_ref *ref = row->in[role];
    uint64_t elem = piece->first_elem + result->counts.bad_elem;
    bool may_keep = job->rule.method != PERTA_SCALE; /* steps have no such option */
    if (role == PERTA_ROLE_TUNED && row->lora)
        return perta_adapter_bad_number(job->adapter, worker, row->lora, elem, may_keep, err);
    uint64_t width = perta_dtype_unit_bytes(ref->tensor->dtype);
    return perta_fail(
        err, PERTA_EINPUT, "%s: tensor %s, element %llu (byte %llu): %s%s",
        job->in[role].ck->shards[ref->shard].path, ref->tensor->name, (unsigned long long)elem,
        (unsigned long long)(ref->tensor->off_bytes + elem * width),
        result->counts.bad_operand == PERTA_IN_RESULT ? "the edited value is not finite"
        : role >= PERTA_ROLE_FORGET && job->rule.stat == PERTA_STAT_MEANSQ
            ? "not a finite mean square of at least 0"
            : "not a finite number",
        may_keep ? "; --nonfinite keep leaves such parameters unchanged" : "");
}

static int edit(const struct perta_unlearn_job *job, unsigned worker,
                const struct perta_unlearn_row *row, const struct perta_piece *piece,
                const struct layout *l, struct result *results, struct perta_err *err)
{
    struct perta_rule rule = job->rule;
    struct perta_view views[PERTA_N_ROLES] = {0};
    struct perta_edit_counts counts[PERTA_ALPHAS_MAX];
    void *outs[PERTA_ALPHAS_MAX];
    rule.method = row->method;
    for (int i = 0; i < PERTA_N_ROLES; i++)
        if (row->in[i])
            views[i] = (struct perta_view){row->in[i]->tensor->dtype, piece->in[i].data};
    if (row->lora) {
        const float *tau;
        int rc = perta_adapter_tau(job->adapter, &job->in[PERTA_ROLE_TUNED].files[0], worker,
                                   row->lora, piece->first_elem, piece->n_elems, &tau, err);
        if (rc)
            return rc;
        views[PERTA_ROLE_TUNED] = (struct perta_view){PERTA_F32, tau};
    }
    struct perta_edit_in in = {
        .model = views[PERTA_ROLE_MODEL],
        .tuned = views[PERTA_ROLE_TUNED],
        .base = views[PERTA_ROLE_BASE],
        .forget = views[PERTA_ROLE_FORGET],
        .retain = views[PERTA_ROLE_RETAIN],
        .scale = views[PERTA_ROLE_SCALE],
        .n = piece->n_elems,
        .first_elem = piece->first_elem,
        .name_hash = row->name_hash,
        .box = row->box,
    };
    for (unsigned a = 0; a < job->n_outs; a++)
        outs[a] = piece->out + l->after_at + a * l->stride;
    perta_edit(&rule, &in, job->alphas, job->n_outs, outs, counts);
    for (unsigned a = 0; a < job->n_outs; a++)
        results[a].counts = counts[a];
    return 0;
}

/* An adapter's factors are read when needed, through the page cache; its digest is taken at the
 * end. */
static bool is_adapter(const struct perta_unlearn_job *job, int role)
{
    return job->in[role].ck && job->in[role].ck->is_adapter;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct perta_unlearn_job *job = ctx;
    const struct perta_unlearn_row *row = &job->rows[piece->tag];
    const struct perta_range *before = &piece->in[PERTA_ROLE_MODEL];
    struct result *results = (struct result *)(void *)piece->out;
    struct layout l = lay_out(job->n_outs, before->len_bytes);
    uint64_t hash_before = perta_hash64(before->data, before->len_bytes);
    int rc = row->edited ? edit(job, worker, row, piece, &l, results, err) : 0;
    for (unsigned a = 0; a < job->n_outs && !rc; a++) {
        struct result *r = &results[a];
        r->hash_before = r->hash_after = hash_before;
        if (!row->edited) {
            r->counts = (struct perta_edit_counts){0};
            r->coded = (struct perta_coded){.encoding = PERTA_ENC_ZERO};
            continue;
        }
        if (r->counts.n_nonfinite && !job->rule.keep_nonfinite)
            return bad_number(job, worker, row, piece, r, err);
        uint8_t *after = piece->out + l.after_at + a * l.stride;
        r->hash_after = perta_hash64(after, before->len_bytes);
        rc = perta_patch_out_encode(job->unlearn->one_way, job->codecs[worker],
                                    row->in[PERTA_ROLE_MODEL]->tensor->dtype, before->data, after,
                                    before->len_bytes, after + l.frame_at, l.frame_room, &r->coded,
                                    &r->hash_before, err);
    }
    return rc;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct perta_unlearn_job *job = ctx;
    const struct perta_unlearn_row *row = &job->rows[piece->tag];
    const struct perta_range *before = &piece->in[PERTA_ROLE_MODEL];
    const struct result *results = (const struct result *)(const void *)piece->out;
    struct layout l = lay_out(job->n_outs, before->len_bytes);
    for (int i = 0; i < PERTA_N_ROLES; i++)
        if (!is_adapter(job, i))
            perta_input_digest(&job->in[i], &piece->in[i]);
    for (unsigned a = 0; a < job->n_outs; a++) {
        const struct result *r = &results[a];
        const uint8_t *after = piece->out + l.after_at + a * l.stride;
        int rc = perta_patch_out_reach(&job->outs[a], piece->shard, piece->tensor, err);
        if (rc)
            return rc;
        struct perta_tensor_counts *counts = perta_patch_out_counts(&job->outs[a]);
        counts->n_rounded_away += r->counts.n_rounded_away;
        counts->n_nonfinite += r->counts.n_nonfinite;
        counts->n_zero_forget += r->counts.n_zero_forget;
        counts->n_zero_retain += r->counts.n_zero_retain;
        counts->sum_weight += r->counts.sum_weight;
        for (int i = 0; i < PERTA_WEIGHT_BINS; i++)
            job->outs[a].weights[i] += r->counts.weights[i];
        struct perta_chunk_out chunk = {
            .coded = r->coded,
            .frame = after + l.frame_at,
            .after = row->edited ? after : before->data,
            .after_bytes = before->len_bytes,
            .n_units = (uint32_t)piece->n_elems,
            .hash_before = r->hash_before,
            .hash_after = r->hash_after,
        };
        rc = perta_patch_out_chunk(&job->outs[a], &chunk, err);
        if (rc)
            return rc;
    }
    return perta_resume_point(&job->resume, piece, job->stream, err);
}

static void measure(const struct perta_unlearn_job *job, struct perta_job *sizes,
                    uint64_t *chunk_bytes)
{
    *chunk_bytes = 0;
    for (uint64_t i = 0; i < job->in[PERTA_ROLE_MODEL].ck->n_tensors; i++) {
        uint64_t in_bytes = 0;
        for (int role = 0; role < PERTA_N_ROLES; role++)
            if (job->rows[i].in[role]) {
                in_bytes += perta_walk_chunk_bytes(job->rows[i].in[role]->tensor);
                sizes->total_bytes += job->rows[i].in[role]->tensor->len_bytes;
            }
        uint64_t chunk = perta_walk_chunk_bytes(job->rows[i].in[PERTA_ROLE_MODEL]->tensor);
        *chunk_bytes = perta_max(chunk, *chunk_bytes);
        sizes->in_bytes_max = perta_max(in_bytes, sizes->in_bytes_max);
    }
    sizes->out_bytes_max = lay_out(job->n_outs, *chunk_bytes).whole;
}

/* What the record calls the input of that role. */
static const char *name_of(const struct perta_unlearn_job *job, int role)
{
    return role == PERTA_ROLE_TUNED && job->box_sizes ? "box" : perta_roles[role] + 2;
}

/* Did the run itself write it? */
static bool is_own(const struct perta_unlearn_job *job, int role)
{
    return role == PERTA_ROLE_SCALE || (role == PERTA_ROLE_TUNED && job->box_sizes);
}

static json_t *identity_of(const struct perta_unlearn_job *job)
{
    const struct perta_unlearn *u = job->unlearn;
    json_t *inputs = json_object(), *recipes = json_array();
    for (int i = 0; i < PERTA_N_ROLES; i++)
        if (job->in[i].ck)
            perta_json_set(&inputs, name_of(job, i),
                           is_own(job, i) ? perta_journal_own(job->in[i].ck)
                                          : perta_journal_checkpoint(job->in[i].ck));
    for (unsigned a = 0; a < u->n_alphas; a++)
        perta_json_append(&recipes, perta_recipe_json(u, &job->rule, a, job->in));
    if (job->adapter)
        perta_json_set(&inputs, PERTA_ADAPTER_CONFIG,
                       json_incref(job->in[PERTA_ROLE_TUNED].ck->config));
    return perta_resume_identity(
        "unlearn",
        json_pack("{s:o, s:o, s:o}", "patch", perta_text_json("%s", u->patch), "out",
                  u->out ? perta_text_json("%s", u->out) : json_null(), "recipes", recipes),
        inputs);
}

static int begin_journal(struct perta_unlearn_job *job, const struct perta_run *run,
                         struct perta_err *err)
{
    char *last_folder = perta_unlearn_last_folder(job);
    job->walk.ck = job->in[PERTA_ROLE_MODEL].ck;
    job->resume.inputs = job->in;
    job->resume.n_inputs = PERTA_N_ROLES;
    job->resume.patches = job->outs;
    job->resume.walk = &job->walk;
    int rc = last_folder ? perta_resume_begin(&job->resume, run, last_folder, identity_of(job),
                                              job->unlearn->force, err)
                         : perta_fail_sys(err, ENOMEM, "%s", job->unlearn->patch);
    free(last_folder);
    return rc;
}

static int begin_outputs(struct perta_unlearn_job *job, const struct perta_run *run,
                         struct perta_err *err)
{
    int rc = begin_journal(job, run, err);
    for (; job->n_outs < job->unlearn->n_alphas && !rc; job->n_outs++) {
        char *patch = perta_unlearn_folder(job, job->unlearn->patch, job->n_outs);
        char *out = perta_unlearn_folder(job, job->unlearn->out, job->n_outs);
        job->alphas[job->n_outs] = job->unlearn->alphas[job->n_outs].value;
        rc = patch && (out || !job->unlearn->out)
                 ? perta_patch_out_begin(&job->outs[job->n_outs], patch, out, job->unlearn->model,
                                         &job->resume.journal, job->unlearn->force, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->unlearn->patch);
        job->outs[job->n_outs].one_way = job->unlearn->one_way;
        free(patch);
        free(out);
    }
    job->resume.n_patches = job->n_outs;
    return rc;
}

static int open_stream(struct perta_unlearn_job *job, const struct perta_run *run,
                       struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    struct perta_job sizes = {.ctx = job,
                              .n_in = PERTA_N_ROLES,
                              .next = next,
                              .work = work,
                              .commit = commit,
                              .later_bytes = job->n_outs * perta_patch_out_memory(model, model)};
    uint64_t chunk_bytes;
    const char **paths = NULL;
    size_t n_paths = 0;
    measure(job, &sizes, &chunk_bytes);
    sizes.worker_bytes = perta_codec_bytes(chunk_bytes);
    if (job->adapter && perta_add_overflows(sizes.worker_bytes, perta_adapter_memory(job->adapter),
                                            &sizes.worker_bytes))
        sizes.worker_bytes = UINT64_MAX;
    int rc = 0;
    for (int i = 0; i < PERTA_N_ROLES && !rc; i++)
        if (job->in[i].ck)
            rc = perta_input_paths(&job->in[i], &paths, &n_paths, err);
    unsigned n_writers = job->n_outs * (job->unlearn->out ? 2 : 1);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, n_writers, &job->stream, err);
    free(paths);
    if (rc)
        return rc;
    unsigned n_workers = perta_stream_workers(job->stream);
    if (!(job->codecs = perta_codecs_new(n_workers, chunk_bytes, err)))
        return err->code;
    return job->adapter ? perta_adapter_begin(job->adapter, n_workers, err) : 0;
}

static int attach(struct perta_unlearn_job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    struct perta_engine *engine = perta_stream_engine(job->stream);
    int rc = 0;
    for (int i = 0; i < PERTA_N_ROLES && !rc; i++)
        if (job->in[i].ck)
            rc = perta_input_open_files(&job->in[i], engine->wants_direct && !is_adapter(job, i),
                                        err);
    for (int i = 0; i < PERTA_N_ROLES && !rc; i++)
        if (job->in[i].ck)
            perta_input_digest_offload(&job->in[i], engine->hasher);
    for (unsigned a = 0; a < job->n_outs && !rc; a++) {
        struct perta_writer_bufs patch_bufs = perta_stream_writer_bufs(job->stream, a);
        struct perta_writer_bufs model_bufs = {0};
        if (job->unlearn->out)
            model_bufs = perta_stream_writer_bufs(job->stream, job->n_outs + a);
        rc = perta_patch_out_attach(&job->outs[a], model, model, job->actions, engine, patch_bufs,
                                    model_bufs, err);
    }
    return rc;
}

static int finish(struct perta_unlearn_job *job, json_t **summary, json_t *notes,
                  struct perta_err *err)
{
    json_t *inputs = json_object();
    json_t *results = json_array();
    int rc = 0;
    if (job->adapter)
        perta_input_digest_whole(&job->in[PERTA_ROLE_TUNED]);
    for (unsigned a = 0; a < job->n_outs && !rc; a++)
        rc = perta_patch_out_reach(&job->outs[a], job->in[PERTA_ROLE_MODEL].ck->n_shards, 0, err);
    for (int i = 0; i < PERTA_N_ROLES && !rc; i++)
        if (job->in[i].ck && !(rc = perta_input_digest_rest(&job->in[i], job->stream, err)) &&
            !(rc = perta_input_unchanged(&job->in[i], err)))
            perta_json_set(&inputs, name_of(job, i), perta_input_json(&job->in[i]));
    for (unsigned a = 0; a < job->n_outs && !rc; a++) {
        json_t *recipe = perta_recipe_json(job->unlearn, &job->rule, a, job->in);
        json_t *result = NULL;
        rc = perta_patch_out_finish(&job->outs[a], recipe, inputs, job->in[PERTA_ROLE_MODEL].ck,
                                    &result, err);
        json_decref(recipe);
        if (!rc) {
            perta_json_set(&result, "alpha", json_string(job->unlearn->alphas[a].text));
            perta_json_append(&results, result);
        }
    }
    perta_json_set(summary, "results", results);
    if (!rc) {
        perta_unlearn_note_same(inputs, notes);
        perta_unlearn_note_nothing(job, inputs, notes);
        perta_unlearn_note_zeros(job, notes);
    }
    json_decref(inputs);
    return rc;
}

static void release(struct perta_unlearn_job *job)
{
    perta_adapter_close(job->adapter);
    for (unsigned a = 0; a < job->n_outs; a++)
        perta_patch_out_release(&job->outs[a]);
    for (int i = 0; i < PERTA_N_ROLES; i++)
        perta_input_close(&job->in[i]);
    perta_stream_close(job->stream);
    perta_codecs_free(job->codecs);
    free(job->box_sizes);
    free(job->rows);
    free(job->actions);
}

/* After planning: write the outputs. */
static int run_all(struct perta_unlearn_job *job, const struct perta_run *run, json_t **summary,
                   json_t *notes, struct perta_err *err)
{
    int rc = begin_outputs(job, run, err);
    if (rc || perta_resume_is_publishing(&job->resume, summary))
        return rc;
    rc = open_stream(job, run, err);
    if (!rc)
        rc = attach(job, err);
    if (!rc)
        rc = perta_resume_restore(&job->resume, job->stream, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    if (!rc)
        rc = finish(job, summary, notes, err);
    if (!rc) {
        perta_json_set(summary, "read_bytes",
                       json_integer((json_int_t)perta_stream_read_bytes(job->stream)));
        perta_json_set(summary, "io",
                       json_pack("{s:s, s:s}", "engine",
                                 perta_stream_engine(job->stream)->ops->name, "why",
                                 perta_stream_choice(job->stream)->why));
        perta_json_set(summary, "notes", perta_notes_whole(json_incref(notes)));
    }
    return rc;
}

int perta_unlearn(const struct perta_unlearn *unlearn, const struct perta_run *run,
                  json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(unlearn, run, summary, err);
    if (!rc)
        rc = perta_unlearn_arguments(unlearn, err);
    if (rc)
        return rc;
    struct perta_unlearn_job *job = calloc(1, sizeof *job);
    json_t *notes = json_array();
    if (!job) {
        json_decref(notes);
        return perta_fail_sys(err, ENOMEM, "unlearn");
    }
    job->unlearn = unlearn;
    job->rule = unlearn->rule;
    perta_unlearn_note_unread(unlearn, notes);
    perta_unlearn_note_alphas(unlearn, notes);
    rc = perta_unlearn_plan(job, run, notes, err);
    if (!rc)
        perta_unlearn_note_missing(job, notes);
    if (!rc && !(*summary = json_pack("{s:o, s:o}", "notes", perta_notes_whole(json_incref(notes)),
                                      "unedited", perta_unlearn_unedited(job))))
        rc = perta_fail_sys(err, ENOMEM, "unlearn");
    if (!rc && !run->dry_run) {
        rc = run_all(job, run, summary, notes, err);
        rc = perta_resume_end(&job->resume, rc, summary, err);
    }
    json_decref(notes);
    release(job);
    free(job);
    return rc;
}
