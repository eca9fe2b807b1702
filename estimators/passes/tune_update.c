/* One update of tune: a forward and a backward pass, then a step of AdamW. Spec: docs/tune.md */
#include <math.h>

#include "estimators/passes/tune_job.h"

/* ---- the sink ---- */

struct sink {
    struct perta_gradient_sink sink; /* first member */
    struct perta_tune_job *job;
};

/* Add a batch's gradient of A and B. */
static int on_linear(struct perta_gradient_sink *of, struct perta_site site, enum perta_param param,
                     const struct perta_batch *batch, struct perta_array x, struct perta_array dy,
                     struct perta_err *err)
{
    const struct perta_tune_job *job = ((struct sink *)of)->job;
    const struct perta_factors *factors = &job->pass.factors;
    const struct perta_factor *f = perta_factors_find(factors, site, param);
    struct perta_backend *be = job->pass.be;
    (void)err;
    if (!f)
        return 0;
    struct perta_low_rank lora = perta_factor_in(f, factors->values);
    struct perta_low_rank d = perta_factor_in(f, job->gradients);
    be->ops->low_rank_gradient(be, &lora, &batch->tiles, x, dy, d.a, d.b, batch->n, factors->room);
    return 0;
}

/* ---- forward ---- */

static int open_store(struct perta_estimate_job *pass, struct perta_store *store,
                      struct perta_err *err)
{
    return perta_store_open(store, &pass->scratch, NULL, pass->samples.n_tokens,
                            pass->weights.llm.hidden, err);
}

/* From the tokens to the result of the last block, keeping x of each layer from the lowest on. */
static int forward(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    uint32_t n = pass->weights.llm.n_layers;
    int rc = open_store(pass, &pass->x[job->lowest], err);
    if (!rc)
        rc = perta_embed(&pass->head, &pass->x[job->lowest], err);
    for (uint32_t l = 0; l < n && !rc; l++) {
        struct perta_store *from = &pass->x[l < job->lowest ? job->lowest : l];
        struct perta_store *to = &pass->x[l < job->lowest ? job->lowest : l + 1];
        rc = to == from ? 0 : open_store(pass, to, err);
        if (!rc)
            rc = perta_estimate_forward(pass, l, from, to, err);
    }
    return rc;
}

/* The mean loss over all labels of the update. */
static int loss_of(const struct perta_estimate_job *pass, double *mean, struct perta_err *err)
{
    double sum = 0, n = 0, loss;
    int rc = 0;
    for (uint64_t i = 0; i < pass->samples.n && !rc; i++) {
        rc = perta_estimate_loss(pass, i, &loss, err);
        sum += loss * pass->samples.n_labels[i];
        n += pass->samples.n_labels[i];
    }
    *mean = sum / n;
    return rc;
}

/* ---- backward ---- */

static int backward_layer(struct perta_tune_job *job, uint32_t number,
                          struct perta_gradient_sink *sink, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    uint32_t before = number > job->lowest ? number - 1 : UINT32_MAX;
    struct perta_layer layer = perta_estimate_layer(pass, number, before, sink);
    struct perta_store next;
    int rc = open_store(pass, &next, err);
    if (!rc)
        rc = perta_estimate_backward(pass, &layer, &next, err);
    perta_store_close(&pass->dx, &pass->scratch);
    pass->dx = next;
    perta_store_close(&pass->x[number], &pass->scratch);
    return rc;
}

static int backward(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    struct sink sink = {{on_linear, NULL, NULL, NULL}, job};
    uint32_t n = pass->weights.llm.n_layers;
    const struct perta_span last = {.site = perta_site_of(n - 1)};
    int rc = open_store(pass, &pass->dx, err);
    if (!rc)
        rc = perta_head_backward(&pass->head, &pass->x[n], &last, &pass->dx, err);
    perta_store_close(&pass->x[n], &pass->scratch);
    for (uint32_t l = n; l-- > job->lowest && !rc;)
        rc = backward_layer(job, l, &sink.sink, err);
    return rc;
}

/* Leave the stores and the head as they were before the update. */
static void clear(struct perta_estimate_job *pass)
{
    for (uint32_t l = 0; l <= pass->weights.llm.n_layers; l++)
        perta_store_close(&pass->x[l], &pass->scratch);
    perta_store_close(&pass->dx, &pass->scratch);
    perta_head_close(&pass->head, &pass->scratch);
    pass->head = (struct perta_head){0};
}

static int run_pass(struct perta_tune_job *job, double *loss, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    struct perta_head_means means;
    pass->be->ops->zero(pass->be, job->gradients, pass->factors.n_floats);
    int rc = perta_estimate_open_head(pass, NULL, err);
    if (rc)
        return rc;
    const struct perta_span first = perta_head_first(&pass->head);
    rc = forward(job, err);
    if (!rc)
        rc = perta_head_forward(&pass->head, &pass->x[pass->weights.llm.n_layers], &first, &means,
                                err);
    if (!rc)
        rc = loss_of(pass, loss, err);
    return rc ? rc : backward(job, err);
}

/* ---- the step ---- */

#define PIECE_FLOATS 16384

/* The norm of all gradients, summed in order in float64. */
static int norm_of(struct perta_tune_job *job, double *norm, struct perta_err *err)
{
    struct perta_backend *be = job->pass.be;
    uint64_t n = job->pass.factors.n_floats;
    float some[PIECE_FLOATS];
    double sum = 0;
    int rc = 0;
    for (uint64_t at = 0; at < n && !rc; at += PIECE_FLOATS) {
        uint64_t here = n - at < PIECE_FLOATS ? n - at : PIECE_FLOATS;
        be->ops->get(be, perta_array_at(job->gradients, at), some, here * sizeof *some);
        rc = perta_backend_wait(be, err);
        for (uint64_t i = 0; i < here && !rc; i++)
            sum += (double)some[i] * (double)some[i];
    }
    *norm = sqrt(sum);
    return rc;
}

static int scale_gradients(struct perta_tune_job *job, float by, struct perta_err *err)
{
    struct perta_backend *be = job->pass.be;
    uint64_t n = job->pass.factors.n_floats;
    float some[PIECE_FLOATS];
    int rc = 0;
    for (uint64_t at = 0; at < n && !rc; at += PIECE_FLOATS) {
        uint64_t here = n - at < PIECE_FLOATS ? n - at : PIECE_FLOATS;
        struct perta_array there = perta_array_at(job->gradients, at);
        be->ops->get(be, there, some, here * sizeof *some);
        rc = perta_backend_wait(be, err);
        for (uint64_t i = 0; i < here; i++)
            some[i] *= by;
        be->ops->put(be, there, some, here * sizeof *some);
    }
    return rc;
}

/* Clip as torch.nn.utils.clip_grad_norm_ does. */
static int clip(struct perta_tune_job *job, double norm, struct perta_err *err)
{
    double most = job->tune.max_grad_norm, by = most / (norm + 1e-6);
    return most > 0 && by < 1 ? scale_gradients(job, (float)by, err) : 0;
}

/* As get_scheduler of transformers. */
static double rate_of(const struct perta_tune_job *job, uint64_t update)
{
    const struct perta_tune *t = &job->tune;
    double n = (double)job->n_updates, u = (double)update;
    double warmup = t->warmup >= 1 ? t->warmup : ceil(n * t->warmup);
    double left = fmax(1, n - warmup);
    if (u < warmup)
        return t->learning_rate * (u / warmup);
    return t->learning_rate * (t->scheduler == PERTA_LR_LINEAR ? fmax(0, (n - u) / left)
                               : t->scheduler == PERTA_LR_COSINE
                                   ? fmax(0, 0.5 * (1 + cos(acos(-1) * (u - warmup) / left)))
                                   : 1);
}

static int step(struct perta_tune_job *job, struct perta_tune_update *update, struct perta_err *err)
{
    struct perta_backend *be = job->pass.be;
    const struct perta_factors *f = &job->pass.factors;
    int rc = norm_of(job, &update->gradient_norm, err);
    if (!rc && !isfinite(update->gradient_norm))
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: update %llu: the gradient is not finite; is the learning rate (%g) "
                        "too large?",
                        job->tune.data, (unsigned long long)job->n_done + 1,
                        job->tune.learning_rate);
    if (!rc)
        rc = clip(job, update->gradient_norm, err);
    update->learning_rate = rate_of(job, job->n_done);
    if (rc)
        return rc;
    be->ops->adamw(be, f->values, job->first, job->second, job->gradients, f->n_floats,
                   (float)update->learning_rate, (float)job->tune.weight_decay, job->n_done + 1);
    return perta_backend_wait(be, err);
}

int perta_tune_update(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_tune_update *update = &job->updates[job->n_done];
    int rc = perta_tune_take(job, job->n_done, err);
    if (!rc)
        rc = run_pass(job, &update->loss, err);
    struct perta_err ignored = {0};
    if (rc) /* operations may still read what is freed below */
        perta_backend_wait(job->pass.be, &ignored);
    clear(&job->pass);
    if (!rc)
        rc = step(job, update, err);
    job->n_done += !rc;
    return rc;
}
