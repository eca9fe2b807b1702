#include "estimators/steps/steps_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/model/weights.h"
#include "estimators/passes/importance.h"
#include "io/checked.h"
#include "io/format/convert.h"
#include "io/fpenv.h"
#include "stream/input.h"
#include "stream/walk.h"

/* ---- the rule ---- */

#define TILE 1024

typedef uint16_t __attribute__((aligned(1), may_alias)) u16_any;
typedef float __attribute__((aligned(1), may_alias)) f32_any;
typedef double __attribute__((aligned(1), may_alias)) f64_any;

/* to (n) = elements first.. of view, as double. */
static void load(const struct perta_view *view, uint64_t first, size_t n, double *restrict to)
{
    const u16_any *u16 = (const u16_any *)view->data + first;
    const f32_any *f32 = (const f32_any *)view->data + first;
    const f64_any *f64 = (const f64_any *)view->data + first;
    switch (view->dtype) {
    case PERTA_BF16:
        for (size_t i = 0; i < n; i++)
            to[i] = (double)perta_f32_from_bf16(u16[i]);
        break;
    case PERTA_F16:
        for (size_t i = 0; i < n; i++)
            to[i] = (double)perta_f32_from_f16(u16[i]);
        break;
    case PERTA_F32:
        for (size_t i = 0; i < n; i++)
            to[i] = (double)f32[i];
        break;
    default:
        for (size_t i = 0; i < n; i++)
            to[i] = f64[i];
        break;
    }
}

/* Does -g * tau raise the loss? Compares signs, so that no product underflows. */
static bool raises(double g, double tau)
{
    return (g < 0 && tau > 0) || (g > 0 && tau < 0);
}

static float moved(const struct perta_step_rule *rule, double tau, double forget, double retain,
                   float s)
{
    if (raises(retain, tau))
        s -= (float)rule->back_off;
    else if (raises(forget, tau))
        s += (float)rule->step;
    float most = (float)rule->max_scale;
    return s < 0 ? 0 : s > most ? most : s;
}

uint64_t perta_step_update(const struct perta_step_rule *rule, const struct perta_step_in *in,
                           uint16_t *to, double *sum)
{
    PERTA_FP_SCOPE;
    double tuned[TILE], base[TILE], forget[TILE], retain[TILE], scale[TILE];
    uint64_t n_moved = 0;
    *sum = 0;
    for (uint64_t first = 0; first < in->n; first += TILE) {
        size_t n = in->n - first < TILE ? (size_t)(in->n - first) : TILE;
        load(&in->tuned, first, n, tuned);
        load(&in->base, first, n, base);
        load(&in->forget, first, n, forget);
        load(&in->retain, first, n, retain);
        load(&in->scale, first, n, scale);
        for (size_t i = 0; i < n; i++) {
            float s = moved(rule, tuned[i] - base[i], forget[i], retain[i], (float)scale[i]);
            to[first + i] = perta_bf16_from_f32(s);
            s = perta_f32_from_bf16(to[first + i]);
            n_moved += s != (float)scale[i];
            *sum += (double)s;
        }
    }
    return n_moved;
}

/* ---- folders of scales ---- */

struct chosen {
    const struct perta_weights *weights;
    const struct perta_globs *globs;
};

static bool is_chosen(void *ctx, const char *name)
{
    const struct chosen *chosen = ctx;
    return perta_weights_is_parameter(chosen->weights, name) &&
           perta_globs_match(chosen->globs, name);
}

/* Begin a folder of scales with those tensors of like that wanted selects. It replaces what is at
 * path. */
static int begin_scales(struct perta_importance_out *out, const struct perta_checkpoint *like,
                        bool (*wanted)(void *ctx, const char *name), void *ctx, const char *path,
                        struct perta_err *err)
{
    const struct perta_journal no_journal = {.fd = -1, .resume = true};
    struct perta_behind *behind = NULL;
    struct perta_importance plan;
    int rc = perta_importance_plan_as(
        &plan, like, PERTA_BF16, json_pack("{s:s, s:s}", "format", "pt", "perta.stat", "scale"),
        wanted, ctx, err);
    if (!rc)
        rc = perta_behind_open(&behind, err);
    if (!rc)
        rc = perta_importance_begin(out, &plan, path, &no_journal, true, behind, err);
    out->behind = behind;
    perta_importance_release(&plan);
    return rc;
}

static int end_scales(struct perta_importance_out *out, struct perta_err *err)
{
    int rc = perta_importance_finish(out, err);
    return rc ? rc : perta_publish_commit(&out->folder, err);
}

static void release_scales(struct perta_importance_out *out)
{
    perta_behind_close(out->behind);
    perta_importance_out_release(out);
}

int perta_steps_zero(const struct perta_weights *model, const struct perta_globs *globs,
                     const char *to, struct perta_err *err)
{
    struct perta_importance_out out = {0};
    struct chosen chosen = {model, globs};
    int rc = begin_scales(&out, model->ck, is_chosen, &chosen, to, err);
    if (!rc && !out.n_tensors)
        rc = perta_fail(err, PERTA_EUSAGE, "%s: --include and --exclude leave no tensor to edit",
                        model->ck->path);
    if (!rc)
        rc = end_scales(&out, err);
    release_scales(&out);
    return rc;
}

/* ---- a step over all parameters ---- */

enum { IN_TUNED, IN_BASE, IN_FORGET, IN_RETAIN, IN_SCALE, N_IN };
static const char *const roles[N_IN] = {"--tuned", "--base", "forget gradients", "retain gradients",
                                        "scales"};

struct job {
    struct perta_step_rule rule;
    struct perta_input in[N_IN];
    struct perta_importance_out out;
    struct perta_walk walk; /* position of next() in the scales */
    struct perta_step_counts *counts;
    bool tied;
};

/* A piece's output: this header, then the new scales. */
struct result {
    uint64_t n_moved;
    double sum;
    uint16_t to[];
};

static const struct perta_ref *operand(const struct job *job, int i, const char *name)
{
    return perta_tied_find(job->in[i].ck, name, job->tied);
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&job->walk, &at, piece))
        return 0;
    for (int i = 0; i < N_IN; i++) {
        const struct perta_ref *ref = operand(job, i, at.info->name);
        if (!ref)
            return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s", job->in[i].ck->path,
                              at.info->name);
        perta_input_range(&job->in[i], ref, at.first_unit, at.n_units, &piece->in[i]);
    }
    piece->out_bytes = sizeof(struct result) + at.n_units * sizeof(uint16_t);
    return 1;
}

static const struct perta_tensor *tensor_of(const struct job *job, const struct perta_piece *piece)
{
    return &job->in[IN_SCALE].ck->shards[piece->shard].header->tensors[piece->tensor];
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    (void)worker;
    (void)err;
    const struct job *job = ctx;
    struct result *result = (struct result *)(void *)piece->out;
    struct perta_view views[N_IN];
    for (int i = 0; i < N_IN; i++) {
        const struct perta_ref *ref = operand(job, i, tensor_of(job, piece)->name);
        views[i] = (struct perta_view){ref->tensor->dtype, piece->in[i].data};
    }
    const struct perta_step_in in = {.tuned = views[IN_TUNED],
                                     .base = views[IN_BASE],
                                     .forget = views[IN_FORGET],
                                     .retain = views[IN_RETAIN],
                                     .scale = views[IN_SCALE],
                                     .n = piece->n_elems};
    result->n_moved = perta_step_update(&job->rule, &in, result->to, &result->sum);
    return 0;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct result *result = (const struct result *)(const void *)piece->out;
    job->counts->n += piece->n_elems;
    job->counts->n_moved += result->n_moved;
    job->counts->sum += result->sum;
    return perta_importance_write(&job->out, tensor_of(job, piece)->name, piece->first_elem,
                                  result->to, piece->n_elems, err);
}

static int open_inputs(struct job *job, const struct perta_step_folders *f, struct perta_err *err)
{
    const char *const folders[N_IN] = {f->tuned, f->base, f->forget, f->retain, f->from};
    int rc = 0;
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_open(&job->in[i], roles[i], folders[i], err);
    job->tied = f->tied;
    job->walk.ck = job->in[IN_SCALE].ck;
    return rc;
}

static void measure(const struct job *job, struct perta_job *sizes)
{
    const struct perta_checkpoint *scales = job->in[IN_SCALE].ck;
    for (uint64_t t = 0; t < scales->n_tensors; t++) {
        const struct perta_tensor *scale = scales->by_name[t].tensor;
        uint64_t in_bytes = 0, out = sizeof(struct result) + perta_walk_chunk_bytes(scale);
        for (int i = 0; i < N_IN; i++) {
            const struct perta_ref *ref = operand(job, i, scale->name);
            in_bytes += ref ? perta_walk_chunk_bytes(ref->tensor) : 0;
            sizes->total_bytes += ref ? ref->tensor->len_bytes : 0;
        }
        sizes->in_bytes_max = perta_max(in_bytes, sizes->in_bytes_max);
        sizes->out_bytes_max = perta_max(out, sizes->out_bytes_max);
    }
}

static int run_stream(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = {
        .ctx = job, .n_in = N_IN, .next = next, .work = work, .commit = commit};
    struct perta_run less = *run; /* without the memory that the writer takes later */
    struct perta_stream *stream = NULL;
    const char **paths = NULL;
    size_t n_paths = 0;
    int rc = 0;
    measure(job, &sizes);
    less.memory_bytes -= run->memory_bytes > PERTA_BEHIND_BYTES ? PERTA_BEHIND_BYTES : 0;
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_paths(&job->in[i], &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(&less, &sizes, paths, n_paths, 0, &stream, err);
    free(paths);
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_open_files(&job->in[i], perta_stream_engine(stream)->wants_direct, err);
    if (!rc)
        rc = perta_stream_run(stream, err);
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_unchanged(&job->in[i], err);
    for (int i = 0; i < N_IN; i++)
        perta_input_close(&job->in[i]);
    perta_stream_close(stream);
    return rc;
}

int perta_steps_update(const struct perta_step_rule *rule, const struct perta_step_folders *folders,
                       const struct perta_run *run, struct perta_step_counts *counts,
                       struct perta_err *err)
{
    struct job job = {.rule = *rule, .counts = counts};
    *counts = (struct perta_step_counts){0};
    int rc = open_inputs(&job, folders, err);
    if (!rc)
        rc = begin_scales(&job.out, job.in[IN_SCALE].ck, NULL, NULL, folders->to, err);
    rc = rc ? rc : run_stream(&job, run, err);
    for (int i = 0; i < N_IN; i++)
        perta_input_close(&job.in[i]);
    if (!rc)
        rc = end_scales(&job.out, err);
    release_scales(&job.out);
    return rc;
}
