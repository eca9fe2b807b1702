#include "estimators/passes/estimate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/estimate_job.h"
#include "estimators/passes/pass_arguments.h"
#include "io/fpenv.h"
#include "io/text.h"

/* ---- stores ---- */

/* Without a journal, nothing resumes from files, and other jobs use the folder, too. */
static const char *named(const struct perta_estimate_job *job, const char *name)
{
    return job->norms ? NULL : name;
}

static int open_x(struct perta_estimate_job *job, uint32_t layer, struct perta_err *err)
{
    char name[16];
    return perta_store_open(&job->x[layer], &job->scratch,
                            named(job, perta_estimate_x_name(name, layer)), job->samples.n_tokens,
                            job->weights.llm.hidden, err);
}

static int open_dx(struct perta_estimate_job *job, uint32_t layer, struct perta_store *dx,
                   struct perta_err *err)
{
    char name[16];
    job->scratch.free_bytes += job->reserved_bytes;
    job->reserved_bytes = 0;
    return perta_store_open(dx, &job->scratch, named(job, perta_estimate_dx_name(name, layer)),
                            job->samples.n_tokens, job->weights.llm.hidden, err);
}

/* Two stores of dx exist at a time and are used most, so they are given memory before those of
 * x. */
static void reserve_dx(struct perta_estimate_job *job)
{
    uint64_t rows = job->samples.n_tokens;
    uint64_t bytes =
        2 * job->be->ops->buffer_bytes(job->be, rows * job->weights.llm.hidden * sizeof(float));
    job->reserved_bytes = bytes < job->scratch.free_bytes ? bytes : 0;
    job->scratch.free_bytes -= job->reserved_bytes;
}

/* ---- backward ---- */

int perta_estimate_backward(struct perta_estimate_job *job, const struct perta_layer *layer,
                            struct perta_store *next, struct perta_err *err)
{
    struct perta_layer again = *layer;
    struct perta_acts acts;
    int rc = 0;
    if (perta_llm_has(layer->llm, layer->site.layer, PERTA_LAYER_MIXTURE))
        return perta_experts_backward(job, layer, next, err);
    again.again = true;
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        bool kept = perta_estimate_acts(job, layer->site.layer, batch.n, &acts);
        if (!kept)
            rc = perta_store_load(&job->x[layer->site.layer], batch.first, batch.n, acts.x, err);
        if (!rc)
            rc = perta_store_load(&job->dx, batch.first, batch.n, acts.dout, err);
        if (rc)
            break;
        if (!kept)
            perta_block_forward(&again, &batch, &acts);
        perta_block_backward(layer, &batch, &acts);
        rc = perta_store_set(next, batch.first, batch.n, acts.dx, err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
        if (!rc)
            rc = perta_estimate_advance(job, err);
    }
    return rc;
}

/* What to read after a layer in the backward pass: the layer before it; after the first layer, the
 * head, if that is tied and what follows (perta_embed_backward) reads nothing else first. */
static uint32_t before(const struct perta_estimate_job *job, uint32_t layer)
{
    const struct perta_llm *llm = &job->weights.llm;
    bool head = llm->tied && !*llm->names.embedding_norm;
    return layer ? layer - 1 : head ? llm->n_layers : UINT32_MAX;
}

static int backward_layer(struct perta_estimate_job *job, uint32_t number, struct perta_err *err)
{
    struct perta_layer layer =
        perta_estimate_layer(job, number, before(job, number), &job->sink.sink);
    struct perta_store next;
    perta_importance_sink_begin(&job->sink);
    int rc = open_dx(job, number, &next, err);
    if (!rc)
        rc = perta_estimate_backward(job, &layer, &next, err);
    if (!rc)
        rc = perta_importance_sink_end(&job->sink, number, err);
    perta_store_close(&job->dx, &job->scratch);
    job->dx = next;
    job->dx_layer = number;
    perta_store_close(&job->x[number], &job->scratch);
    return rc ? rc : perta_estimate_commit(job, PERTA_BACKWARD, number, err);
}

/* ---- the whole ---- */

static int check_outputs(const struct perta_estimate_job *job, struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    const char *const inputs[] = {e->model, e->data, e->adapter};
    const char *outputs[2];
    char *mean = perta_path_join(e->out, "mean"), *meansq = perta_path_join(e->out, "meansq");
    /* The outputs of a run that is resumed were checked when it began, and may be published by
     * now. */
    const char *home = e->meansq ? meansq : mean;
    bool go_on = home && job->run->resume && perta_journal_found(home);
    size_t n = 0;
    if (e->mean)
        outputs[n++] = mean;
    if (e->meansq)
        outputs[n++] = meansq;
    int rc = !mean || !meansq ? perta_fail_sys(err, ENOMEM, "%s", e->out)
             : go_on          ? 0
                              : perta_publish_check(outputs, n, inputs, 3, e->force, err);
    free(mean);
    free(meansq);
    return rc;
}

static int prepare(struct perta_estimate_job *job, struct perta_err *err)
{
    int rc = perta_estimate_open(job, err);
    if (!rc)
        rc = perta_estimate_apply(job, NULL, NULL, err);
    return rc ? rc : check_outputs(job, err);
}

/* Set total_bytes, for progress: the bytes of weights that remain to be read after that stage. */
static void count_bytes(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer)
{
    uint64_t all = 0, embedding = 0;
    for (uint64_t i = 0; i < job->weights.ck->n_tensors; i++) {
        const struct perta_ref *t = &job->weights.ck->by_name[i];
        uint64_t bytes = perta_weights_stored(&job->weights, t);
        all += bytes;
        if (!strcmp(t->tensor->name, perta_weights_embedding(&job->weights)))
            embedding = bytes;
    }
    bool tied = job->weights.llm.tied;
    uint64_t n = job->weights.llm.n_layers;
    uint64_t done = stage == PERTA_BEGUN       ? 0
                    : stage == PERTA_FORWARD   ? layer + 1
                    : stage == PERTA_HEAD_DONE ? n
                                               : 2 * n - layer;
    job->total_bytes = 2 * (all - embedding) + (tied ? 3 : 0) * embedding;
    job->total_bytes -= done * ((all - (tied ? 1 : 2) * embedding) / n); /* bytes of a layer */
}

static int start(struct perta_estimate_job *job, enum perta_stage *stage, uint32_t *layer,
                 struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    bool bf16 = perta_estimate_bf16(job);
    job->statistic.mean = e->mean ? &job->outs[0] : NULL;
    job->statistic.meansq = e->meansq ? &job->outs[1] : NULL;
    job->statistic.n_samples = job->samples.n;
    int rc = perta_estimate_plan(job, bf16, err);
    if (!rc)
        rc = perta_estimate_begin(job, bf16, stage, layer, err);
    if (!rc)
        rc = perta_weights_start(&job->weights, job->run->io, err);
    if (rc || *stage == PERTA_PUBLISH)
        return rc;
    count_bytes(job, *stage, *layer);
    rc = perta_estimate_open_head(job, &job->statistic, err);
    reserve_dx(job);
    return rc ? rc : perta_estimate_restore(job, *stage, *layer, err);
}

static int forward_layer(struct perta_estimate_job *job, uint32_t layer, struct perta_err *err)
{
    int rc = open_x(job, layer + 1, err);
    if (!rc)
        rc = perta_estimate_forward(job, layer, &job->x[layer], &job->x[layer + 1], err);
    return rc ? rc : perta_estimate_commit(job, PERTA_FORWARD, layer, err);
}

static int check_losses(const struct perta_estimate_job *job, struct perta_err *err)
{
    double loss;
    int rc = 0;
    for (uint64_t i = 0; i < job->samples.n && !rc; i++)
        rc = perta_estimate_loss(job, i, &loss, err);
    return rc;
}

/* Are the gradients taken? */
static bool goes_on(const struct perta_estimate_job *job)
{
    const struct perta_estimate *e = job->estimate;
    return !e->takes_gradients ||
           e->takes_gradients(e->ctx, job->means.loss, job->means.probability);
}

static int backward_head(struct perta_estimate_job *job, struct perta_err *err)
{
    uint32_t n_layers = job->weights.llm.n_layers;
    const struct perta_span last = {.site = perta_site_of(n_layers - 1)};
    int rc = open_dx(job, n_layers, &job->dx, err);
    job->dx_layer = n_layers;
    if (!rc)
        rc = perta_head_backward(&job->head, &job->x[n_layers], &last, &job->dx, err);
    return rc ? rc : perta_estimate_commit(job, PERTA_HEAD_DONE, 0, err);
}

/* The forward pass, from the layer after the last finished one; then the backward pass of the head,
 * unless no gradients are taken. */
static int run_forward(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                       struct perta_err *err)
{
    uint32_t n_layers = job->weights.llm.n_layers;
    const struct perta_span head = perta_head_first(&job->head);
    int rc = 0;
    if (stage == PERTA_BEGUN) {
        rc = open_x(job, 0, err);
        if (!rc)
            rc = perta_embed(&job->head, &job->x[0], err);
    }
    for (uint32_t l = stage == PERTA_BEGUN ? 0 : layer + 1; l < n_layers && !rc; l++)
        rc = forward_layer(job, l, err);
    if (!rc)
        rc = perta_head_forward(&job->head, &job->x[n_layers], &head, &job->means, err);
    if (!rc)
        rc = check_losses(job, err);
    if (!rc)
        rc = perta_estimate_advance(job, err);
    if (!rc)
        job->forward_only = !goes_on(job);
    return rc || job->forward_only ? rc : backward_head(job, err);
}

/* The backward pass of the layers below end, and of the embedding. */
static int run_backward(struct perta_estimate_job *job, uint32_t end, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t l = end; l-- > 0 && !rc;)
        rc = backward_layer(job, l, err);
    return rc ? rc : perta_embed_backward(&job->head, &job->dx, err);
}

static int run_all(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                   struct perta_err *err)
{
    uint32_t n_layers = job->weights.llm.n_layers;
    int rc = 0;
    if (stage < PERTA_HEAD_DONE)
        rc = run_forward(job, stage, layer, err);
    else if (job->weights.llm.tied) /* the embedding's gradient needs its results */
        rc = perta_head_forward(&job->head, &job->x[n_layers], NULL, &job->means, err);
    if (!rc && !job->forward_only)
        rc = run_backward(job, stage == PERTA_BACKWARD ? layer : n_layers, err);
    if (!rc)
        rc = perta_weights_unchanged(&job->weights, err);
    return rc;
}

int perta_estimate_norms(struct perta_estimate_job *job, struct perta_err *err)
{
    job->statistic.norms = job->norms;
    job->statistic.n_samples = job->samples.n;
    int rc = perta_norms_open(job->norms, job->samples.n, err);
    if (!rc)
        rc = perta_estimate_scratch_here(job, err);
    if (!rc)
        rc = perta_estimate_plan(job, perta_estimate_bf16(job), err);
    if (!rc)
        rc = perta_weights_start(&job->weights, job->run->io, err);
    if (rc)
        return rc;
    count_bytes(job, PERTA_BEGUN, 0);
    rc = perta_estimate_open_head(job, &job->statistic, err);
    reserve_dx(job);
    if (!rc)
        rc = run_all(job, PERTA_BEGUN, 0, err);
    if (!rc)
        perta_norms_end(job->norms);
    return rc;
}

/* The number of pieces that each worker took. */
static json_t *pieces_of(const struct perta_estimate_job *job)
{
    json_t *pieces = json_array();
    for (unsigned i = 0; job->workers && i < perta_workers_count(job->workers); i++)
        perta_json_append(&pieces, json_integer((json_int_t)perta_workers_taken(job->workers, i)));
    return pieces;
}

static void fill_summary(const struct perta_estimate_job *job, json_t **summary)
{
    json_t *folders = json_array();
    uint64_t written = 0;
    for (int i = 0; i < 2; i++)
        if (job->outs[i].fds && !job->forward_only) {
            written += job->outs[i].written_bytes;
            perta_json_append(&folders, perta_text_json("%s", job->outs[i].folder.path));
        }
    perta_json_set(summary, "folders", folders);
    perta_json_set(summary, "loss", perta_real_json(job->means.loss));
    perta_json_set(summary, "probability", perta_real_json(job->means.probability));
    if (job->estimate->by_probability)
        perta_json_set(summary, "spread", perta_real_json(job->means.spread));
    perta_json_set(summary, "batches", json_integer((json_int_t)job->n_batches));
    perta_json_set(summary, "pieces", pieces_of(job));
    perta_json_set(summary, "read_bytes", json_integer((json_int_t)job->weights.read_bytes));
    perta_json_set(summary, "written_bytes", json_integer((json_int_t)written));
    perta_json_set(summary, "scratch_bytes", json_integer((json_int_t)job->scratch.file_bytes));
}

static int check_arguments(const struct perta_estimate *e, struct perta_err *err)
{
    const struct perta_argument needed[] = {
        {"--model DIR", e->model}, {"--data FILE", e->data}, {"--out DIR", e->out}};
    const struct perta_argument given[] = {
        {"--adapter", e->adapter}, {"--data-key", e->data_key}, {"--scratch", e->scratch}};
    int rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (!rc)
        rc = perta_arguments_optional(given, sizeof given / sizeof *given, err);
    if (!rc && !e->mean && !e->meansq)
        rc = perta_fail(err, PERTA_EUSAGE, "--stat: mean, meansq or both");
    if (!rc)
        rc = perta_compute_argument(e->compute, err);
    if (!rc)
        rc = perta_rounding_argument(e->quantize, err);
    if (!rc)
        rc = perta_pick_argument(&e->pick, err);
    return rc ? rc : perta_scaled_arguments(e->at, err);
}

int perta_estimate(const struct perta_estimate *estimate, const struct perta_run *run,
                   json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(estimate, run, summary, err);
    if (!rc)
        rc = check_arguments(estimate, err);
    if (rc)
        return rc;
    struct perta_estimate_job *job = calloc(1, sizeof *job);
    if (!job)
        return perta_fail_sys(err, ENOMEM, "estimate");
    job->estimate = estimate;
    job->run = run;
    job->dx_saved = -1;
    enum perta_stage stage = PERTA_BEGUN;
    uint32_t layer = 0;
    rc = prepare(job, err);
    *summary = rc ? NULL
                  : json_pack("{s:I, s:I, s:O}", "samples", (json_int_t)job->samples.n, "tokens",
                              (json_int_t)job->samples.n_tokens, "notes", job->samples.notes);
    perta_json_set(summary, "unknown_config_keys",
                   rc ? NULL : perta_llm_unknown_keys(job->weights.ck->config));
    perta_estimate_say_rounded(job, summary);
    if (!rc && !*summary)
        rc = perta_fail_sys(err, ENOMEM, "estimate");
    if (!rc && !run->dry_run) {
        rc = start(job, &stage, &layer, err);
        if (!rc && stage != PERTA_PUBLISH)
            rc = run_all(job, stage, layer, err);
        fill_summary(job, summary);
        if (!rc)
            rc = job->forward_only ? perta_estimate_drop(job, err)
                                   : perta_estimate_publish(job, summary, err);
        if (rc)
            perta_estimate_abandon(job, rc, err);
    }
    perta_estimate_release(job);
    free(job);
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    return rc;
}
