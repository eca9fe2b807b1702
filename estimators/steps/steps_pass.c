/* What all passes over parameters share: the folders that they write, and the loop. */
#include "estimators/steps/steps_job.h"

#include <assert.h>
#include <stdlib.h>

#include "io/checked.h"
#include "io/format/convert.h"

/* ---- elements ---- */

typedef uint16_t __attribute__((aligned(1), may_alias)) u16_any;
typedef float __attribute__((aligned(1), may_alias)) f32_any;
typedef double __attribute__((aligned(1), may_alias)) f64_any;

void perta_steps_load(const struct perta_view *view, uint64_t first, size_t n, double *restrict to)
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
    case PERTA_I8:
        for (size_t i = 0; i < n; i++)
            to[i] = (double)((const int8_t *)view->data)[first + i];
        break;
    default:
        for (size_t i = 0; i < n; i++)
            to[i] = f64[i];
        break;
    }
}

/* ---- folders with the model's layout ---- */

int perta_steps_out_begin(struct perta_importance_out *out, const struct perta_checkpoint *like,
                          enum perta_dtype dtype, json_t *metadata,
                          bool (*wanted)(void *ctx, const char *name), void *ctx, const char *path,
                          struct perta_err *err)
{
    const struct perta_journal no_journal = {.fd = -1, .resume = true};
    struct perta_behind *behind = NULL;
    struct perta_importance plan;
    int rc = perta_importance_plan_as(&plan, like, dtype, metadata, wanted, ctx, err);
    if (!rc)
        rc = perta_behind_open(&behind, err);
    if (!rc)
        rc = perta_importance_begin(out, &plan, path, &no_journal, true, behind, err);
    out->behind = behind;
    perta_importance_release(&plan);
    return rc;
}

int perta_steps_out_finish(struct perta_importance_out *out, struct perta_err *err)
{
    int rc = perta_importance_finish(out, err);
    return rc ? rc : perta_publish_commit(&out->folder, err);
}

void perta_steps_out_release(struct perta_importance_out *out)
{
    perta_behind_close(out->behind);
    perta_importance_out_release(out);
}

/* ---- scales ---- */

json_t *perta_steps_scale_metadata(void)
{
    return json_pack("{s:s, s:s}", "format", "pt", "perta.stat", "scale");
}

static bool is_chosen(const struct perta_steps_job *job, const char *name)
{
    const struct perta_ref *ref = perta_checkpoint_find(job->weights.ck, name);
    return perta_weights_is_parameter(&job->weights, name) &&
           perta_globs_match(&job->steps->globs, name) &&
           (!perta_steps_is_own(job->steps) ||
            perta_llm_is_matrix(&job->weights.llm, name, ref->tensor->n_dims)) &&
           (!job->adapter || perta_adapter_find(job->adapter, name));
}

int perta_steps_any(const struct perta_steps_job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->weights.ck;
    for (uint64_t i = 0; i < model->n_tensors; i++)
        if (is_chosen(job, model->by_name[i].tensor->name))
            return 0;
    return perta_fail(err, PERTA_EUSAGE, "%s: --include and --exclude leave no %s to edit",
                      model->path, perta_steps_is_own(job->steps) ? "matrix" : "tensor");
}

static bool is_wanted(void *job, const char *name)
{
    return is_chosen(job, name);
}

int perta_steps_zero(struct perta_steps_job *job, const char *to, struct perta_err *err)
{
    struct perta_importance_out out = {0};
    int rc = perta_steps_out_begin(&out, job->weights.ck, PERTA_BF16, perta_steps_scale_metadata(),
                                   is_wanted, job, to, err);
    if (!rc)
        rc = perta_steps_out_finish(&out, err);
    perta_steps_out_release(&out);
    return rc;
}

/* ---- the loop ---- */

/* Of the inputs, --tuned and --base give the task vector. */
static bool gives_tau(const struct perta_steps_pass *pass, unsigned i)
{
    return pass->model && i < 2;
}

/* NULL: there is nothing to read. */
static const struct perta_ref *operand(const struct perta_steps_pass *pass, unsigned i,
                                       const char *name)
{
    if (!pass->in[i].ck)
        return NULL;
    return perta_adapter_operand(gives_tau(pass, i) ? pass->adapter : NULL, pass->in[i].ck, name,
                                 pass->tied);
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct perta_steps_pass *pass = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&pass->walk, &at, piece))
        return 0;
    for (unsigned i = 0; i < pass->n_read; i++) {
        const struct perta_ref *ref = operand(pass, i, at.info->name);
        if (ref)
            perta_input_range(&pass->in[i], ref, at.first_unit, at.n_units, &piece->in[i]);
        else if (pass->in[i].ck &&
                 !(gives_tau(pass, i) && perta_adapter_lora(pass->adapter, at.info->name)))
            return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s", pass->in[i].ck->path,
                              at.info->name);
    }
    piece->out_bytes = pass->head_bytes + at.n_units * pass->elem_bytes;
    return 1;
}

static struct perta_steps_piece piece_of(const struct perta_steps_pass *pass,
                                         const struct perta_piece *piece)
{
    const struct perta_checkpoint *scales = pass->scales;
    const struct perta_tensor *scale = &scales->shards[piece->shard].header->tensors[piece->tensor];
    return (struct perta_steps_piece){
        .scale = scale,
        .index = (uint64_t)(perta_checkpoint_find(scales, scale->name) - scales->by_name),
        .first = piece->first_elem,
        .n = piece->n_elems,
        .out = piece->out};
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    const struct perta_steps_pass *pass = ctx;
    struct perta_steps_piece own = piece_of(pass, piece);
    const struct perta_change *lora = perta_adapter_lora(pass->adapter, own.scale->name);
    for (unsigned i = 0; i < pass->n_read; i++) {
        const struct perta_ref *ref = operand(pass, i, own.scale->name);
        if (ref)
            own.in[i] = (struct perta_view){ref->tensor->dtype, piece->in[i].data};
    }
    if (lora) {
        const float *tau;
        int rc = perta_adapter_tau(pass->adapter, &pass->in[0].files[0], worker, lora, own.first,
                                   own.n, &tau, err);
        if (rc)
            return rc;
        own.in[0] = (struct perta_view){PERTA_F32, tau};
    }
    pass->work(pass->ctx, &own);
    return 0;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct perta_steps_pass *pass = ctx;
    const struct perta_steps_piece own = piece_of(pass, piece);
    return pass->commit(pass->ctx, &own, err);
}

int perta_steps_pass_open(struct perta_steps_pass *pass, const struct perta_steps_input *inputs,
                          unsigned n_in, unsigned n_read, bool tied, struct perta_err *err)
{
    int rc = 0;
    assert(n_in && n_in <= PERTA_STEPS_INPUTS_MAX && n_read <= n_in);
    pass->n_in = n_in;
    pass->n_read = n_read;
    pass->tied = tied;
    for (unsigned i = 0; i < n_in && !rc; i++) {
        if (!inputs[i].path)
            continue;
        rc = pass->model && !i && perta_checkpoint_is_adapter(inputs[i].path)
                 ? perta_adapter_open_input(&pass->in[i], inputs[i].role, inputs[i].path,
                                            pass->model, &pass->adapter, NULL, err)
                 : perta_input_open(&pass->in[i], inputs[i].role, inputs[i].path, err);
    }
    pass->scales = pass->walk.ck = pass->in[n_in - 1].ck;
    return rc;
}

static void measure(const struct perta_steps_pass *pass, struct perta_job *sizes)
{
    for (uint64_t t = 0; t < pass->scales->n_tensors; t++) {
        const struct perta_tensor *scale = pass->scales->by_name[t].tensor;
        uint64_t n = perta_walk_chunk_bytes(scale) / perta_dtype_unit_bytes(scale->dtype);
        uint64_t in_bytes = 0;
        for (unsigned i = 0; i < pass->n_read; i++) {
            const struct perta_ref *ref = operand(pass, i, scale->name);
            in_bytes += ref ? perta_walk_chunk_bytes(ref->tensor) : 0;
            sizes->total_bytes += ref ? ref->tensor->len_bytes : 0;
        }
        sizes->in_bytes_max = perta_max(in_bytes, sizes->in_bytes_max);
        sizes->out_bytes_max =
            perta_max(pass->head_bytes + n * pass->elem_bytes, sizes->out_bytes_max);
    }
}

int perta_steps_pass_run(struct perta_steps_pass *pass, const struct perta_run *run,
                         struct perta_err *err)
{
    struct perta_job sizes = {
        .ctx = pass, .n_in = pass->n_read, .next = next, .work = work, .commit = commit};
    struct perta_run less = *run; /* without the memory that the writer takes later */
    struct perta_stream *stream = NULL;
    const char **paths = NULL;
    size_t n_paths = 0;
    int rc = 0;
    measure(pass, &sizes);
    sizes.worker_bytes = pass->adapter ? perta_adapter_memory(pass->adapter) : 0;
    less.memory_bytes -= run->memory_bytes > PERTA_BEHIND_BYTES ? PERTA_BEHIND_BYTES : 0;
    for (unsigned i = 0; i < pass->n_read && !rc; i++)
        if (pass->in[i].ck)
            rc = perta_input_paths(&pass->in[i], &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(&less, &sizes, paths, n_paths, 0, &stream, err);
    free(paths);
    for (unsigned i = 0; i < pass->n_read && !rc; i++)
        if (pass->in[i].ck)
            rc = perta_input_open_files(
                &pass->in[i],
                perta_stream_engine(stream)->wants_direct && !pass->in[i].ck->is_adapter, err);
    if (!rc && pass->adapter)
        rc = perta_adapter_begin(pass->adapter, perta_stream_workers(stream), err);
    if (!rc)
        rc = perta_stream_run(stream, err);
    for (unsigned i = 0; i < pass->n_read && !rc; i++)
        if (pass->in[i].ck)
            rc = perta_input_unchanged(&pass->in[i], err);
    perta_stream_close(stream);
    return rc;
}

void perta_steps_pass_close(struct perta_steps_pass *pass)
{
    perta_adapter_close(pass->adapter);
    for (unsigned i = 0; i < pass->n_in; i++)
        perta_input_close(&pass->in[i]);
}
