/* Before the first update: the adapter, the order of samples, memory. Spec: docs/tune.md */
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/kernels.h"
#include "estimators/passes/pick.h"
#include "estimators/passes/tune_job.h"

/* Bytes of the heap for an update's numbers: here, in a record of the journal and in the
 * summary. */
#define UPDATE_BYTES (sizeof(struct perta_tune_update) + 1024)

/* ---- a new adapter ---- */

/* Is name, after the last dot or from the start, that of the module? */
static bool is_name_of(const char *name, const char *module, size_t len)
{
    size_t n = strlen(name);
    return n <= len && !memcmp(module + len - n, name, n) &&
           (n == len || module[len - n - 1] == '.');
}

bool perta_tune_is_target(const struct perta_tune *t, const char *module, size_t len)
{
    for (size_t i = 0; i < t->n_targets; i++)
        if (!strcmp(t->targets[i], "all-linear") || is_name_of(t->targets[i], module, len))
            return true;
    return false;
}

static const char *last_part(const char *name)
{
    const char *weight = strrchr(name, '.'), *at = weight;
    while (at && at > name && at[-1] != '.')
        at--;
    return at ? at : name;
}

/* Whether experts have tensors whose names end alike, as mlp.gate_proj and mlp.experts.0.gate_proj.
 * PEFT takes such a name in an adapter for that of the experts alone, which are one tensor in
 * transformers 5, and passes over what is trained beside the others. */
static bool is_taken_for_expert(const struct perta_llm *llm, const struct perta_param_row *row)
{
    for (size_t i = 0; i < llm->family->n_params; i++) {
        const struct perta_param_row *other = &llm->family->params[i];
        if (perta_is_of_expert(other->param) && strstr(other->name, "%u") &&
            !strcmp(last_part(other->name), last_part(row->name)))
            return true;
    }
    return false;
}

/* The name of a layer's linear module, which is that of its matrix without ".weight"; returns its
 * length, or 0 if there is none: for a vector, an expert (in transformers all are parameters of one
 * module, which is not linear), what PEFT takes for one, and for a router, which mostly is not
 * linear there, either. */
static size_t module_of(const struct perta_llm *llm, uint32_t layer, int param,
                        char name[PERTA_NAME_BYTES])
{
    const struct perta_param_row *row = perta_llm_param(llm, layer, (enum perta_param)param);
    size_t out, in;
    if (!row || perta_is_of_expert(row->param) || row->param == PERTA_ROUTER ||
        is_taken_for_expert(llm, row))
        return 0;
    perta_llm_shape(llm, row, &out, &in);
    perta_llm_name(llm, perta_site_of(layer), row, name);
    return out ? strlen(name) - strlen(".weight") : 0;
}

/* Whether a list of names, separated by ", ", has this one. */
static bool is_listed(const char *list, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = list; (at = strstr(at, name)); at += n)
        if ((at == list || at[-1] == ' ') && (!at[n] || at[n] == ','))
            return true;
    return false;
}

/* Every name that was given must fit a module: PEFT would pass over a misspelt one. */
static int check_target(const struct perta_tune_job *job, const char *target, struct perta_err *err)
{
    const struct perta_llm *llm = &job->pass.weights.llm;
    const struct perta_tune one = {.targets = &target, .n_targets = 1};
    char name[PERTA_NAME_BYTES], all[256] = "";
    for (uint32_t l = 0; l < llm->n_layers; l++)
        for (int p = 0; p < PERTA_N_PARAMS; p++) {
            size_t len = module_of(llm, l, p, name), n = strlen(all);
            if (!len)
                continue;
            if (perta_tune_is_target(&one, name, len))
                return 0;
            name[len] = '\0';
            if (!is_listed(all, strrchr(name, '.') + 1))
                snprintf(all + n, sizeof all - n, "%s%s", n ? ", " : "", strrchr(name, '.') + 1);
        }
    return perta_fail(err, PERTA_EUSAGE,
                      "--target-modules: %s: the layers of %s have no such linear module, but %s",
                      target, job->tune.model, all);
}

static int new_factors(struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_tune *t = &job->tune;
    const struct perta_llm *llm = &job->pass.weights.llm;
    float scaling = (float)(t->lora_alpha / (double)t->rank);
    char name[PERTA_NAME_BYTES];
    int rc = 0;
    for (size_t i = 0; i < t->n_targets && !rc; i++)
        rc = check_target(job, t->targets[i], err);
    if (!rc)
        rc = perta_factors_open(&job->pass.factors, llm, err);
    for (uint32_t l = 0; l < llm->n_layers && !rc; l++)
        for (int p = 0; p < PERTA_N_PARAMS; p++) {
            size_t len = module_of(llm, l, p, name);
            if (len && perta_tune_is_target(t, name, len))
                perta_factors_add(&job->pass.factors, perta_site_of(l),
                                  perta_llm_param(llm, l, (enum perta_param)p), t->rank, scaling);
        }
    return rc;
}

#define ROW_FLOATS 4096

/* A: uniform in [-1, 1) / sqrt(in), which is kaiming_uniform with a = sqrt(5), PEFT's way. *next is
 * the number of the next random number. B is zero. */
static void put_initial(struct perta_tune_job *job, const struct perta_factor *f, uint64_t *next)
{
    struct perta_backend *be = job->pass.be;
    struct perta_low_rank lora = perta_factor_in(f, job->pass.factors.values);
    uint64_t state = perta_random_bits(job->tune.seed, 0); /* pick.h has the others */
    float bound = (float)(1 / sqrt((double)f->in)), some[ROW_FLOATS];
    for (uint64_t at = 0, n; at < f->r * f->in; at += n) {
        n = f->r * f->in - at < ROW_FLOATS ? f->r * f->in - at : ROW_FLOATS;
        for (uint64_t i = 0; i < n; i++)
            some[i] = (2 * perta_random_weight(state, (*next)++) - 1) * bound;
        be->ops->put(be, perta_array_at(lora.a, at), some, n * sizeof *some);
    }
}

/* ---- updates ---- */

/* An adapter that is trained further has LoRAs of linear modules alone. */
static int check_continued(const struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_factors *factors = &job->pass.factors;
    for (size_t i = 0; i < factors->n; i++)
        if (factors->of[i].site.expert)
            return perta_fail(err, PERTA_EINPUT,
                              "--adapter %s: has LoRAs of a mixture's experts, which are not "
                              "trained; LoRAs of linear modules are",
                              job->tune.adapter);
    return 0;
}

int perta_tune_count(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_tune *t = &job->tune;
    int rc = t->adapter ? check_continued(job, err) : new_factors(job, err);
    if (rc)
        return rc;
    job->lowest = job->pass.factors.of[0].site.layer;
    job->all = job->pass.samples;
    job->pass.samples = (struct perta_samples){0};
    assert(job->all.n && t->batch_size); /* perta_samples_read refuses a file without samples */
    t->batch_size = t->batch_size < job->all.n ? t->batch_size : job->all.n;
    job->per_epoch = (job->all.n + t->batch_size - 1) / t->batch_size;
    job->n_updates = t->steps ? t->steps : t->epochs * job->per_epoch;
    return job->n_updates <= UINT32_MAX && job->all.n <= UINT32_MAX
               ? 0
               : perta_fail(err, PERTA_EUSAGE, "%llu updates of %llu samples are too many",
                            (unsigned long long)job->n_updates, (unsigned long long)job->all.n);
}

/* Make the samples which (n) those of the pass. */
static int take(struct perta_tune_job *job, const uint32_t *which, uint64_t n,
                struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    pass->samples.n = pass->samples.n_tokens = pass->samples.longest = 0;
    for (uint64_t i = 0; i < n; i++)
        perta_samples_append(&pass->samples, &job->all, which[i]);
    free(pass->starts);
    perta_cut_release(&pass->cut);
    perta_chunks_release(&pass->chunks);
    return perta_estimate_tokens(pass, err);
}

int perta_tune_take(struct perta_tune_job *job, uint64_t n, struct perta_err *err)
{
    uint64_t epoch = n / job->per_epoch, size = job->tune.batch_size;
    uint64_t first = n % job->per_epoch * size;
    if (job->ordered != epoch + 1)
        perta_samples_shuffle(job->order, job->all.n, job->tune.seed, epoch);
    job->ordered = epoch + 1;
    return take(job, job->order + first, job->all.n - first < size ? job->all.n - first : size,
                err);
}

/* ---- memory ---- */

static uint64_t length_of(const struct perta_samples *s, uint32_t i)
{
    return s->starts[i + 1] - s->starts[i];
}

static int by_length(const void *a, const void *b, void *samples)
{
    uint64_t x = length_of(samples, *(const uint32_t *)a),
             y = length_of(samples, *(const uint32_t *)b);
    return (x < y) - (x > y);
}

/* Take the heap for the samples (n) of an update; *which, the caller's, are the longest first. */
static int take_heap(struct perta_tune_job *job, uint64_t n, uint32_t **which,
                     struct perta_err *err)
{
    struct perta_samples *s = &job->pass.samples;
    uint64_t most = 0;
    assert(n && n <= job->all.n && n <= UINT32_MAX);
    *which = calloc(job->all.n, sizeof **which);
    for (uint32_t i = 0; *which && i < job->all.n; i++)
        (*which)[i] = i;
    if (*which)
        qsort_r(*which, job->all.n, sizeof **which, by_length, &job->all);
    for (uint64_t i = 0; *which && i < n; i++)
        most += length_of(&job->all, (*which)[i]);
    *s = (struct perta_samples){.starts = calloc(n + 1, sizeof *s->starts),
                                .ids = calloc(most, sizeof *s->ids),
                                .targets = calloc(most, sizeof *s->targets),
                                .places = calloc(most, sizeof *s->places),
                                .n_labels = calloc(n, sizeof *s->n_labels),
                                .lines = calloc(n, sizeof *s->lines),
                                .kinds = calloc(n, sizeof *s->kinds),
                                .room = most};
    job->order = calloc(job->all.n, sizeof *job->order);
    job->updates = calloc(job->n_updates, sizeof *job->updates);
    return *which && s->starts && s->ids && s->targets && s->places && s->n_labels && s->lines &&
                   s->kinds && job->order && job->updates
               ? 0
               : perta_fail_sys(err, ENOMEM, "updates");
}

/* Keep the activations of as many layers as there is memory for, besides what goes to stores: the
 * backward pass then needs no second forward pass of them. A layer with a mixture of experts has
 * one anyway (experts.h). */
static int keep(struct perta_estimate_job *pass, uint32_t lowest, struct perta_err *err)
{
    const struct perta_backend_ops *ops = pass->be->ops;
    const struct perta_llm *llm = &pass->weights.llm;
    size_t n = pass->samples.n_tokens;
    uint64_t row = ops->buffer_bytes(pass->be, n * llm->hidden * sizeof(float));
    /* x of each layer and the result of the last, dx twice, and the head's, in float64 too */
    uint64_t stores = row * (llm->n_layers - lowest + 1 + 2 + 1 + 2);
    uint64_t len_bytes = perta_acts_kept_floats(llm, n) * sizeof(float);
    uint64_t each = ops->buffer_bytes(pass->be, len_bytes);
    int rc = 0;
    pass->kept = calloc(llm->n_layers, sizeof *pass->kept);
    if (!pass->kept)
        return perta_fail_sys(err, ENOMEM, "activations");
    for (uint32_t l = llm->n_layers; l-- > lowest && !rc;) {
        if (pass->n_batches > 1 || pass->scratch.free_bytes < stores + each)
            break;
        if (perta_llm_has(llm, l, PERTA_LAYER_MIXTURE))
            continue;
        rc = ops->alloc(pass->be, len_bytes, &pass->kept[l], err);
        pass->scratch.free_bytes -= rc ? 0 : each;
    }
    return rc;
}

/* The memory is planned for the longest samples in one update: no other needs more. */
static int plan(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    uint64_t n = job->tune.batch_size;
    uint32_t *which;
    int rc = take_heap(job, n, &which, err);
    if (!rc)
        rc = take(job, which, n, err);
    free(which);
    if (rc)
        return rc;
    /* A group of shorter samples may have more tokens than one of these. */
    size_t group =
        pass->samples.n_tokens < PERTA_TILE_ROWS ? pass->samples.n_tokens : PERTA_TILE_ROWS;
    pass->cut.longest = pass->cut.longest > group ? pass->cut.longest : group;
    pass->n_factor_arrays = 4;
    pass->later_bytes = job->n_updates * UPDATE_BYTES;
    rc = perta_estimate_plan(pass, perta_estimate_bf16(pass), err);
    return rc ? rc : keep(pass, job->lowest, err);
}

int perta_tune_plan(struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_factors *f = &job->pass.factors;
    int rc = plan(job, err);
    uint64_t next = 0;
    job->first = perta_array_at(job->pass.factors_memory, f->n_floats);
    job->second = perta_array_at(job->first, f->n_floats);
    job->gradients = perta_array_at(job->second, f->n_floats);
    for (size_t i = 0; i < f->n && !rc && !job->tune.adapter; i++)
        put_initial(job, &f->of[i], &next);
    return rc;
}
