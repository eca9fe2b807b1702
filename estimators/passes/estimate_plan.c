#include "estimators/passes/estimate_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/ops.h"
#include "io/checked.h"

/* What oneDNN, compiled products, the thread that writes (16 MiB) and the heap take besides what is
 * counted. */
#define MARGIN_BYTES (32ull << 20)
/* Gradients of a weight are formed in blocks of so many floats. */
#define BLOCK_FLOATS (2u << 20)
/* Tokens of a group of samples (cut.h). */
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
    return job->estimate->meansq ? perta_chunks_make(job->starts, s->n, true, &job->chunks, err)
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

static size_t widest(const struct perta_llm *llm)
{
    size_t q = (size_t)llm->n_heads * llm->head_dim;
    return most(most(llm->hidden, llm->intermediate), q);
}

size_t perta_estimate_norm_at(const struct perta_llm *llm, enum perta_norm_name name)
{
    const size_t sizes[PERTA_N_NORMS] = {llm->hidden, llm->hidden, llm->head_dim, llm->head_dim};
    size_t at = 0;
    for (int i = 0; i < (int)name; i++)
        at += sizes[i];
    return at;
}

size_t perta_estimate_bias_at(const struct perta_llm *llm, int name)
{
    return perta_estimate_norm_at(llm, PERTA_N_NORMS) + (size_t)name * widest(llm);
}

/* By the model alone, for tiles of a gradient follow from it, and with them its bits. */
static size_t block_floats(const struct perta_llm *llm)
{
    size_t vocabulary = (size_t)PERTA_VOCABULARY_ROWS * llm->hidden;
    return most(most(BLOCK_FLOATS, vocabulary), widest(llm));
}

/* What a part of the weights is read into. */
static uint64_t part_room(const struct perta_estimate_job *job)
{
    uint64_t block = perta_weights_block_room(&job->weights);
    uint64_t rows = perta_weights_room((uint64_t)PERTA_VOCABULARY_ROWS * job->weights.llm.hidden *
                                       sizeof(float));
    return perta_align_up(most(block, rows), PERTA_BLOCK_BYTES);
}

static uint64_t source_room(const struct perta_estimate_job *job)
{
    return job->source ? job->source->room_bytes : 0;
}

static size_t work_floats(const struct perta_estimate_job *job, size_t tokens)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t head = perta_head_work(llm, perta_head_rows(&job->samples, tokens));
    return most(perta_acts_floats(llm, tokens), head);
}

/* Converted operands of a product: rows of a weight, and in bf16 a batch's rows. */
static size_t converted_floats(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    size_t wide = most(widest(&job->weights.llm), PERTA_VOCABULARY_ROWS);
    size_t batch = most(tokens, perta_head_rows(&job->samples, tokens)) + PERTA_SLACK_ROWS + 1;
    size_t rows = PERTA_VOCABULARY_ROWS + PERTA_SLACK_ROWS + 1;
    return bf16 ? (batch + rows) * wide / 2 + 128 : rows * wide + 128;
}

/* Operands of a gradient, side by side: the longest chunk's rows of the widest pair. */
static size_t packed_floats(const struct perta_estimate_job *job, bool bf16)
{
    const struct perta_llm *llm = &job->weights.llm;
    const struct perta_estimate *e = job->estimate;
    size_t wide = widest(llm), block = block_floats(llm);
    size_t pair = (size_t)llm->hidden + most(PERTA_VOCABULARY_ROWS, wide);
    pair = most(pair, wide + perta_statistic_rows(block, wide, llm->hidden));
    size_t rows = least(PERTA_CHUNK_ROWS, perta_chunk_padded(job->samples.n_tokens));
    return e->mean || e->meansq ? rows * pair / (bf16 ? 2 : 1) : 0;
}

static size_t scratch_floats(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    return most(converted_floats(job, tokens, bf16), packed_floats(job, bf16));
}

static uint64_t statistic_floats(const struct perta_estimate_job *job)
{
    const struct perta_estimate *e = job->estimate;
    return e->mean || e->meansq ? perta_statistic_floats(block_floats(&job->weights.llm), e->meansq,
                                                         job->chunks.parts)
                                : 0;
}

static uint64_t fixed_bytes(const struct perta_estimate_job *job)
{
    uint64_t heap = job->source ? job->source->heap_bytes : 0;
    return part_room(job) + source_room(job) + heap + statistic_floats(job) * sizeof(float) +
           2 * job->vector_floats * sizeof(double) +
           perta_head_bytes(&job->samples, &job->weights.llm) +
           job->samples.n_tokens * 2 * sizeof(double);
}

static uint64_t batch_bytes(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    return (work_floats(job, tokens) + scratch_floats(job, tokens, bf16)) * sizeof(float);
}

/* Floats that a worker has of its own: a row, a tile, or attention's scores. */
static size_t room_floats(const struct perta_estimate_job *job)
{
    return most(most((uint64_t)PERTA_TILE_ROWS * PERTA_TILE_COLS, widest(&job->weights.llm)),
                perta_attention_room(job->samples.longest));
}

static uint64_t worker_bytes(const struct perta_estimate_job *job)
{
    return PERTA_GEMM_WORKER_BYTES + room_floats(job) * sizeof(float);
}

/* The largest batch for so many bytes. */
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
    bool bf16, ahead; /* ahead: room for a second part of the weights */
    unsigned n_workers;
    size_t tokens; /* of a batch */
};

/* What there must be: a worker, a part of the weights, the longest group of samples. What is left
 * goes, a share each, to more workers, to reading ahead, and to larger batches; then to stores. Results
 * depend on none of it. */
static int plan_memory(struct perta_estimate_job *job, struct plan *plan, struct perta_err *err)
{
    uint64_t budget = job->run->memory_bytes,
             group = batch_bytes(job, job->cut.longest, plan->bf16);
    /* Of an earlier job's memory the margin is used again; samples are this one's. */
    uint64_t before =
        job->run->before_bytes ? job->run->before_bytes + perta_samples_bytes(&job->samples) : 0;
    uint64_t used = perta_memory_before(before, MARGIN_BYTES) + MARGIN_BYTES + fixed_bytes(job);
    uint64_t enough = used + group + worker_bytes(job);
    if (budget < enough)
        return perta_memory_refuse(budget, enough, err,
                                   "for this model and its longest sample (%llu tokens)",
                                   (unsigned long long)job->samples.longest);
    uint64_t left = budget - enough;
    unsigned more = perta_run_threads(job->run) - 1;
    more = (unsigned)least(more, left / 2 / worker_bytes(job));
    left -= more * worker_bytes(job);
    plan->n_workers = 1 + more;
    plan->ahead = part_room(job) <= left / 2;
    left -= plan->ahead ? part_room(job) : 0;
    /* All tokens at once if they fit, else what leaves as much to the stores. */
    bool whole = batch_bytes(job, job->samples.n_tokens, plan->bf16) <= left + group;
    plan->tokens = tokens_for(job, plan->bf16, group + (whole ? left : left / 2));
    job->scratch.free_bytes = left + group - batch_bytes(job, plan->tokens, plan->bf16);
    return 0;
}

static void lay_out(struct perta_estimate_job *job, const struct plan *plan, uint64_t work)
{
    uint8_t *at = job->pool.base;
    for (int i = 0; i < (plan->ahead ? 2 : 1); i++, at += part_room(job))
        job->weights.rooms[i] = at;
    if (job->source)
        job->source->room = at;
    at += source_room(job);
    job->work = (float *)(void *)at;
    if (statistic_floats(job))
        perta_statistic_lay_out(&job->statistic, block_floats(&job->weights.llm), job->chunks.parts,
                                (float *)(void *)(at + work));
}

static int take_memory(struct perta_estimate_job *job, const struct plan *plan,
                       struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t scratch = scratch_floats(job, job->batch_tokens, plan->bf16);
    uint64_t work =
        perta_align_up(work_floats(job, job->batch_tokens) * sizeof(float), PERTA_BLOCK_BYTES);
    uint64_t rooms = part_room(job) * (plan->ahead ? 2 : 1) + source_room(job);
    int rc = perta_pool_take(&job->pool, rooms + work + statistic_floats(job) * sizeof(float), err);
    if (rc)
        return rc;
    lay_out(job, plan, work);
    job->inv_freq = calloc(llm->head_dim, sizeof *job->inv_freq);
    job->vectors[0] = calloc(job->vector_floats, sizeof *job->vectors[0]);
    job->vectors[1] = calloc(job->vector_floats, sizeof *job->vectors[1]);
    job->x = calloc(llm->n_layers + 1, sizeof *job->x);
    if (!job->inv_freq || !job->vectors[0] || !job->vectors[1] || !job->x)
        return perta_fail_sys(err, ENOMEM, "estimate");
    perta_rope_frequencies(llm, job->inv_freq);
    rc = perta_workers_open(plan->n_workers, &job->workers, err);
    if (!rc)
        rc = perta_gemm_open(plan->bf16, job->workers, scratch, room_floats(job), &job->gemm, err);
    if (rc)
        return rc;
    job->statistic.gemm = job->gemm;
    job->packed = (struct perta_packed){perta_gemm_scratch(job->gemm, 0), scratch};
    return 0;
}

int perta_estimate_plan(struct perta_estimate_job *job, bool bf16, struct perta_err *err)
{
    struct plan plan = {.bf16 = bf16};
    int rc = plan_memory(job, &plan, err);
    if (rc)
        return rc;
    job->batch_tokens = plan.tokens;
    job->n_batches = count_batches(job);
    return take_memory(job, &plan, err);
}
