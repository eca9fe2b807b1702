#include "estimators/estimate_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"

/* What oneDNN, OpenMP, the thread that writes (16 MiB) and the heap take besides what is counted. */
#define MARGIN_BYTES (48ull << 20)
/* The process itself before anything is taken, and a tensor's entry in its tables. */
#define PROCESS_BYTES (14ull << 20)
#define TENSOR_BYTES 1024
/* Gradients of a weight are formed in blocks of so many floats. */
#define BLOCK_FLOATS (4u << 20)

/* ---- batches ---- */

/* Whole samples, as many as have so many tokens together. */
static int cut_batches(struct perta_estimate_job *job, size_t tokens, struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    size_t *starts = calloc(s->n + 1, sizeof *starts);
    job->batches.starts = starts;
    job->batch_samples = calloc(s->n + 1, sizeof *job->batch_samples);
    if (!starts || !job->batch_samples)
        return perta_fail_sys(err, ENOMEM, "batches");
    size_t n = 0;
    for (uint64_t i = 0; i < s->n; i++) {
        if (n && s->starts[i + 1] - starts[n - 1] <= tokens) {
            starts[n] = s->starts[i + 1];
            job->batch_samples[n] = i + 1;
            continue;
        }
        starts[n] = s->starts[i];
        starts[++n] = s->starts[i + 1];
        job->batch_samples[n] = i + 1;
    }
    job->batches.n = n;
    for (size_t b = 0; b < n; b++)
        if (starts[b + 1] - starts[b] > job->batches.longest)
            job->batches.longest = starts[b + 1] - starts[b];
    return 0;
}

int perta_estimate_tokens(struct perta_estimate_job *job, struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    size_t *starts = calloc(s->n + 1, sizeof *starts);
    job->sequences = (struct perta_segments){s->n, s->longest, starts};
    job->positions = calloc(s->n_tokens, sizeof *job->positions);
    if (!starts || !job->positions)
        return perta_fail_sys(err, ENOMEM, "tokens");
    for (uint64_t i = 0; i <= s->n; i++)
        starts[i] = s->starts[i];
    for (uint64_t i = 0; i < s->n; i++)
        for (uint64_t t = s->starts[i]; t < s->starts[i + 1]; t++)
            job->positions[t] = (uint32_t)(t - s->starts[i]);
    return 0;
}

/* ---- memory ---- */

static uint64_t most(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
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

static size_t block_floats(const struct perta_llm *llm)
{
    size_t vocabulary = (size_t)PERTA_VOCABULARY_ROWS * llm->hidden;
    return most(most(BLOCK_FLOATS, vocabulary), widest(llm));
}

/* What weights and the source are read into. */
static uint64_t read_room(const struct perta_estimate_job *job)
{
    uint64_t block = perta_weights_block_room(&job->weights);
    uint64_t rows = perta_weights_room((uint64_t)PERTA_VOCABULARY_ROWS * job->weights.llm.hidden *
                                       sizeof(float));
    return perta_align_up(most(block, rows), PERTA_BLOCK_BYTES) +
           (job->source ? job->source->room_bytes : 0);
}

static size_t work_floats(const struct perta_estimate_job *job, size_t tokens)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t acts = perta_acts_floats(llm, tokens, job->samples.longest);
    size_t head = perta_head_work(llm, tokens, PERTA_VOCABULARY_ROWS);
    size_t operands = tokens * 2 * widest(llm) + tokens; /* rows read back */
    return most(most(acts, head), operands);
}

/* Converted operands: a block of weight rows, and in bf16 a batch's rows of both sides. */
static size_t gemm_floats(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    size_t width = widest(&job->weights.llm), rows = most(1024, PERTA_VOCABULARY_ROWS);
    size_t floats = rows * width + 64;
    return bf16 ? floats + (tokens * (width + rows) + 1) / 2 + tokens * width / 2 : floats;
}

static uint64_t statistic_floats(const struct perta_estimate_job *job)
{
    const struct perta_estimate *e = job->estimate;
    return e->mean || e->meansq
               ? perta_statistic_floats(block_floats(&job->weights.llm), e->meansq)
               : 0;
}

static uint64_t fixed_bytes(const struct perta_estimate_job *job)
{
    return read_room(job) +
           (statistic_floats(job) + 2 * job->vector_floats) * sizeof(float) +
           perta_head_bytes(&job->samples, &job->weights.llm) +
           job->samples.n_tokens * 2 * sizeof(double);
}

static uint64_t batch_bytes(const struct perta_estimate_job *job, size_t tokens, bool bf16)
{
    return (work_floats(job, tokens) + gemm_floats(job, tokens, bf16)) * sizeof(float);
}

/* What is there before a batch is taken: counted, so that the same flags cut the same batches every
 * time, for in which order gradients are summed depends on them. */
static uint64_t counted_bytes(const struct perta_estimate_job *job)
{
    return PROCESS_BYTES + (job->source ? job->source->heap_bytes : 0) +
           job->weights.ck->n_tensors * TENSOR_BYTES + job->samples.room * 2 +
           job->samples.n * 5 * sizeof(uint64_t) + job->samples.n_tokens * sizeof *job->positions;
}

/* The largest batch for half of what is left, all samples at best. */
static size_t tokens_of_a_batch(const struct perta_estimate_job *job, bool bf16, uint64_t left)
{
    size_t low = job->samples.longest, high = job->samples.n_tokens;
    bool whole = batch_bytes(job, high, bf16) <= left;
    uint64_t limit = whole ? left : most(left / 2, batch_bytes(job, low, bf16));
    while (low < high) {
        size_t middle = high - (high - low) / 2;
        if (batch_bytes(job, middle, bf16) <= limit)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Batches by what is counted; then stores get what is left, where more is resident than counted
 * less of it. */
static int plan_memory(struct perta_estimate_job *job, bool bf16, size_t *tokens, struct perta_err *err)
{
    uint64_t counted = counted_bytes(job), others = MARGIN_BYTES + fixed_bytes(job);
    uint64_t used = most(perta_memory_trimmed(), counted) + others;
    uint64_t least = used + batch_bytes(job, job->samples.longest, bf16);
    uint64_t budget = job->run->memory_bytes;
    if (budget < least)
        return perta_memory_refuse(budget, least, err,
                                   "for this model and its longest sample (%llu tokens)",
                                   (unsigned long long)job->samples.longest);
    *tokens = tokens_of_a_batch(job, bf16, budget - counted - others);
    used += batch_bytes(job, *tokens, bf16);
    job->scratch.free_bytes = used < budget ? budget - used : 0;
    return 0;
}

static int take_memory(struct perta_estimate_job *job, bool bf16, struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t n = job->batches.longest, blocks = block_floats(llm);
    uint64_t room = read_room(job), work = work_floats(job, n) * sizeof(float);
    uint64_t statistic = statistic_floats(job) * sizeof(float);
    work = perta_align_up(work, PERTA_BLOCK_BYTES);
    int rc = perta_pool_take(&job->pool, room + work + statistic, err);
    if (rc)
        return rc;
    job->room = job->pool.base;
    if (job->source)
        job->source->room = job->pool.base + room - job->source->room_bytes;
    job->work = (float *)(void *)(job->pool.base + room);
    perta_statistic_lay_out(&job->statistic, blocks,
                            (float *)(void *)(job->pool.base + room + work));
    job->inv_freq = calloc(llm->head_dim, sizeof *job->inv_freq);
    job->vectors[0] = calloc(job->vector_floats, sizeof(float));
    job->vectors[1] = calloc(job->vector_floats, sizeof(float));
    job->x = calloc(llm->n_layers + 1, sizeof *job->x);
    if (!job->inv_freq || !job->vectors[0] || !job->vectors[1] || !job->x)
        return perta_fail_sys(err, ENOMEM, "estimate");
    perta_rope_frequencies(llm, job->inv_freq);
    rc = perta_gemm_open(bf16, perta_run_threads(job->run), gemm_floats(job, n, bf16),
                         &job->gemm, err);
    job->statistic.gemm = job->gemm;
    return rc;
}

int perta_estimate_plan(struct perta_estimate_job *job, bool bf16, struct perta_err *err)
{
    size_t tokens = 0;
    int rc = plan_memory(job, bf16, &tokens, err);
    if (!rc)
        rc = cut_batches(job, tokens, err);
    return rc ? rc : take_memory(job, bf16, err);
}
