/* The sink of estimate: a weight's gradient has the same bits whether what it is made of is handed
 * over in one batch, or kept for all tokens, in memory or in files, in any mixture. */
#include "tests/scratch.h"

#include "estimators/compute/cpu.h"
#include "estimators/model/config.h"
#include "estimators/passes/importance_sink.h"
#include "tests/gradient.h"

#define TOKENS 1100
#define SAMPLE 25 /* tokens of each */
/* A weight is gone through in several blocks of rows. */
#define BLOCK_FLOATS 160

static const char config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":8,\"num_hidden_layers\":1,"
    "\"hidden_size\":8,\"intermediate_size\":40,\"num_attention_heads\":2}";

static struct perta_err err;
static struct perta_llm llm;
static struct perta_chunks chunks;
static struct perta_workers *workers;
static struct perta_backend *be;
static struct perta_statistic statistic;
static struct perta_scratch scratch;
static struct perta_importance_sink sink;
static float host[PERTA_MEANS];
static uint32_t memory, operands;
static struct perta_array vectors, staging;
static uint64_t n_staging;

static int go_on(void *ctx, struct perta_err *e)
{
    (void)ctx;
    (void)e;
    return 0;
}

static void open_backend(void)
{
    json_t *json = json_loads(config, 0, NULL);
    ck_assert_ok(perta_llm_parse(json, "config.json", &llm, &err));
    json_decref(json);
    n_staging = perta_importance_sink_staging(&llm, BLOCK_FLOATS, TOKENS);
    const struct perta_cpu_needs needs = {
        .widest = 1024, .rows = TOKENS, .longest = SAMPLE, .gradient_floats = n_staging};
    ck_assert_ok(perta_workers_open(2, &workers, &err));
    ck_assert_ok(perta_cpu_open(&needs, workers, &be, &err));
}

/* Staging is as small as it may be, and the sums lie right after it: what is staged too far changes
 * them. */
static void take_memory(void)
{
    uint64_t sums = perta_statistic_bytes(BLOCK_FLOATS, false, false);
    ck_assert_ok(be->ops->alloc(
        be, n_staging * sizeof(float) + sums + perta_importance_sink_bytes(&llm), &memory, &err));
    staging = (struct perta_array){memory, 0};
    statistic = (struct perta_statistic){.be = be, .n_samples = TOKENS / SAMPLE};
    struct perta_array at = perta_array_at(staging, n_staging);
    perta_statistic_lay_out(&statistic, BLOCK_FLOATS, false, at, host);
    vectors = perta_array_at(at, sums / sizeof(float));
}

/* x and dy, (TOKENS, in or out) at most; the same for every weight. */
static void put_operands(void)
{
    size_t n = 2 * TOKENS * perta_llm_widest(&llm);
    struct pair noise = pair(n, 7);
    ck_assert_ok(be->ops->alloc(be, n * sizeof(float), &operands, &err));
    be->ops->put(be, (struct perta_array){operands, 0}, noise.f, n * sizeof(float));
    release(noise);
}

static void open_all(void)
{
    size_t starts[TOKENS / SAMPLE + 1];
    enter();
    open_backend();
    take_memory();
    put_operands();
    for (size_t i = 0; i <= TOKENS / SAMPLE; i++)
        starts[i] = i * SAMPLE;
    ck_assert_ok(perta_chunks_make(starts, TOKENS / SAMPLE, true, &chunks, &err));
}

static void close_all(void)
{
    perta_chunks_release(&chunks);
    perta_backend_close(be);
    perta_workers_close(workers);
    leave();
}

static void begin(bool single, uint64_t free_bytes)
{
    scratch = (struct perta_scratch){.be = be, .dir = scratch_dir, .free_bytes = free_bytes};
    sink = (struct perta_importance_sink){
        .sink = perta_importance_sink_functions,
        .llm = &llm,
        .statistic = &statistic,
        .all = {&chunks, TOKENS, single},
        .scratch = &scratch,
        .advance = go_on,
        .vectors = vectors,
        .staging = staging,
        .staging_floats = n_staging,
        .workers = workers,
    };
    perta_importance_sink_begin(&sink);
}

/* Tokens first .. first + n of a weight's operands. */
static void hand_over(enum perta_param param, size_t first, size_t n)
{
    const struct perta_batch batch = {.n = n, .first = first};
    struct perta_array x = {operands, 0};
    size_t out, in;
    perta_llm_shape(&llm, perta_llm_param(&llm, 0, param), &out, &in);
    struct perta_array dy = perta_array_at(x, TOKENS * perta_llm_widest(&llm));
    ck_assert_ok(sink.sink.linear(&sink.sink, perta_site_of(0), param, &batch,
                                  perta_array_at(x, first * in), perta_array_at(dy, first * out),
                                  &err));
}

/* Sums of the weight that was formed last: its last block of rows. */
static void take_sums(double *sums)
{
    be->ops->get(be, statistic.sums, sums, BLOCK_FLOATS * sizeof *sums);
    ck_assert_ok(perta_backend_wait(be, &err));
}

START_TEST(a_gradient_does_not_depend_on_where_its_operands_are_kept)
{
    static const enum perta_param order[] = {PERTA_DOWN, PERTA_GATE, PERTA_UP, PERTA_O,
                                             PERTA_Q,    PERTA_K,    PERTA_V};
    const size_t n_params = sizeof order / sizeof *order;
    double want[BLOCK_FLOATS], have[BLOCK_FLOATS];
    begin(true, 0);
    hand_over(PERTA_DOWN, 0, TOKENS);
    take_sums(want);
    /* From no memory to enough for all of them. */
    uint64_t step = be->ops->buffer_bytes(be, TOKENS * llm.hidden * sizeof(float));
    bool all_kept = false;
    for (uint64_t free_bytes = 0; !all_kept; free_bytes += step / 4) {
        begin(false, free_bytes);
        for (size_t first = 0; first < TOKENS; first += TOKENS / 2)
            for (size_t i = 0; i < n_params; i++)
                hand_over(order[i], first, TOKENS / 2);
        ck_assert_ok(perta_importance_sink_end(&sink, 0, &err));
        take_sums(have);
        ck_assert_msg(!memcmp(have, want, sizeof want), "%llu bytes of memory",
                      (unsigned long long)free_bytes);
        all_kept = !scratch.file_bytes;
        perta_importance_sink_release(&sink);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_all);
    tcase_add_test(tests, a_gradient_does_not_depend_on_where_its_operands_are_kept);
    return run_suite("importance_sink", tests);
}
