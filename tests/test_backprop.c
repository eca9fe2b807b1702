/* The backward pass of a block, of a model in memory, and of estimate's ends of a model, against
 * finite differences of a forward pass in double (llm_double.h). */
#include "tests/scratch.h"

#include "estimators/compute/cpu.h"
#include "estimators/model/train.h"
#include "estimators/passes/estimate.h"
#include "io/format/checkpoint.h"
#include "tests/gradient.h"
#include "tests/llm_double.h"

static struct perta_err err;

#define SIZES                                                                \
    "\"hidden_size\":12,\"intermediate_size\":10,\"num_attention_heads\":8," \
    "\"num_key_value_heads\":2,\"head_dim\":4,\"rms_norm_eps\":1e-3,"
#define NAME(of) "{\"architectures\":[\"" of "ForCausalLM\"],"

/* Groups of 4 heads, head_dim not hidden / heads; all that architectures differ in. */
static const char *const configs[] = {
    NAME("Llama") SIZES "\"vocab_size\":23,\"num_hidden_layers\":2,"
                        "\"attention_bias\":true,\"mlp_bias\":true}",
    NAME("Llama") SIZES "\"vocab_size\":23,\"num_hidden_layers\":2,\"tie_word_embeddings\":true,"
                        "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,"
                        "\"low_freq_factor\":1,\"high_freq_factor\":4,"
                        "\"original_max_position_embeddings\":16}}",
    NAME("Mistral") SIZES "\"vocab_size\":23,\"num_hidden_layers\":1,\"sliding_window\":4}",
    NAME("Qwen2") SIZES "\"vocab_size\":23,\"num_hidden_layers\":1}",
    NAME("Qwen3") SIZES "\"vocab_size\":23,\"num_hidden_layers\":2,\"tie_word_embeddings\":true}",
};

/* Ragged; the second has one token that counts, the third masks its start. */
static const char data[] =
    "{\"input_ids\":[3,1,4,1,5,9,2,6]}\n"
    "{\"input_ids\":[22,0]}\n"
    "{\"input_ids\":[3,7,7,8,2,2,0,1,3],\"labels\":[-100,-100,-100,8,2,2,0,-100,22]}\n";

struct lab {
    struct perta_model model;
    struct perta_samples samples;
    struct model_double twin;
    float inv_freq[64];
    size_t sample; /* whose loss is wanted */
};

static void open_lab(struct lab *lab, const char *config)
{
    struct perta_llm llm;
    json_t *json = json_loads(config, 0, NULL);
    *lab = (struct lab){0};
    ck_assert_ptr_nonnull(json);
    ck_assert_ok(perta_llm_parse(json, "config.json", &llm, &err));
    json_decref(json);
    ck_assert_ok(perta_model_new(&llm, 1, &lab->model, &err));
    uint64_t seed = 15;
    for (size_t i = 0; i < lab->model.n_floats; i++)
        lab->model.weights[i] += uniform(&seed, -0.4, 0.4);
    put_text("data.jsonl", data);
    const struct perta_samples_wanted wanted = {.vocab = llm.vocab};
    ck_assert_ok(perta_samples_read("data.jsonl", &wanted, &lab->samples, &err));
    const struct perta_model_file file = {"config.json", config};
    ck_assert_ok(perta_model_save(&lab->model, "model", &file, 1, false, &err)); /* rounds */
    perta_llm_rope_tables(&llm, lab->inv_freq);
    lab->twin = (struct model_double){.model = &lab->model,
                                      .inv_freq = lab->inv_freq,
                                      .weights = alloc(lab->model.n_floats * sizeof(double))};
    for (size_t i = 0; i < lab->model.n_floats; i++)
        lab->twin.weights[i] = (double)lab->model.weights[i];
}

static void close_lab(struct lab *lab)
{
    free(lab->twin.weights);
    perta_samples_release(&lab->samples);
    perta_model_release(&lab->model);
}

static double loss_of_sample(void *ctx)
{
    const struct lab *lab = ctx;
    return loss_double(&lab->twin, &lab->samples, lab->sample);
}

static double loss_of_all(void *ctx)
{
    const struct lab *lab = ctx;
    double sum = 0;
    for (size_t s = 0; s < lab->samples.n; s++)
        sum += loss_double(&lab->twin, &lab->samples, s);
    return sum / (double)lab->samples.n;
}

/* The caller's. */
static float *gradients_of(struct perta_trainer *t)
{
    size_t n = t->model->n_floats;
    float *gradients = alloc(n * sizeof *gradients);
    t->be->ops->get(t->be, t->gradients, gradients, n * sizeof *gradients);
    ck_assert_ok(perta_backend_wait(t->be, &err));
    return gradients;
}

START_TEST(every_tensor_of_a_model_in_memory)
{
    struct lab lab;
    struct perta_trainer trainer;
    const uint32_t which[] = {0, 1, 2};
    double loss;
    open_lab(&lab, configs[_i]);
    ck_assert_ok(perta_trainer_open(&trainer, &lab.model, &lab.samples, 3, 2, &err));
    ck_assert_ok(perta_trainer_gradients(&trainer, &lab.samples, which, 3, &loss, &err));
    ck_assert_double_lt(fabs(loss / loss_of_all(&lab) - 1), TOLERANCE);
    float *gradients = gradients_of(&trainer);
    for (size_t p = 0; p < lab.model.n_parameters; p++) {
        const struct perta_parameter *of = &lab.model.parameters[p];
        is_gradient(of->name, gradients + of->at, lab.twin.weights + of->at, of->out * of->in,
                    of->vector ? 1 : 5, loss_of_all, &lab);
    }
    free(gradients);
    perta_trainer_close(&trainer);
    close_lab(&lab);
}
END_TEST

/* ---- a block: what comes before it, and what its sink is handed ---- */

/* A sink that records: vectors of each sequence, and products of all rows. */
struct recorder {
    struct perta_gradient_sink sink;
    struct perta_backend *be;
    const struct perta_llm *llm;
    float *vectors[2][PERTA_N_PARAMS]; /* (in); NULL: was not handed over */
    float *weights[PERTA_N_PARAMS];    /* (out, in) */
};

struct block {
    struct lab *lab;
    const struct perta_place *places; /* (n) */
    struct pair x, dout;              /* (n, H) */
    size_t first, T;                  /* the sequence that is looked at */
};

static double block_value(void *ctx)
{
    const struct block *c = ctx;
    size_t H = c->lab->model.llm.hidden, at = c->first * H;
    double *x = alloc(c->T * H * sizeof *x);
    memcpy(x, c->x.d + at, c->T * H * sizeof *x);
    block_double(&c->lab->twin, 0, x, c->places + c->first, c->T);
    double value = dot(x, c->dout.d + at, c->T * H);
    free(x);
    return value;
}

static double blocks_value(void *ctx)
{
    struct block *c = ctx;
    double value = 0;
    c->first = 0;
    c->T = 7;
    value += block_value(c);
    c->first = 7;
    c->T = 5;
    return value + block_value(c);
}

static float *floats_of(const struct recorder *r, struct perta_array from, size_t n)
{
    float *to = alloc(n * sizeof *to);
    r->be->ops->get(r->be, from, to, n * sizeof *to);
    return to;
}

static int record_linear(struct perta_gradient_sink *sink, struct perta_site site,
                         enum perta_param param, const struct perta_batch *batch,
                         struct perta_array x, struct perta_array dy, struct perta_err *e)
{
    struct recorder *r = (struct recorder *)sink;
    size_t out, in;
    (void)e;
    ck_assert_uint_eq(site.layer, 0);
    ck_assert_uint_eq(site.expert, 0);
    ck_assert_ptr_null(r->weights[param]);
    perta_llm_shape(r->llm, perta_llm_param(r->llm, 0, param), &out, &in);
    float *xs = floats_of(r, x, batch->n * in), *dys = floats_of(r, dy, batch->n * out);
    float *dw = r->weights[param] = alloc(out * in * sizeof *dw);
    for (size_t o = 0; o < out; o++)
        for (size_t i = 0; i < in; i++) {
            double sum = 0;
            for (size_t t = 0; t < batch->n; t++)
                sum += (double)dys[t * out + o] * (double)xs[t * in + i];
            dw[o * in + i] = (float)sum;
        }
    free(xs);
    free(dys);
    return 0;
}

static int record_vector(struct perta_gradient_sink *sink, struct perta_site site,
                         enum perta_param param, size_t sequence, struct perta_array d,
                         struct perta_err *e)
{
    struct recorder *r = (struct recorder *)sink;
    size_t out, in;
    (void)e;
    ck_assert_uint_eq(site.layer, 0);
    ck_assert_uint_eq(site.expert, 0);
    ck_assert_ptr_null(r->vectors[sequence][param]);
    perta_llm_shape(r->llm, perta_llm_param(r->llm, 0, param), &out, &in);
    r->vectors[sequence][param] = floats_of(r, d, in);
    return 0;
}

/* Every parameter of the block was handed over, once for each sequence if it is a vector. */
static void are_recorded(struct recorder *r, struct block *c)
{
    const struct perta_model *m = &c->lab->model;
    for (int i = 0; i < PERTA_N_PARAMS; i++) {
        const struct perta_param_row *row = perta_llm_param(&m->llm, 0, (enum perta_param)i);
        ck_assert(!row || row->out ? !r->vectors[0][i] && !r->vectors[1][i] : !r->weights[i]);
        if (!row)
            continue;
        const struct perta_parameter *of = perta_model_param(m, perta_site_of(0), row);
        double *at = c->lab->twin.weights + of->at;
        if (row->out)
            is_gradient(of->name, r->weights[i], at, of->out * of->in, 5, blocks_value, c);
        free(r->weights[i]);
        for (size_t s = 0; s < 2 && !row->out; s++) {
            c->first = s ? 7 : 0;
            c->T = s ? 5 : 7;
            is_gradient(of->name, r->vectors[s][i], at, of->in, 1, block_value, c);
            free(r->vectors[s][i]);
        }
    }
}

static void open_cpu(const struct perta_llm *llm, struct perta_workers **workers,
                     struct perta_backend **be)
{
    const struct perta_cpu_needs needs = {
        .widest = perta_llm_widest(llm), .rows = 12, .longest = 12};
    ck_assert_ok(perta_workers_open(2, workers, &err));
    ck_assert_ok(perta_cpu_open(&needs, *workers, be, &err));
}

START_TEST(a_block_of_ragged_sequences)
{
    struct lab lab;
    open_lab(&lab, configs[_i]);
    const struct perta_llm *llm = &lab.model.llm;
    const size_t starts[] = {0, 7, 12}, tiles[] = {0, 12};
    /* all before it; and two blocks, of which the second's first token is hidden, and last */
    const struct perta_place places[] = {
        {0, 0, 0, 1, false}, {1, 1, 0, 2, false}, {2, 2, 0, 3, false}, {3, 3, 0, 4, false},
        {4, 4, 0, 5, false}, {5, 5, 0, 6, false}, {6, 6, 0, 7, false}, {0, 0, 0, 1, false},
        {1, 1, 0, 2, false}, {7, 3, 2, 3, false}, {8, 4, 2, 4, false}, {6, 2, 0, 2, false}};
    const struct perta_batch batch = {12, {2, starts, 0}, {1, tiles, 0}, places, 0};
    struct block c = {.lab = &lab,
                      .places = places,
                      .x = pair(12 * llm->hidden, 16),
                      .dout = pair(12 * llm->hidden, 17)};
    struct perta_workers *workers;
    struct perta_backend *be;
    struct perta_acts acts;
    uint32_t memory, weights;
    open_cpu(llm, &workers, &be);
    ck_assert_ok(be->ops->alloc(be, perta_acts_floats(llm, 12) * sizeof(float), &memory, &err));
    ck_assert_ok(
        be->ops->share(be, lab.model.weights, lab.model.n_floats * sizeof(float), &weights, &err));
    struct perta_model_parameters from =
        perta_model_parameters(&lab.model, (struct perta_array){weights, 0});
    struct recorder recorder = {
        .sink = {.linear = record_linear, .vector = record_vector}, .be = be, .llm = llm};
    struct perta_layer layer = {.llm = llm,
                                .be = be,
                                .from = &from.parameters,
                                .sink = &recorder.sink,
                                .inv_freq = lab.inv_freq};
    perta_acts_lay_out(&acts, llm, 12, (struct perta_array){memory, 0});
    be->ops->put(be, acts.x, c.x.f, c.x.n * sizeof(float));
    be->ops->put(be, acts.dout, c.dout.f, c.x.n * sizeof(float));
    perta_block_forward(&layer, &batch, &acts);
    perta_block_backward(&layer, &batch, &acts);
    float *dx = floats_of(&recorder, acts.dx, c.x.n);
    ck_assert_ok(perta_backend_wait(be, &err));
    is_gradient("dx", dx, c.x.d, c.x.n, 1, blocks_value, &c);
    are_recorded(&recorder, &c);
    free(dx);
    be->ops->free(be, memory);
    be->ops->free(be, weights);
    perta_backend_close(be);
    perta_workers_close(workers);
    release(c.x);
    release(c.dout);
    close_lab(&lab);
}
END_TEST

/* ---- the ends of the model, out of core: a vocabulary of three blocks of rows ---- */

static const char *const wide[] = {
    NAME("Llama") SIZES "\"vocab_size\":2500,\"num_hidden_layers\":1}",
    NAME("Llama") SIZES "\"vocab_size\":2500,\"num_hidden_layers\":1,"
                        "\"tie_word_embeddings\":true}",
};
static const char wide_data[] = "{\"input_ids\":[1023,1024,2,2499]}\n"
                                "{\"input_ids\":[2047,2499,2048,5,2047]}\n";
/* Rows at the ends of blocks, with tokens, with labels, with neither. */
static const size_t wide_rows[] = {0, 2, 5, 1023, 1024, 1500, 2047, 2048, 2499};

/* Floats first .. first + n of a tensor in a folder. */
static void read_floats(const char *folder, const char *name, size_t first, size_t n, float *to)
{
    struct perta_checkpoint *ck;
    ck_assert_ok(perta_checkpoint_open(folder, &ck, &err));
    const struct perta_ref *ref = perta_checkpoint_find(ck, name);
    FILE *file = fopen(ck->shards[ref->shard].path, "r");
    ck_assert_ptr_nonnull(file);
    fseek(file, (long)(ref->tensor->off_bytes + first * sizeof *to), SEEK_SET);
    ck_assert_uint_eq(fread(to, sizeof *to, n, file), n);
    fclose(file);
    perta_checkpoint_close(ck);
}

/* Mean and mean square over samples, against slopes of each sample's loss. */
static void are_statistics(struct lab *lab, const char *name, size_t first, size_t n)
{
    float mean[64], meansq[64];
    double want[64] = {0}, want_sq[64] = {0};
    double *x = lab->twin.weights +
                (perta_model_find(&lab->model, lab->model.weights, name) - lab->model.weights);
    for (lab->sample = 0; lab->sample < lab->samples.n; lab->sample++)
        for (size_t i = 0; i < n; i++) {
            double g = slope(x + first + i, loss_of_sample, lab);
            want[i] += g / (double)lab->samples.n;
            want_sq[i] += g * g / (double)lab->samples.n;
        }
    read_floats("imp/mean", name, first, n, mean);
    read_floats("imp/meansq", name, first, n, meansq);
    if (dot(want_sq, want_sq, n) == 0) { /* no token and, for the embedding, no label */
        for (size_t i = 0; i < n; i++)
            ck_assert(mean[i] == 0 && meansq[i] == 0);
        return;
    }
    are_close(name, mean, want, n);
    are_close(name, meansq, want_sq, n);
}

START_TEST(embedding_and_head_out_of_core)
{
    struct lab lab;
    open_lab(&lab, wide[_i]);
    put_text("data.jsonl", wide_data);
    perta_samples_release(&lab.samples);
    const struct perta_samples_wanted wanted = {.vocab = 2500};
    ck_assert_ok(perta_samples_read("data.jsonl", &wanted, &lab.samples, &err));
    const struct perta_estimate estimate = {.model = "model",
                                            .data = "data.jsonl",
                                            .out = "imp",
                                            .mean = true,
                                            .meansq = true,
                                            .compute = PERTA_COMPUTE_F32};
    const struct perta_run run = {.memory_bytes = 2ull << 30, .n_threads = 2};
    json_t *summary;
    ck_assert_ok(perta_estimate(&estimate, &run, &summary, &err));
    double loss = json_real_value(json_object_get(summary, "loss"));
    json_decref(summary);
    ck_assert_double_lt(fabs(loss / loss_of_all(&lab) - 1), TOLERANCE);
    size_t H = lab.model.llm.hidden;
    for (size_t i = 0; i < sizeof wide_rows / sizeof *wide_rows; i++) {
        are_statistics(&lab, "model.embed_tokens.weight", wide_rows[i] * H, H);
        if (!lab.model.llm.tied)
            are_statistics(&lab, "lm_head.weight", wide_rows[i] * H, H);
    }
    are_statistics(&lab, "model.norm.weight", 0, H);
    are_statistics(&lab, "model.layers.0.mlp.down_proj.weight", 30, 40);
    close_lab(&lab);
}
END_TEST

/* ---- the same estimate by the reference, in memory of its own ---- */

/* Samples of many groups of tokens, of which one is longer than a chunk. */
static void put_long_data(void)
{
    static const int lengths[] = {250, 3, 200, 70};
    FILE *file = fopen("data.jsonl", "w");
    ck_assert_ptr_nonnull(file);
    uint64_t seed = 5;
    for (size_t s = 0; s < 40; s++) {
        int length = s == 1 ? 1100 : lengths[s % 4];
        fprintf(file, "{\"input_ids\":[%d", 1);
        for (int i = 1; i < length; i++)
            fprintf(file, ",%d", (int)uniform(&seed, 0, 22.9f));
        fprintf(file, "]}\n");
    }
    fclose(file);
}

/* The least memory that it names. */
static uint64_t least_memory(struct perta_estimate estimate)
{
    const struct perta_run run = {.memory_bytes = 1 << 20, .n_threads = 2};
    json_t *summary;
    ck_assert_int_eq(perta_estimate(&estimate, &run, &summary, &err), PERTA_EUSAGE);
    uint64_t mib = strtoull(strstr(err.msg, "needs ") + 6, NULL, 10);
    err = (struct perta_err){0};
    return mib << 20;
}

static void estimate_to(const char *out, enum perta_compute compute, bool meansq,
                        uint64_t memory_bytes, json_t **summary)
{
    const struct perta_estimate estimate = {.model = "model",
                                            .data = "data.jsonl",
                                            .out = out,
                                            .mean = true,
                                            .meansq = meansq,
                                            .compute = compute};
    const struct perta_run run = {
        .memory_bytes = memory_bytes ? memory_bytes : least_memory(estimate), .n_threads = 2};
    ck_assert_ok(perta_estimate(&estimate, &run, summary, &err));
}

static void are_close_files(const struct lab *lab, const char *a, const char *b)
{
    for (size_t p = 0; p < lab->model.n_parameters; p++) {
        const struct perta_parameter *of = &lab->model.parameters[p];
        size_t n = of->out * of->in;
        float *have = alloc(n * sizeof *have), *reference = alloc(n * sizeof *reference);
        double *want = alloc(n * sizeof *want);
        read_floats(a, of->name, 0, n, have);
        read_floats(b, of->name, 0, n, reference);
        for (size_t i = 0; i < n; i++)
            want[i] = (double)reference[i];
        are_close(of->name, have, want, n);
        free(have);
        free(reference);
        free(want);
    }
}

/* In one batch, and in several whose rows are kept in files: 0 .. 3. */
START_TEST(an_estimate_by_the_reference)
{
    struct lab lab;
    json_t *fast, *slow;
    uint64_t memory_bytes = _i & 1 ? 0 : 2ull << 30;
    open_lab(&lab, configs[_i & 2 ? 4 : 0]);
    put_long_data();
    estimate_to("fast", PERTA_COMPUTE_F32, _i & 2, memory_bytes, &fast);
    estimate_to("slow", PERTA_COMPUTE_REFERENCE, _i & 2, memory_bytes, &slow);
    json_int_t n_batches = json_integer_value(json_object_get(slow, "batches"));
    ck_assert(_i & 1 ? n_batches > 1 : n_batches == 1);
    if (_i & 1)
        ck_assert_int_gt(json_integer_value(json_object_get(slow, "scratch_bytes")), 0);
    ck_assert_double_lt(fabs(json_real_value(json_object_get(fast, "loss")) /
                                 json_real_value(json_object_get(slow, "loss")) -
                             1),
                        TOLERANCE);
    are_close_files(&lab, "fast/mean", "slow/mean");
    if (_i & 2)
        are_close_files(&lab, "fast/meansq", "slow/meansq");
    json_decref(fast);
    json_decref(slow);
    close_lab(&lab);
}
END_TEST

/* Tell of progress, and stop at call number stop_at. */
struct watch {
    int n_calls, stop_at;
    volatile sig_atomic_t cancelled;
};

static void watch_progress(void *user, uint64_t done, uint64_t total)
{
    struct watch *watch = user;
    ck_assert_uint_le(done, total);
    if (++watch->n_calls == watch->stop_at)
        watch->cancelled = 1;
}

START_TEST(every_block_of_the_vocabulary_may_be_the_last)
{
    struct lab lab;
    open_lab(&lab, wide[_i]);
    put_text("data.jsonl", wide_data);
    const struct perta_estimate estimate = {.model = "model",
                                            .data = "data.jsonl",
                                            .out = "imp",
                                            .mean = true,
                                            .compute = PERTA_COMPUTE_F32};
    struct watch watch = {0};
    const struct perta_run run = {.memory_bytes = 2ull << 30,
                                  .n_threads = 2,
                                  .progress = watch_progress,
                                  .progress_user = &watch,
                                  .cancel = &watch.cancelled};
    json_t *summary;
    ck_assert_ok(perta_estimate(&estimate, &run, &summary, &err));
    json_decref(summary);
    /* three blocks: the loss, the head's gradient, the embedding's */
    int n_calls = watch.n_calls;
    ck_assert_int_ge(n_calls, 9);
    for (int stop_at = 1; stop_at <= n_calls; stop_at++) {
        const struct perta_estimate again = {.model = "model",
                                             .data = "data.jsonl",
                                             .out = "again",
                                             .mean = true,
                                             .compute = PERTA_COMPUTE_F32};
        watch = (struct watch){.stop_at = stop_at};
        ck_assert_int_eq(perta_estimate(&again, &run, &summary, &err), PERTA_EINTR);
        ck_assert_int_eq(watch.n_calls, stop_at);
        err = (struct perta_err){0};
    }
    close_lab(&lab);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_loop_test(tests, a_block_of_ragged_sequences, 0, sizeof configs / sizeof *configs);
    tcase_add_loop_test(tests, every_tensor_of_a_model_in_memory, 0,
                        sizeof configs / sizeof *configs);
    tcase_add_loop_test(tests, embedding_and_head_out_of_core, 0, sizeof wide / sizeof *wide);
    tcase_add_loop_test(tests, every_block_of_the_vocabulary_may_be_the_last, 0,
                        sizeof wide / sizeof *wide);
    tcase_add_loop_test(tests, an_estimate_by_the_reference, 0, 4);
    return run_suite("backprop", tests);
}
