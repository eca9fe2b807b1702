#include "estimators/passes/experts.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/estimate_job.h"

/* ---- memory ---- */

static bool has_mixture(const struct perta_llm *llm)
{
    return llm->any_layer & PERTA_LAYER_MIXTURE;
}

uint64_t perta_experts_bytes(const struct perta_llm *llm, const struct perta_samples *samples)
{
    uint64_t entries = samples->n_tokens * llm->router.k;
    uint64_t chunks = samples->n + samples->n_tokens / PERTA_CHUNK_ROWS + 1;
    if (!has_mixture(llm))
        return 0;
    return entries * (3 * sizeof(uint32_t) + 3 * sizeof(float)) +
           (uint64_t)llm->n_experts * (2 * sizeof(float) + sizeof(size_t)) +
           (samples->n + 1) * 5 * sizeof(size_t) +
           (samples->n_tokens / PERTA_TILE_ROWS + samples->n + 2) * sizeof(size_t) +
           chunks * sizeof(struct perta_chunk);
}

uint64_t perta_experts_batch_bytes(const struct perta_llm *llm, size_t tokens)
{
    return has_mixture(llm) ? (uint64_t)tokens * llm->n_experts * sizeof(float) : 0;
}

int perta_experts_open(struct perta_experts *experts, const struct perta_llm *llm,
                       const struct perta_samples *samples, size_t batch_tokens,
                       struct perta_err *err)
{
    size_t entries = samples->n_tokens * llm->router.k, n = llm->n_experts;
    *experts = (struct perta_experts){0};
    if (!has_mixture(llm))
        return 0;
    if (entries > UINT32_MAX)
        return perta_fail(err, PERTA_EINPUT,
                          "%llu tokens, each of which goes to %u experts: at most %u in all",
                          (unsigned long long)samples->n_tokens, llm->router.k, UINT32_MAX);
    *experts = (struct perta_experts){
        .which = calloc(entries, sizeof *experts->which),
        .weights = calloc(entries, sizeof *experts->weights),
        .dweights = calloc(entries, sizeof *experts->dweights),
        .logits = calloc(batch_tokens * n, sizeof *experts->logits),
        .correction = calloc(n, sizeof *experts->correction),
        .dlogits = calloc(n, sizeof *experts->dlogits),
        .starts = calloc(n + 1, sizeof *experts->starts),
        .token = calloc(entries, sizeof *experts->token),
        .slot = calloc(entries, sizeof *experts->slot),
        .by = calloc(entries, sizeof *experts->by),
        .samples = calloc(samples->n + 1, sizeof *experts->samples),
    };
    return experts->which && experts->weights && experts->dweights && experts->logits &&
                   experts->correction && experts->dlogits && experts->starts && experts->token &&
                   experts->slot && experts->by && experts->samples
               ? 0
               : perta_fail_sys(err, ENOMEM, "experts of %zu tokens", (size_t)samples->n_tokens);
}

void perta_experts_close(struct perta_experts *experts)
{
    free(experts->which);
    free(experts->weights);
    free(experts->dweights);
    free(experts->logits);
    free(experts->correction);
    free(experts->dlogits);
    free(experts->starts);
    free(experts->token);
    free(experts->slot);
    free(experts->by);
    free(experts->samples);
    *experts = (struct perta_experts){0};
}

/* ---- the router ---- */

/* Get the correction of the layer's scores, if there is one. */
static int take_correction(struct perta_estimate_job *job, const struct perta_layer *l,
                           struct perta_err *err)
{
    struct perta_array correction = perta_layer_vector(l, PERTA_ROUTER_CORRECTION);
    if (perta_array_is(correction))
        l->be->ops->get(l->be, correction, job->experts.correction,
                        l->llm->n_experts * sizeof *job->experts.correction);
    return perta_backend_wait(l->be, err);
}

static const float *correction_of(const struct perta_estimate_job *job, const struct perta_layer *l)
{
    bool is = perta_llm_param(l->llm, l->site.layer, PERTA_ROUTER_CORRECTION);
    return is ? job->experts.correction : NULL;
}

/* Get the logits of a batch to the host. */
static int take_logits(struct perta_estimate_job *job, const struct perta_layer *l,
                       const struct perta_batch *batch, const struct perta_acts *acts,
                       struct perta_err *err)
{
    perta_router_forward(l, batch, acts);
    l->be->ops->get(l->be, acts->router, job->experts.logits,
                    batch->n * l->llm->n_experts * sizeof *job->experts.logits);
    return perta_backend_wait(l->be, err);
}

/* The line of the data that a token is in. */
static uint64_t line_of(const struct perta_estimate_job *job, size_t token)
{
    uint64_t sample = 0;
    while (job->samples.starts[sample + 1] <= token)
        sample++;
    return job->samples.lines[sample];
}

/* Choose the experts of a batch's tokens. */
static int route(struct perta_estimate_job *job, const struct perta_layer *l,
                 const struct perta_batch *batch, const struct perta_acts *acts,
                 struct perta_err *err)
{
    struct perta_experts *x = &job->experts;
    const struct perta_router *router = &l->llm->router;
    int rc = take_logits(job, l, batch, acts, err);
    for (size_t t = 0; t < batch->n && !rc; t++) {
        size_t at = (batch->first + t) * router->k;
        rc = perta_route_forward(router, x->logits + t * router->n_experts, correction_of(job, l),
                                 x->which + at, x->weights + at);
        if (rc)
            rc = perta_fail(err, rc,
                            "%s: line %llu: the router of layer %u gives a number that is not "
                            "finite; are there NaN or Inf in %s?",
                            job->estimate->data, (unsigned long long)line_of(job, batch->first + t),
                            l->site.layer, job->estimate->model);
    }
    return rc;
}

/* The gradients of a batch's logits, in acts->router. */
static int route_backward(struct perta_estimate_job *job, const struct perta_layer *l,
                          const struct perta_batch *batch, const struct perta_acts *acts,
                          struct perta_err *err)
{
    struct perta_experts *x = &job->experts;
    const struct perta_router *router = &l->llm->router;
    size_t n = router->n_experts;
    int rc = take_logits(job, l, batch, acts, err);
    for (size_t t = 0; t < batch->n && !rc; t++) {
        size_t at = (batch->first + t) * router->k;
        perta_route_backward(router, x->logits + t * n, x->which + at, x->weights + at,
                             x->dweights + at, x->dlogits);
        memcpy(x->logits + t * n, x->dlogits, n * sizeof *x->dlogits);
    }
    if (!rc)
        l->be->ops->put(l->be, acts->router, x->logits, batch->n * n * sizeof *x->logits);
    return rc;
}

/* Sort the tokens' choices by expert. */
static void sort(struct perta_experts *x, const struct perta_router *router, size_t n_tokens)
{
    size_t entries = n_tokens * router->k;
    memset(x->starts, 0, (router->n_experts + 1) * sizeof *x->starts);
    for (size_t i = 0; i < entries; i++)
        x->starts[x->which[i] + 1]++;
    for (uint32_t e = 0; e < router->n_experts; e++)
        x->starts[e + 1] += x->starts[e];
    for (size_t i = 0; i < entries; i++) {
        size_t at = x->starts[x->which[i]]++;
        x->token[at] = (uint32_t)(i / router->k);
        x->slot[at] = (uint32_t)i;
        x->by[at] = x->weights[i];
    }
    for (uint32_t e = router->n_experts; e-- > 0;)
        x->starts[e + 1] = x->starts[e];
    x->starts[0] = 0;
}

/* ---- one expert after another ---- */

/* What is done for a batch of an expert's rows. */
struct work {
    struct perta_estimate_job *job;
    struct perta_layer layer;     /* with the expert's site */
    struct perta_store *x, *y;    /* (tokens, H): the mixture's input; its sum */
    const struct perta_store *dy; /* gradient of the sum */
    struct perta_store *dx;       /* gradient of the input */
    size_t first;                 /* the expert's first entry */
    int (*batch)(const struct work *work, const struct perta_batch *batch,
                 const struct perta_expert_acts *acts, struct perta_err *err);
};

/* starts: rows of each sample among the entries of an expert. */
static void count_samples(const struct perta_estimate_job *job, size_t first, size_t end)
{
    const struct perta_experts *x = &job->experts;
    size_t at = first;
    for (uint64_t i = 0; i < job->samples.n; i++) {
        x->samples[i] = at - first;
        while (at < end && x->token[at] < job->samples.starts[i + 1])
            at++;
    }
    x->samples[job->samples.n] = end - first;
}

static int run_batches(const struct work *work, const struct perta_cut *cut, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    struct perta_expert_acts acts;
    int rc = 0;
    for (size_t group = 0; group < cut->n_groups && !rc;) {
        struct perta_cut_batch of = perta_cut_batch(cut, group, job->batch_tokens);
        const struct perta_batch batch = {
            .n = of.n,
            .sequences = {of.n_samples, job->experts.samples + of.first_sample, of.first_row},
            .tiles = of.tiles,
            .first = of.first_row,
        };
        group = of.end;
        if (!of.n)
            continue;
        perta_expert_lay_out(&acts, &job->weights.llm, of.n, job->work);
        rc = work->batch(work, &batch, &acts, err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
        if (!rc)
            rc = perta_estimate_advance(job, err);
    }
    return rc;
}

/* Groups of an expert's rows: their size depends on the samples alone. */
static int cut_rows(const struct perta_estimate_job *job, struct perta_cut *cut,
                    struct perta_err *err)
{
    size_t longest = job->cut.longest < PERTA_TILE_ROWS ? job->cut.longest : PERTA_TILE_ROWS;
    return perta_cut_make(job->experts.samples, job->samples.n, longest, cut, err);
}

/* The batches of an expert, with its gradients if there is a sink for them. */
static int run_expert(struct work *work, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    struct perta_gradient_sink *sink = work->layer.sink;
    size_t n = job->experts.samples[job->samples.n];
    const size_t all[] = {0, n};
    struct perta_cut cut = {0};
    struct perta_chunks chunks = {0};
    const struct perta_sink_rows rows = {&chunks, n, n <= job->batch_tokens};
    bool tells = sink && sink->begin_expert;
    int rc = cut_rows(job, &cut, err);
    if (!rc && tells)
        rc = job->chunks.by_sample
                 ? perta_chunks_make(job->experts.samples, job->samples.n, true, &chunks, err)
                 : perta_chunks_make(all, 1, false, &chunks, err);
    if (!rc && tells)
        rc = sink->begin_expert(sink, &rows, err);
    if (!rc)
        rc = run_batches(work, &cut, err);
    if (!rc && tells)
        rc = sink->end_expert(sink, work->layer.site, err);
    perta_cut_release(&cut);
    perta_chunks_release(&chunks);
    return rc;
}

/* The first expert from e on that a token reaches; n_experts: none. */
static uint32_t next_reached(const struct perta_estimate_job *job, uint32_t e)
{
    const size_t *starts = job->experts.starts;
    while (e < job->weights.llm.n_experts && starts[e] == starts[e + 1])
        e++;
    return e;
}

static int run_experts(struct work *work, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    uint32_t layer = work->layer.site.layer, n = job->weights.llm.n_experts;
    int rc = 0;
    for (uint32_t e = next_reached(job, 0), next; e < n && !rc; e = next) {
        next = next_reached(job, e + 1);
        const struct perta_span span = {.site = perta_site_of_expert(layer, e)};
        const struct perta_span ahead = {.site = perta_site_of_expert(layer, next)};
        perta_weights_begin(&job->weights, &span, next < n ? &ahead : NULL);
        work->layer.site = span.site;
        work->first = job->experts.starts[e];
        count_samples(job, work->first, job->experts.starts[e + 1]);
        rc = run_expert(work, err);
    }
    work->layer.site = perta_site_of(layer);
    return rc;
}

/* ---- forward ---- */

static int open_rows(struct perta_estimate_job *job, struct perta_store *store,
                     struct perta_err *err)
{
    return perta_store_open(store, &job->scratch, NULL, job->samples.n_tokens,
                            job->weights.llm.hidden, err);
}

static int expert_forward(const struct work *work, const struct perta_batch *batch,
                          const struct perta_expert_acts *acts, struct perta_err *err)
{
    const struct perta_experts *x = &work->job->experts;
    size_t at = work->first + batch->first;
    bool scaled = work->layer.llm->router.scales_input;
    int rc = perta_store_gather(work->x, x->token + at, batch->n, acts->mlp.x, err);
    if (rc)
        return rc;
    perta_expert_forward(&work->layer, batch, acts, x->by + at);
    return perta_store_scatter_add(work->y, x->token + at, scaled ? NULL : x->by + at, batch->n,
                                   acts->y, acts->weighted, err);
}

/* Attention, the router and the shared expert of all tokens: to = mid, work->x, work->y. */
static int attend(struct work *work, const struct perta_store *from, struct perta_store *to,
                  struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    const struct perta_layer *l = &work->layer;
    struct perta_acts acts;
    int rc = take_correction(job, l, err);
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        perta_acts_lay_out(&acts, l->llm, batch.n, job->work);
        rc = perta_store_load(from, batch.first, batch.n, acts.x, err);
        if (!rc)
            perta_block_attend(l, &batch, &acts);
        if (!rc && job->cache && !job->adds && !l->again)
            rc = perta_cache_keep(job->cache, l->site.layer, &batch, &acts, err);
        if (!rc)
            rc = route(job, l, &batch, &acts, err);
        if (!rc)
            rc = perta_store_set(work->x, batch.first, batch.n, acts.n2, err);
        if (!rc && to)
            rc = perta_store_set(to, batch.first, batch.n, acts.mid, err);
        if (!rc && work->y) {
            perta_shared_forward(l, &batch, &acts);
            rc = perta_store_set(work->y, batch.first, batch.n, acts.branch_2, err);
        }
        if (!rc)
            rc = perta_backend_wait(job->be, err);
        if (!rc)
            rc = perta_estimate_advance(job, err);
    }
    if (!rc)
        sort(&job->experts, &l->llm->router, job->samples.n_tokens);
    return rc;
}

/* to = mid (which is there) + y. */
static int add_sums(struct work *work, struct perta_store *to, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    struct perta_acts acts;
    int rc = 0;
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        perta_acts_lay_out(&acts, work->layer.llm, batch.n, job->work);
        rc = perta_store_load(to, batch.first, batch.n, acts.mid, err);
        if (!rc)
            rc = perta_store_load(work->y, batch.first, batch.n, acts.branch_2, err);
        if (!rc)
            perta_block_add(&work->layer, &batch, &acts);
        if (!rc)
            rc = perta_store_set(to, batch.first, batch.n, acts.out, err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
    }
    return rc;
}

int perta_experts_forward(struct perta_estimate_job *job, const struct perta_layer *layer,
                          const struct perta_store *from, struct perta_store *to,
                          struct perta_err *err)
{
    struct perta_store x = {.fd = -1}, y = {.fd = -1};
    struct work work = {.job = job, .layer = *layer, .x = &x, .y = &y, .batch = expert_forward};
    int rc = open_rows(job, &x, err);
    if (!rc)
        rc = open_rows(job, &y, err);
    if (!rc)
        rc = attend(&work, from, to, err);
    if (!rc)
        rc = run_experts(&work, err);
    if (!rc)
        rc = add_sums(&work, to, err);
    perta_store_close(&x, &job->scratch);
    perta_store_close(&y, &job->scratch);
    return rc;
}

/* ---- backward ---- */

static int expert_backward(const struct work *work, const struct perta_batch *batch,
                           const struct perta_expert_acts *acts, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    struct perta_experts *x = &job->experts;
    size_t at = work->first + batch->first;
    float *dweights = x->logits; /* not in use: n_experts floats for each token of a batch */
    int rc = perta_store_gather(work->x, x->token + at, batch->n, acts->mlp.x, err);
    if (!rc)
        rc = perta_store_gather(work->dy, x->token + at, batch->n, acts->dy, err);
    if (rc)
        return rc;
    perta_expert_backward(&work->layer, batch, acts, x->by + at);
    job->be->ops->get(job->be, acts->dweights, dweights, batch->n * sizeof *dweights);
    rc = perta_backend_wait(job->be, err);
    for (size_t i = 0; i < batch->n && !rc; i++)
        x->dweights[x->slot[at + i]] = dweights[i];
    return rc ? rc
              : perta_store_scatter_add(work->dx, x->token + at, NULL, batch->n, acts->mlp.dx,
                                        acts->weighted, err);
}

/* The gradient of the mixture's sum, in *dy, from job->dx; work->y is the sum, if a norm follows. */
static int branch_backward(struct work *work, struct perta_store *dy, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    const struct perta_layer *l = &work->layer;
    struct perta_acts acts;
    int rc = open_rows(job, dy, err);
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        perta_acts_lay_out(&acts, l->llm, batch.n, job->work);
        rc = perta_store_load(&job->dx, batch.first, batch.n, acts.dout, err);
        if (!rc && work->y) {
            rc = perta_store_load(work->y, batch.first, batch.n, acts.branch_2, err);
            job->be->ops->zero(job->be, acts.mid, batch.n * l->llm->hidden);
            perta_block_add(l, &batch, &acts); /* for what the norm keeps */
        }
        if (!rc)
            rc = perta_store_set(dy, batch.first, batch.n,
                                 perta_block_branch_backward(l, &batch, &acts), err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
    }
    return rc;
}

/* From the gradients of the mixture's input and weights to next. */
static int attend_backward(struct work *work, struct perta_store *next, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    const struct perta_layer *l = &work->layer;
    struct perta_acts acts;
    int rc = 0;
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        perta_acts_lay_out(&acts, l->llm, batch.n, job->work);
        rc = perta_store_load(&job->x[l->site.layer], batch.first, batch.n, acts.x, err);
        if (!rc)
            perta_block_attend(l, &batch, &acts);
        if (!rc)
            rc = perta_store_load(&job->dx, batch.first, batch.n, acts.dout, err);
        if (!rc)
            rc = perta_store_load(work->dx, batch.first, batch.n, acts.dn, err);
        bool detached = work->dy != &job->dx;
        if (!rc && detached)
            rc = perta_store_load(work->dy, batch.first, batch.n, acts.dbranch, err);
        if (!rc)
            perta_shared_backward(l, &batch, &acts, detached ? acts.dbranch : acts.dout);
        if (!rc)
            rc = route_backward(job, l, &batch, &acts, err);
        if (rc)
            break;
        perta_router_backward(l, &batch, &acts);
        perta_block_attend_backward(l, &batch, &acts);
        rc = perta_store_set(next, batch.first, batch.n, acts.dx, err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
        if (!rc)
            rc = perta_estimate_advance(job, err);
    }
    return rc;
}

/* Whether more is done to the mixture's sum before it is added; a norm among it needs the sum. */
static bool is_detached(const struct perta_layer *l, bool *normed)
{
    *normed = perta_layer_has_norm(l, PERTA_NORM_2_AFTER);
    return *normed || l->llm->residual_multiplier != 1;
}

static int run_backward(struct work *work, struct perta_store *next, struct perta_err *err)
{
    struct perta_estimate_job *job = work->job;
    struct perta_gradient_sink *sink = work->layer.sink;
    struct perta_store dy = {.fd = -1};
    bool normed, detached = is_detached(&work->layer, &normed);
    work->y = normed ? work->y : NULL;
    int rc = attend(work, &job->x[work->layer.site.layer], NULL, err);
    if (!rc && normed) {
        work->batch = expert_forward;
        work->layer.sink = NULL;
        rc = run_experts(work, err);
        work->layer.sink = sink;
    }
    if (!rc && detached)
        rc = branch_backward(work, &dy, err);
    work->dy = detached ? &dy : &job->dx;
    work->batch = expert_backward;
    if (!rc)
        rc = run_experts(work, err);
    if (!rc)
        rc = attend_backward(work, next, err);
    work->dy = NULL;
    perta_store_close(&dy, &job->scratch);
    return rc;
}

int perta_experts_backward(struct perta_estimate_job *job, const struct perta_layer *layer,
                           struct perta_store *next, struct perta_err *err)
{
    struct perta_store x = {.fd = -1}, y = {.fd = -1}, dx = {.fd = -1};
    struct work work = {.job = job, .layer = *layer, .x = &x, .y = &y, .dx = &dx};
    work.layer.again = true;
    int rc = open_rows(job, &x, err);
    if (!rc)
        rc = open_rows(job, &dx, err);
    if (!rc && perta_layer_has_norm(layer, PERTA_NORM_2_AFTER))
        rc = open_rows(job, &y, err);
    if (!rc)
        rc = run_backward(&work, next, err);
    perta_store_close(&x, &job->scratch);
    perta_store_close(&y, &job->scratch);
    perta_store_close(&dx, &job->scratch);
    return rc;
}
