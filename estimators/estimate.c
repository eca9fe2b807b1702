#include "estimators/estimate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/backprop/head.h"
#include "io/checked.h"
#include "stream/memory.h"

/* What oneDNN, OpenMP and the heap take besides what is counted. */
#define MARGIN_BYTES (48ull << 20)
#define VOCABULARY_ROWS 1024
/* Gradients of a weight are formed in blocks of so many floats. */
#define BLOCK_FLOATS (4u << 20)

struct job {
    const struct perta_estimate *estimate;
    const struct perta_run *run;
    struct perta_weights weights;
    struct perta_samples samples;
    struct perta_importance_out outs[2];
    struct perta_gemm *gemm;
    struct perta_statistic statistic;
    struct perta_head head;
    struct perta_scratch scratch;
    char *scratch_dir;

    struct perta_pool pool;
    uint8_t *room;       /* for weights */
    float *work;         /* for a batch: its activations, or the head's */
    float *inv_freq;     /* (head_dim / 2) */
    uint32_t *positions; /* (n_tokens) */

    struct perta_segments batches, sequences; /* of tokens; a batch is whole samples */
    uint64_t *batch_samples;                  /* (batches.n + 1) */
    struct perta_store *x;                    /* (n_layers + 1): what each block gets; the last
                                                 block's result */
    struct perta_store dx;
    struct perta_store operands[2 * PERTA_N_LINEARS]; /* of the block under way */
    float *vectors[2]; /* (vector_floats): a block's norms and biases, sum and square */
    size_t vector_floats;
    uint64_t total_bytes;
};

/* ---- batches ---- */

/* Whole samples, as many as have so many tokens together. */
static int cut_batches(struct job *job, size_t tokens, struct perta_err *err)
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

static int lay_out_tokens(struct job *job, struct perta_err *err)
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

static size_t widest(const struct perta_llm *llm)
{
    size_t q = (size_t)llm->n_heads * llm->head_dim;
    size_t widest = llm->hidden > llm->intermediate ? llm->hidden : llm->intermediate;
    return q > widest ? q : widest;
}

static size_t block_floats(const struct perta_llm *llm)
{
    size_t row = widest(llm), most = BLOCK_FLOATS;
    size_t vocabulary = (size_t)VOCABULARY_ROWS * llm->hidden;
    most = vocabulary > most ? vocabulary : most;
    return row > most ? row : most;
}

static uint64_t room_bytes(const struct job *job)
{
    uint64_t block = perta_weights_block_room(&job->weights);
    uint64_t rows = perta_weights_room((uint64_t)VOCABULARY_ROWS * job->weights.llm.hidden *
                                       sizeof(float));
    return perta_align_up(block > rows ? block : rows, PERTA_BLOCK_BYTES);
}

static size_t work_floats(const struct job *job, size_t tokens)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t acts = perta_acts_floats(llm, tokens, job->samples.longest);
    size_t head = perta_head_work(llm, tokens, VOCABULARY_ROWS);
    size_t operands = tokens * 2 * widest(llm) + tokens; /* rows read back */
    size_t most = acts > head ? acts : head;
    return most > operands ? most : operands;
}

/* Converted operands: a block of weight rows, and in bf16 a batch's rows of both sides. */
static size_t gemm_floats(const struct job *job, size_t tokens, bool bf16)
{
    size_t width = widest(&job->weights.llm), rows = 1024 > VOCABULARY_ROWS ? 1024 : VOCABULARY_ROWS;
    size_t floats = rows * width + 64;
    return bf16 ? floats + (tokens * (width + rows) + 1) / 2 + tokens * width / 2 : floats;
}

static uint64_t fixed_bytes(const struct job *job)
{
    size_t blocks = perta_statistic_floats(block_floats(&job->weights.llm), job->estimate->meansq);
    return room_bytes(job) + (blocks + 2 * job->vector_floats) * sizeof(float) +
           perta_head_bytes(&job->samples, &job->weights.llm) +
           job->samples.n_tokens * 2 * sizeof(double);
}

static uint64_t batch_bytes(const struct job *job, size_t tokens, bool bf16)
{
    return (work_floats(job, tokens) + gemm_floats(job, tokens, bf16)) * sizeof(float);
}

/* The largest batch for half of what is left, all samples at best; then stores get the rest. */
static int plan_memory(struct job *job, bool bf16, size_t *tokens, struct perta_err *err)
{
    uint64_t used = perta_memory_trimmed() + MARGIN_BYTES + fixed_bytes(job);
    uint64_t least = used + batch_bytes(job, job->samples.longest, bf16);
    uint64_t budget = job->run->memory_bytes;
    if (budget < least)
        return perta_fail(err, PERTA_EUSAGE,
                          "--memory %lluM is too small for this model and its longest sample "
                          "(%llu tokens): it needs %lluM",
                          (unsigned long long)(budget >> 20),
                          (unsigned long long)job->samples.longest,
                          (unsigned long long)(least >> 20) + 2); /* what is resident varies a little */
    size_t low = job->samples.longest, high = job->samples.n_tokens;
    uint64_t whole = used + batch_bytes(job, high, bf16), half = used + (budget - used) / 2;
    uint64_t limit = whole <= budget ? budget : half > least ? half : least;
    while (low < high) {
        size_t middle = high - (high - low) / 2;
        if (used + batch_bytes(job, middle, bf16) <= limit)
            low = middle;
        else
            high = middle - 1;
    }
    *tokens = low;
    job->scratch.free_bytes = budget - used - batch_bytes(job, low, bf16);
    return 0;
}

static int take_memory(struct job *job, bool bf16, struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t n = job->batches.longest, blocks = block_floats(llm);
    uint64_t room = room_bytes(job), work = work_floats(job, n) * sizeof(float);
    uint64_t statistic =
        perta_statistic_floats(blocks, job->estimate->meansq) * sizeof(float);
    work = perta_align_up(work, PERTA_BLOCK_BYTES);
    int rc = perta_pool_take(&job->pool, room + work + statistic, err);
    if (rc)
        return rc;
    job->room = job->pool.base;
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

static int open_stores(struct job *job, struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    size_t n = job->samples.n_tokens;
    int rc = perta_store_open(&job->dx, &job->scratch, n, llm->hidden, err);
    for (uint32_t l = llm->n_layers + 1; l-- > 0 && !rc;) /* the last are used first */
        rc = perta_store_open(&job->x[l], &job->scratch, n, llm->hidden, err);
    return rc;
}

/* ---- a block over all tokens ---- */

static struct perta_batch batch_at(const struct job *job, size_t b, size_t *starts)
{
    size_t first = job->batches.starts[b];
    uint64_t from = job->batch_samples[b], to = job->batch_samples[b + 1];
    for (uint64_t s = from; s <= to; s++)
        starts[s - from] = job->samples.starts[s] - first;
    return (struct perta_batch){to - from, job->batches.starts[b + 1] - first, starts,
                                job->positions + first};
}

static struct perta_block block_for(const struct job *job)
{
    return (struct perta_block){
        .llm = &job->weights.llm, .gemm = job->gemm, .inv_freq = job->inv_freq};
}

static int load_rows(const struct perta_store *store, size_t first, size_t n, float *to,
                     struct perta_err *err)
{
    struct perta_rows rows;
    int rc = perta_store_get(store, first, n, 0, store->width, to, &rows, err);
    if (!rc && rows.data != to)
        memcpy(to, rows.data, n * store->width * sizeof *to);
    return rc;
}

static int advance(struct job *job, struct perta_err *err)
{
    if (job->run->progress)
        job->run->progress(job->run->progress_user, job->weights.read_bytes, job->total_bytes);
    if (job->run->cancel && *job->run->cancel)
        return perta_fail(err, PERTA_EINTR, "interrupted");
    return 0;
}

static int forward_layer(struct job *job, uint32_t layer, size_t *starts, struct perta_err *err)
{
    struct perta_block block = block_for(job);
    struct perta_acts acts;
    int rc = perta_weights_block(&job->weights, layer, job->room, &block, err);
    for (size_t b = 0; b < job->batches.n && !rc; b++) {
        struct perta_batch batch = batch_at(job, b, starts);
        size_t first = job->batches.starts[b];
        perta_acts_lay_out(&acts, block.llm, batch.n, job->samples.longest, job->work);
        rc = load_rows(&job->x[layer], first, batch.n, acts.x, err);
        if (!rc)
            rc = perta_block_forward(&block, &batch, &acts, err);
        if (!rc)
            rc = perta_store_put(&job->x[layer + 1], first, batch.n, acts.out, err);
        if (!rc)
            rc = advance(job, err);
    }
    return rc;
}

/* ---- backward ---- */

/* Where a block's vectors stand in job->vectors: norms, then biases. */
static size_t norm_at(const struct perta_llm *llm, enum perta_norm_name name)
{
    const size_t sizes[PERTA_N_NORMS] = {llm->hidden, llm->hidden, llm->head_dim, llm->head_dim};
    size_t at = 0;
    for (int i = 0; i < (int)name; i++)
        at += sizes[i];
    return at;
}

static size_t bias_at(const struct perta_llm *llm, int name)
{
    return norm_at(llm, PERTA_N_NORMS) + (size_t)name * widest(llm);
}

static void add_vector(struct job *job, size_t at, const float *d, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        job->vectors[0][at + i] += d[i];
        job->vectors[1][at + i] += d[i] * d[i];
    }
}

static void on_norm(void *ctx, size_t sequence, enum perta_norm_name name, const float *d,
                    size_t n)
{
    struct job *job = ctx;
    (void)sequence;
    add_vector(job, norm_at(&job->weights.llm, name), d, n);
}

static void on_bias(void *ctx, size_t sequence, enum perta_linear_name name, const float *d,
                    size_t n)
{
    struct job *job = ctx;
    (void)sequence;
    add_vector(job, bias_at(&job->weights.llm, (int)name), d, n);
}

static int write_vector(struct job *job, const char *name, size_t at, size_t n,
                        struct perta_err *err)
{
    struct perta_statistic *s = &job->statistic;
    perta_statistic_begin(s, n);
    memcpy(s->sum, job->vectors[0] + at, n * sizeof(float));
    if (s->square)
        memcpy(s->square, job->vectors[1] + at, n * sizeof(float));
    return perta_statistic_end(s, name, 0, n, err);
}

static int write_vectors(struct job *job, uint32_t layer, const struct perta_block *block,
                         struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    char name[128];
    int rc = 0;
    for (int i = 0; i < PERTA_N_NORMS && !rc; i++)
        if (block->norm[i])
            rc = write_vector(job,
                              perta_weights_name(name, layer, perta_norm_names[i], "weight"),
                              norm_at(llm, (enum perta_norm_name)i),
                              i <= PERTA_NORM_2 ? llm->hidden : llm->head_dim, err);
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++)
        if (block->linear[i].bias)
            rc = write_vector(job,
                              perta_weights_name(name, layer, perta_linear_names[i], "bias"),
                              bias_at(llm, i), block->linear[i].out, err);
    return rc;
}

/* What weight gradients are made of: in place for a single batch, else kept for all batches. */
static int keep_operands(struct job *job, const struct perta_block *block, size_t first, size_t n,
                         const struct perta_acts *acts, struct perta_err *err)
{
    bool single = job->batches.n == 1;
    int rc = 0;
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++) {
        const float *rows[2];
        size_t widths[2] = {block->linear[i].in, block->linear[i].out};
        perta_block_operands(acts, (enum perta_linear_name)i, &rows[0], &rows[1]);
        for (int side = 0; side < 2 && !rc; side++) {
            struct perta_store *store = &job->operands[2 * i + side];
            if (single) {
                *store = (struct perta_store){n, widths[side], (float *)rows[side], -1};
                continue;
            }
            if (!store->width)
                rc = perta_store_open(store, &job->scratch, job->samples.n_tokens, widths[side],
                                      err);
            if (!rc)
                rc = perta_store_put(store, first, n, rows[side], err);
        }
    }
    return rc;
}

static int write_weights(struct job *job, uint32_t layer, struct perta_err *err)
{
    const struct perta_segments *segments =
        job->statistic.meansq ? &job->sequences : &job->batches;
    char name[128];
    int rc = 0;
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++) {
        rc = perta_statistic_linear(
            &job->statistic, perta_weights_name(name, layer, perta_linear_names[i], "weight"),
            &job->operands[2 * i], &job->operands[2 * i + 1], segments, job->work, err);
        if (!rc)
            rc = advance(job, err);
    }
    return rc;
}

static int backward_layer(struct job *job, uint32_t layer, size_t *starts, struct perta_err *err)
{
    struct perta_block block = block_for(job);
    struct perta_acts acts;
    const struct perta_vector_sink sink = {job, on_norm, on_bias};
    memset(job->vectors[0], 0, job->vector_floats * sizeof(float));
    memset(job->vectors[1], 0, job->vector_floats * sizeof(float));
    int rc = perta_weights_block(&job->weights, layer, job->room, &block, err);
    for (size_t b = 0; b < job->batches.n && !rc; b++) {
        struct perta_batch batch = batch_at(job, b, starts);
        size_t first = job->batches.starts[b];
        perta_acts_lay_out(&acts, block.llm, batch.n, job->samples.longest, job->work);
        rc = load_rows(&job->x[layer], first, batch.n, acts.x, err);
        if (!rc)
            rc = load_rows(&job->dx, first, batch.n, acts.dout, err);
        if (!rc)
            rc = perta_block_forward(&block, &batch, &acts, err);
        if (!rc)
            rc = perta_block_backward(&block, &batch, &acts, &sink, err);
        if (!rc)
            rc = perta_store_put(&job->dx, first, batch.n, acts.dx, err);
        if (!rc)
            rc = keep_operands(job, &block, first, batch.n, &acts, err);
        if (!rc)
            rc = advance(job, err);
    }
    if (!rc)
        rc = write_weights(job, layer, err);
    return rc ? rc : write_vectors(job, layer, &block, err);
}

/* ---- the whole ---- */

static bool is_parameter(void *weights, const char *name)
{
    return perta_weights_is_parameter(weights, name);
}

static int begin_output(struct job *job, const char *stat, enum perta_stat kind,
                        struct perta_importance_out *out, struct perta_err *err)
{
    struct perta_importance plan;
    char *path = perta_path_join(job->estimate->out, stat);
    int rc = path ? perta_importance_plan(&plan, job->weights.ck, kind, job->samples.n,
                                          is_parameter, &job->weights, err)
                  : perta_fail_sys(err, ENOMEM, "%s", job->estimate->out);
    if (!rc)
        rc = perta_importance_begin(out, &plan, path, job->estimate->force, err);
    if (path)
        perta_importance_release(&plan);
    free(path);
    return rc;
}

static int begin_outputs(struct job *job, struct perta_err *err)
{
    int rc = 0;
    if (job->estimate->mean) {
        rc = begin_output(job, "mean", PERTA_STAT_MEAN, &job->outs[0], err);
        job->statistic.mean = &job->outs[0];
    }
    if (!rc && job->estimate->meansq) {
        rc = begin_output(job, "meansq", PERTA_STAT_MEANSQ, &job->outs[1], err);
        job->statistic.meansq = &job->outs[1];
    }
    return rc;
}

static int check_outputs(const struct job *job, struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    const char *const inputs[] = {e->model, e->data};
    const char *outputs[2];
    char *mean = perta_path_join(e->out, "mean"), *meansq = perta_path_join(e->out, "meansq");
    size_t n = 0;
    if (e->mean)
        outputs[n++] = mean;
    if (e->meansq)
        outputs[n++] = meansq;
    int rc = mean && meansq ? perta_publish_check(outputs, n, inputs, 2, e->force, err)
                            : perta_fail_sys(err, ENOMEM, "%s", e->out);
    free(mean);
    free(meansq);
    return rc;
}

static int prepare(struct job *job, struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    if (e->compute == PERTA_COMPUTE_BF16 && !perta_gemm_can_bf16())
        return perta_fail(err, PERTA_EUSAGE,
                          "--compute bf16: this CPU cannot; leave it out, or --compute f32");
    int rc = perta_weights_open(&job->weights, e->model, err);
    if (rc)
        return rc;
    job->vector_floats = bias_at(&job->weights.llm, PERTA_N_LINEARS);
    rc = perta_samples_read(e->data, job->weights.llm.vocab, e->max_tokens, &job->samples, err);
    if (!rc)
        rc = lay_out_tokens(job, err);
    return rc ? rc : check_outputs(job, err);
}

/* Bytes of weights that a run reads, for progress. */
static void count_bytes(struct job *job)
{
    uint64_t all = 0, embedding = 0;
    for (uint64_t i = 0; i < job->weights.ck->n_tensors; i++) {
        const struct perta_tensor *t = job->weights.ck->by_name[i].tensor;
        all += t->len_bytes;
        if (!strcmp(t->name, PERTA_EMBEDDING))
            embedding = t->len_bytes;
    }
    bool tied = job->weights.llm.tied;
    job->total_bytes = 2 * (all - embedding) + (tied ? 3 : 0) * embedding;
}

static int start(struct job *job, struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    size_t tokens = 0;
    bool bf16 = e->compute == PERTA_COMPUTE_BF16 ||
                (e->compute == PERTA_COMPUTE_AUTO && perta_gemm_has_bf16());
    int rc = begin_outputs(job, err);
    if (!rc)
        rc = plan_memory(job, bf16, &tokens, err);
    if (!rc)
        rc = cut_batches(job, tokens, err);
    if (!rc)
        rc = take_memory(job, bf16, err);
    if (!rc)
        rc = perta_weights_start(&job->weights, job->run->io, job->room, room_bytes(job), err);
    if (rc)
        return rc;
    job->statistic.n_samples = job->samples.n;
    job->scratch.dir = e->scratch ? e->scratch : job->outs[e->mean ? 0 : 1].folder.partial;
    job->head = (struct perta_head){
        .weights = &job->weights,
        .gemm = job->gemm,
        .samples = &job->samples,
        .statistic = &job->statistic,
        .batches = &job->batches,
        .batch_samples = job->batch_samples,
        .block_rows = VOCABULARY_ROWS,
        .room = job->room,
        .work = job->work,
    };
    rc = perta_head_open(&job->head, &job->scratch, err);
    count_bytes(job);
    return rc ? rc : open_stores(job, err);
}

static int run_all(struct job *job, double *loss, struct perta_err *err)
{
    uint32_t n_layers = job->weights.llm.n_layers;
    size_t *starts = calloc(job->samples.n + 1, sizeof *starts);
    int rc = starts ? perta_embed(&job->head, &job->x[0], err)
                    : perta_fail_sys(err, ENOMEM, "batches");
    for (uint32_t layer = 0; layer < n_layers && !rc; layer++)
        rc = forward_layer(job, layer, starts, err);
    if (!rc)
        rc = perta_head_forward(&job->head, &job->x[n_layers], loss, err);
    if (!rc)
        rc = advance(job, err);
    if (!rc)
        rc = perta_head_backward(&job->head, &job->x[n_layers], &job->dx, err);
    for (uint32_t layer = n_layers; layer-- > 0 && !rc;)
        rc = backward_layer(job, layer, starts, err);
    if (!rc)
        rc = perta_embed_backward(&job->head, &job->dx, err);
    free(starts);
    return rc;
}

static int finish(struct job *job, double loss, json_t *summary, struct perta_err *err)
{
    json_t *folders = json_array();
    json_object_set_new(summary, "folders", folders);
    int rc = 0;
    for (uint32_t i = 0; i < job->weights.ck->n_shards && !rc; i++)
        rc = perta_file_unchanged(&job->weights.files[i], err);
    uint64_t written = 0;
    for (int i = 0; i < 2 && !rc; i++) {
        if (!job->outs[i].fds)
            continue;
        rc = perta_importance_commit(&job->outs[i], err);
        written += job->outs[i].written_bytes;
        json_array_append_new(folders, json_string(job->outs[i].folder.path));
    }
    json_object_set_new(summary, "loss", json_real(loss));
    json_object_set_new(summary, "batches", json_integer((json_int_t)job->batches.n));
    json_object_set_new(summary, "read_bytes", json_integer((json_int_t)job->weights.read_bytes));
    json_object_set_new(summary, "written_bytes", json_integer((json_int_t)written));
    json_object_set_new(summary, "scratch_bytes",
                        json_integer((json_int_t)job->scratch.file_bytes));
    return rc;
}

static void release(struct job *job)
{
    perta_head_close(&job->head);
    for (uint32_t l = 0; job->x && l <= job->weights.llm.n_layers; l++)
        perta_store_close(&job->x[l]);
    perta_store_close(&job->dx);
    for (int i = 0; i < 2 * PERTA_N_LINEARS; i++)
        if (job->batches.n > 1)
            perta_store_close(&job->operands[i]);
    for (int i = 0; i < 2; i++) {
        perta_importance_out_release(&job->outs[i]);
        free(job->vectors[i]);
    }
    perta_weights_close(&job->weights);
    perta_gemm_close(job->gemm);
    perta_pool_give(&job->pool);
    perta_samples_release(&job->samples);
    free((void *)job->batches.starts);
    free((void *)job->sequences.starts);
    free(job->batch_samples);
    free(job->x);
    free(job->inv_freq);
    free(job->positions);
}

int perta_estimate(const struct perta_estimate *estimate, const struct perta_run *run,
                   json_t **summary, struct perta_err *err)
{
    struct job *job = calloc(1, sizeof *job);
    if (!job)
        return perta_fail_sys(err, ENOMEM, "estimate");
    job->estimate = estimate;
    job->run = run;
    double loss = 0;
    int rc = prepare(job, err);
    *summary = rc ? NULL
                  : json_pack("{s:I, s:I}", "samples", (json_int_t)job->samples.n, "tokens",
                              (json_int_t)job->samples.n_tokens);
    if (!rc && !run->dry_run) {
        rc = start(job, err);
        if (!rc)
            rc = run_all(job, &loss, err);
        if (!rc)
            rc = finish(job, loss, *summary, err);
    }
    release(job);
    free(job);
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    return rc;
}
