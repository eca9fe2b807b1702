#include "estimators/passes/estimate_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/cpu.h"
#include "estimators/compute/scalar.h"
#include "io/checked.h"

/* Memory that is not counted otherwise: oneDNN, compiled products, the thread that writes (16 MiB),
 * the heap. */
#define MARGIN_BYTES (32ull << 20)
/* Gradients of a weight are computed in blocks of about this many floats. */
#define BLOCK_FLOATS (2u << 20)
/* Tokens in a group of samples (cut.h). */
#define GROUP_TOKENS PERTA_TILE_ROWS

/* ---- tokens ---- */

int perta_estimate_tokens(struct perta_estimate_job *job, struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    const size_t all[] = {0, s->n_tokens};
    job->starts = calloc(s->n + 1, sizeof *job->starts);
    if (!job->starts)
        return perta_fail_sys(err, ENOMEM, "tokens");
    for (uint64_t i = 0; i <= s->n; i++)
        job->starts[i] = s->starts[i];
    int rc = perta_cut_make(job->starts, s->n, GROUP_TOKENS, &job->cut, err);
    if (rc)
        return rc;
    return job->estimate->meansq || job->norms
               ? perta_chunks_make(job->starts, s->n, true, &job->chunks, err)
               : perta_chunks_make(all, 1, false, &job->chunks, err);
}

static size_t count_batches(const struct perta_estimate_job *job)
{
    size_t n = 0;
    for (size_t group = 0; group < job->cut.n_groups; n++)
        group = perta_cut_batch(&job->cut, group, job->batch_tokens).end;
    return n;
}

/* ---- memory ---- */

static uint64_t most(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Depends on the model alone: it decides the tiles of a gradient, and so its bits. */
static size_t block_floats(const struct perta_llm *llm)
{
    size_t vocabulary = (size_t)PERTA_VOCABULARY_ROWS * llm->hidden;
    return most(most(BLOCK_FLOATS, vocabulary), perta_llm_widest(llm));
}

/* Bytes of a room for a span of weights. */
static uint64_t part_room(const struct perta_estimate_job *job)
{
    uint64_t block = perta_weights_layer_room(&job->weights);
    uint64_t rows = perta_weights_room((uint64_t)PERTA_VOCABULARY_ROWS * job->weights.llm.hidden *
                                       sizeof(float));
    return perta_align_up(most(block, rows), PERTA_BLOCK_BYTES);
}

static uint64_t source_room(const struct perta_estimate_job *job)
{
    return job->source ? job->source->room_bytes : 0;
}

static bool has_gradients(const struct perta_estimate_job *job)
{
    return job->estimate->mean || job->estimate->meansq || job->norms;
}

/* Floats of scratch for LoRA (perta_factors.room). */
static uint64_t room_floats(const struct perta_estimate_job *job, size_t tokens)
{
    return 2 * (uint64_t)tokens * job->factors.r_max;
}

static uint64_t factors_bytes(const struct perta_estimate_job *job)
{
    return job->n_factor_arrays * job->factors.n_floats * sizeof(float);
}

/* The same memory serves a batch's activations, the head, and staging. */
static uint64_t work_floats(const struct perta_estimate_job *job, size_t tokens)
{
    const struct perta_llm *llm = &job->weights.llm;
    uint64_t head = perta_head_work(llm, perta_head_rows(&job->samples, tokens));
    uint64_t staging = has_gradients(job) ? perta_importance_sink_staging(llm, block_floats(llm),
                                                                          job->samples.n_tokens)
                                          : 0;
    uint64_t acts = most(perta_acts_floats(llm, tokens), perta_expert_floats(llm, tokens));
    return most(most(acts + room_floats(job, tokens), head), staging);
}

/* Floats of x and dy together, over the longest chunk, for a layer's gradients or the
 * vocabulary's. */
static uint64_t gradient_floats(const struct perta_estimate_job *job)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t wide = perta_llm_widest(llm), block = block_floats(llm);
    size_t pair = (size_t)llm->hidden + most(PERTA_VOCABULARY_ROWS, wide);
    pair = most(pair, wide + perta_statistic_rows(block, wide, llm->hidden));
    size_t rows = least(PERTA_CHUNK_ROWS, perta_chunk_padded(job->samples.n_tokens));
    return has_gradients(job) ? (uint64_t)rows * pair : 0;
}

static struct perta_cpu_needs needs_of(const struct perta_estimate_job *job, size_t tokens,
                                       bool bf16)
{
    return (struct perta_cpu_needs){
        .bf16 = bf16,
        .widest = most(perta_llm_widest(&job->weights.llm), PERTA_VOCABULARY_ROWS),
        .rows = most(tokens, perta_head_rows(&job->samples, tokens)),
        .longest = most(job->samples.longest, job->cache ? job->cache->longest : 0),
        .gradient_floats = gradient_floats(job),
    };
}

/* The most tiles in a block of rows of a gradient. */
static size_t block_tiles(const struct perta_llm *llm)
{
    size_t n = perta_tiles(PERTA_VOCABULARY_ROWS, llm->hidden);
    for (int i = 0; i < PERTA_N_PARAMS; i++) {
        const struct perta_param_row *row =
            perta_llm_param(llm, PERTA_ANY_LAYER, (enum perta_param)i);
        size_t out = 0, in = 0;
        if (row)
            perta_llm_stored(llm, row, &out, &in);
        if (out)
            n = most(n, perta_tiles(perta_statistic_rows(block_floats(llm), out, in), in));
    }
    return n;
}

static uint64_t statistic_bytes(const struct perta_estimate_job *job)
{
    const struct perta_llm *llm = &job->weights.llm;
    return job->norms
               ? perta_statistic_norms_bytes(block_floats(llm), block_tiles(llm), job->samples.n,
                                             job->chunks.parts)
               : perta_statistic_bytes(block_floats(llm), job->estimate->meansq, job->chunks.parts);
}

/* Bytes of the backend's memory besides work: blocks of gradients, and a layer's vectors. */
static uint64_t gradient_bytes(const struct perta_estimate_job *job)
{
    return has_gradients(job)
               ? statistic_bytes(job) + perta_importance_sink_bytes(&job->weights.llm)
               : 0;
}

/* Bytes for means that are about to be written. */
static uint64_t means_bytes(const struct perta_estimate_job *job)
{
    return has_gradients(job) ? PERTA_MEANS * sizeof(float) : 0;
}

static uint64_t fixed_bytes(const struct perta_estimate_job *job, bool bf16)
{
    const struct perta_cpu_needs needs = needs_of(job, job->cut.longest, bf16);
    const struct perta_llm *llm = &job->weights.llm;
    uint64_t heap = job->source ? job->source->heap_bytes : 0;
    return part_room(job) + perta_weights_expert_room(&job->weights) + source_room(job) + heap +
           gradient_bytes(job) + means_bytes(job) + perta_head_bytes(&job->samples, job->measured) +
           perta_cpu_buffer_bytes(&needs,
                                  perta_head_device_bytes(&job->samples, llm, job->measured)) +
           (job->factors.n ? perta_cpu_buffer_bytes(&needs, factors_bytes(job)) : 0) +
           job->samples.n_tokens * 2 * sizeof(double) + perta_experts_bytes(llm, &job->samples) +
           (job->norms ? perta_norms_bytes(job->samples.n) : 0) + job->later_bytes;
}

static uint64_t batch_bytes(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    const struct perta_cpu_needs needs = needs_of(job, tokens, bf16);
    return perta_cpu_buffer_bytes(&needs, work_floats(job, tokens) * sizeof(float)) +
           perta_cpu_bytes(&needs) + perta_experts_batch_bytes(&job->weights.llm, tokens);
}

static uint64_t worker_bytes(const struct perta_estimate_job *job, bool bf16)
{
    const struct perta_cpu_needs needs = needs_of(job, job->cut.longest, bf16);
    return perta_cpu_worker_bytes(&needs);
}

/* Tokens of the largest batch that fits into bytes. */
static size_t tokens_for(const struct perta_estimate_job *job, bool bf16, uint64_t bytes)
{
    size_t low = job->cut.longest, high = job->samples.n_tokens;
    while (low < high) {
        size_t middle = high - (high - low) / 2;
        if (batch_bytes(job, middle, bf16) <= bytes)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

struct plan {
    bool bf16, ahead; /* ahead: there is a second room for weights */
    unsigned n_workers;
    size_t tokens; /* of a batch */
};

/* The least is one worker, one room for weights and the longest group of samples. The rest of the
 * budget is shared among more workers, reading ahead and larger batches; what then remains is for
 * stores. Results depend on none of this. */
static int plan_memory(struct perta_estimate_job *job, struct plan *plan, struct perta_err *err)
{
    uint64_t budget = job->run->memory_bytes,
             group = batch_bytes(job, job->cut.longest, plan->bf16);
    /* The margin of an earlier job in this process is reused; the samples are this job's own. */
    uint64_t before =
        job->run->before_bytes ? job->run->before_bytes + perta_samples_bytes(&job->samples) : 0;
    uint64_t used =
        perta_memory_before(before, MARGIN_BYTES) + MARGIN_BYTES + fixed_bytes(job, plan->bf16);
    uint64_t enough = used + group + worker_bytes(job, plan->bf16);
    if (budget < enough)
        return perta_memory_refuse(budget, enough, err,
                                   "for this model and its longest sample (%llu tokens)",
                                   (unsigned long long)job->samples.longest);
    uint64_t left = budget - enough;
    unsigned more = perta_run_threads(job->run) - 1;
    more = (unsigned)least(more, left / 2 / worker_bytes(job, plan->bf16));
    left -= more * worker_bytes(job, plan->bf16);
    plan->n_workers = 1 + more;
    uint64_t rooms = part_room(job) + perta_weights_expert_room(&job->weights);
    plan->ahead = rooms <= left / 2;
    left -= plan->ahead ? rooms : 0;
    /* All tokens in one batch if they fit; otherwise, stores get as much as batches. */
    bool whole = batch_bytes(job, job->samples.n_tokens, plan->bf16) <= left + group;
    plan->tokens = tokens_for(job, plan->bf16, group + (whole ? left : left / 2));
    job->scratch.free_bytes = left + group - batch_bytes(job, plan->tokens, plan->bf16);
    return 0;
}

/* ---- taken ---- */

/* Take the host's memory: rooms for weights, the source's room, means. */
static int take_host(struct perta_estimate_job *job, const struct plan *plan,
                     uint8_t *rooms[PERTA_WEIGHTS_ROOMS], float **means, struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    uint64_t experts = perta_weights_expert_room(&job->weights);
    uint64_t parts = (part_room(job) + experts) * (plan->ahead ? 2 : 1);
    int rc = perta_pool_take(&job->pool, parts + source_room(job) + means_bytes(job), err);
    if (rc)
        return rc;
    uint8_t *at = job->pool.base;
    uint8_t *of_experts = at + (plan->ahead ? 2 : 1) * part_room(job);
    rooms[0] = at;
    rooms[1] = plan->ahead ? at + part_room(job) : NULL;
    rooms[2] = experts ? of_experts : NULL;
    rooms[3] = experts && plan->ahead ? of_experts + experts : NULL;
    if (job->source)
        job->source->room = at + parts;
    *means = (float *)(void *)(at + parts + source_room(job));
    job->inv_freq = calloc(2 * (size_t)llm->head_dim, sizeof *job->inv_freq);
    job->slopes = calloc(llm->n_heads, sizeof *job->slopes);
    job->x = calloc(llm->n_layers + 1, sizeof *job->x);
    if (!job->inv_freq || !job->slopes || !job->x)
        return perta_fail_sys(err, ENOMEM, "estimate");
    perta_llm_rope_tables(llm, job->inv_freq);
    perta_llm_alibi_slopes(llm, job->slopes);
    return 0;
}

static void lay_out(struct perta_estimate_job *job, uint64_t n_work, float *means)
{
    const struct perta_llm *llm = &job->weights.llm;
    const struct perta_array start = {job->memory, 0};
    struct perta_array gradients = perta_array_at(start, n_work);
    job->work = start;
    job->factors.room = perta_array_at(start, most(perta_acts_floats(llm, job->batch_tokens),
                                                   perta_expert_floats(llm, job->batch_tokens)));
    if (!has_gradients(job))
        return;
    job->statistic.be = job->be;
    job->statistic.n_tiles = block_tiles(llm);
    perta_statistic_lay_out(&job->statistic, block_floats(llm), job->chunks.parts, gradients,
                            means);
    job->sink = (struct perta_importance_sink){
        .sink = perta_importance_sink_functions,
        .llm = llm,
        .statistic = &job->statistic,
        .all = {&job->chunks, job->samples.n_tokens, job->n_batches == 1},
        .scratch = &job->scratch,
        .advance = perta_estimate_on_part,
        .ctx = job,
        .vectors = perta_array_at(gradients, statistic_bytes(job) / sizeof(float)),
        .staging = start,
        .staging_floats = n_work,
        .workers = job->workers,
    };
}

static int take_memory(struct perta_estimate_job *job, const struct plan *plan,
                       struct perta_err *err)
{
    const struct perta_cpu_needs needs = needs_of(job, job->batch_tokens, plan->bf16);
    uint64_t n_work = (work_floats(job, job->batch_tokens) + 15) & ~(uint64_t)15;
    uint8_t *rooms[PERTA_WEIGHTS_ROOMS];
    float *means;
    int rc = take_host(job, plan, rooms, &means, err);
    if (!rc)
        rc = perta_workers_open(plan->n_workers, &job->workers, err);
    if (!rc)
        rc = job->estimate->compute == PERTA_COMPUTE_REFERENCE
                 ? perta_scalar_open(&job->be, err)
                 : perta_cpu_open(&needs, job->workers, &job->be, err);
    job->scratch.be = job->be;
    if (!rc)
        rc = job->be->ops->alloc(job->be, n_work * sizeof(float) + gradient_bytes(job),
                                 &job->memory, err);
    if (!rc && job->factors.n)
        rc = job->be->ops->alloc(job->be, factors_bytes(job), &job->factors_memory.buffer, err);
    job->factors.values = job->factors_memory;
    if (!rc && job->adapted.ck)
        rc = perta_adapted_load(&job->adapted, &job->factors, job->be, err);
    if (!rc)
        rc = perta_weights_rooms(&job->weights, job->be, rooms, part_room(job),
                                 perta_weights_expert_room(&job->weights), err);
    if (!rc)
        rc = perta_experts_open(&job->experts, &job->weights.llm, &job->samples, job->batch_tokens,
                                err);
    if (!rc)
        lay_out(job, n_work, means);
    return rc;
}

int perta_estimate_plan(struct perta_estimate_job *job, bool bf16, struct perta_err *err)
{
    struct plan plan = {.bf16 = bf16};
    job->n_factor_arrays = job->n_factor_arrays ? job->n_factor_arrays : 1;
    int rc = plan_memory(job, &plan, err);
    if (rc)
        return rc;
    job->batch_tokens = plan.tokens;
    job->n_batches = count_batches(job);
    return take_memory(job, &plan, err);
}
