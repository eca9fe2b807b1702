/* The demo: trains small models, then estimates, unlearns, and asks the results. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "estimators/model/train.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "tools/demo.h"

#define SEED 22030
#define LEARNING_RATE 3e-3f

/* ---- arguments ---- */

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct demo *demo = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &demo->cli;
        return 0;
    case 'f':
        demo->cli.force = true;
        return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num)
            argp_error(state, "only one folder can be given");
        demo->dir = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option options[] = {
    {"force", 'f', NULL, 0, "Replace what an earlier demo left in DIR", 1}, {0}};
static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "[DIR]",
    "Train a small model that knows made-up people, make it forget some of these people with that "
    "model and two files of facts alone, and ask the result what it still knows. Then do the same "
    "by methods that need a tuned model and its base: three in one edit, and two in steps. "
    "Everything stays in DIR (default perta-demo).\vExample:\n  perta demo /tmp/demo",
    children,
    NULL,
    NULL};

/* ---- paths ---- */

char *demo_path(const struct demo *demo, const char *fmt, ...)
{
    char name[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name, sizeof name, fmt, ap);
    va_end(ap);
    return perta_path_join(demo->dir, name);
}

int demo_no_memory(struct perta_err *err)
{
    return perta_fail_sys(err, ENOMEM, "demo");
}

static int make_folders(const struct demo *demo, struct perta_err *err)
{
    char *data = demo_path(demo, "data");
    int rc = data ? 0 : demo_no_memory(err);
    if (!rc && mkdir(demo->dir, 0777) && errno != EEXIST)
        rc = perta_fail_sys(err, errno, "%s", demo->dir);
    if (!rc && mkdir(data, 0777) && (errno != EEXIST || !demo->cli.force))
        rc = errno == EEXIST
                 ? perta_fail(err, PERTA_EUSAGE, "%s exists; give another folder, or --force", data)
                 : perta_fail_sys(err, errno, "%s", data);
    free(data);
    return rc;
}

/* ---- data ---- */

static int write_part(const struct demo *demo, const char *name, enum demo_part from,
                      enum demo_part to, struct perta_err *err)
{
    char *path = demo_path(demo, "data/%s.jsonl", name);
    int rc = path ? demo_facts_write(&demo->facts, from, to, path, err) : demo_no_memory(err);
    free(path);
    return rc;
}

static int read_part(const struct demo *demo, const char *name, struct perta_samples *samples,
                     struct perta_err *err)
{
    const struct perta_samples_wanted wanted = {.vocab = (uint32_t)demo->facts.n_words};
    char *path = demo_path(demo, "data/%s.jsonl", name);
    int rc = path ? perta_samples_read(path, &wanted, samples, err) : demo_no_memory(err);
    free(path);
    return rc;
}

static int make_data(struct demo *demo, struct perta_err *err)
{
    int rc = demo_facts_make(SEED, &demo->facts, err);
    if (!rc)
        rc = write_part(demo, "general", DEMO_GENERAL, DEMO_FORGET, err);
    if (!rc)
        rc = write_part(demo, "forget", DEMO_FORGET, DEMO_RETAIN, err);
    if (!rc)
        rc = write_part(demo, "retain", DEMO_RETAIN, DEMO_HELD_OUT, err);
    if (!rc)
        rc = write_part(demo, "held-out", DEMO_HELD_OUT, DEMO_N_PARTS, err);
    if (!rc)
        rc = write_part(demo, "full", DEMO_FORGET, DEMO_N_PARTS, err);
    static const char *const names[DEMO_N_ASKED] = {"forget", "retain", "held-out"};
    for (int i = 0; i < DEMO_N_ASKED && !rc; i++)
        rc = read_part(demo, names[i], &demo->asked[i], err);
    return rc;
}

/* ---- the models ---- */

static int new_model(struct demo *demo, struct perta_model *model, struct perta_err *err)
{
    struct perta_llm llm;
    json_t *config = json_pack(
        "{s:[s], s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:i, "
        "s:i, s:i, "
        "s:i}",
        "architectures", "LlamaForCausalLM", "model_type", "llama", "torch_dtype", "bfloat16",
        "hidden_act", "silu", "vocab_size", (int)demo->facts.n_words, "hidden_size", 128,
        "intermediate_size", 256, "num_hidden_layers", 2, "num_attention_heads", 4,
        "num_key_value_heads", 2, "head_dim", 32, "rms_norm_eps", 1e-6, "rope_theta", 10000.0,
        "tie_word_embeddings", 0, "max_position_embeddings", 64, "pad_token_id", DEMO_PAD,
        "bos_token_id", DEMO_BEGIN, "eos_token_id", DEMO_END);
    demo->config = config ? perta_json_text(config, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    demo->tokenizer = demo_facts_tokenizer(&demo->facts);
    int rc = demo->config && demo->tokenizer ? 0 : demo_no_memory(err);
    if (!rc)
        rc = perta_llm_parse(config, "config.json", &llm, err);
    json_decref(config);
    return rc ? rc : perta_model_new(&llm, SEED, model, err);
}

static int save(const struct demo *demo, struct perta_model *model, const char *name,
                struct perta_err *err)
{
    const struct perta_model_file files[] = {
        {"config.json", demo->config},
        {"tokenizer.json", demo->tokenizer},
        {"tokenizer_config.json",
         "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"bos_token\": \"<s>\", "
         "\"eos_token\": \"</s>\", \"unk_token\": \"<unk>\", \"pad_token\": \"<pad>\"}\n"},
    };
    char *path = demo_path(demo, "%s", name);
    int rc =
        path ? perta_model_save(model, path, files, 3, demo->cli.force, err) : demo_no_memory(err);
    free(path);
    return rc;
}

/* The learning rate rises over the first tenth of the steps, then falls to zero along a cosine. */
static float rate_at(unsigned step, unsigned n_steps)
{
    const float pi = 3.14159265f;
    float warm = 0.1f * (float)n_steps, at = (float)step + 0.5f;
    if (at < warm)
        return LEARNING_RATE * at / warm;
    return LEARNING_RATE * 0.5f * (1 + cosf(pi * (at - warm) / ((float)n_steps - warm)));
}

static void shuffle(uint32_t *order, uint32_t n, uint64_t seed, uint64_t *drawn)
{
    for (uint32_t i = n; i-- > 1;) {
        uint64_t at = (*drawn)++;
        uint32_t j = (uint32_t)(XXH3_64bits_withSeed(&at, sizeof at, seed) % (i + 1));
        uint32_t kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

static int train(const struct demo *demo, struct perta_model *model,
                 const struct perta_samples *samples, unsigned n_steps, uint64_t seed,
                 struct perta_err *err)
{
    struct perta_trainer trainer = {0};
    uint32_t n = (uint32_t)samples->n, at = n, *order = calloc(n, sizeof *order);
    uint64_t drawn = 0;
    double loss;
    int rc = order ? perta_trainer_open(&trainer, model, samples, DEMO_BATCH,
                                        perta_run_threads(&demo->cli.run), err)
                   : demo_no_memory(err);
    for (uint32_t i = 0; i < n && order; i++)
        order[i] = i;
    for (unsigned step = 0; step < n_steps && !rc; step++) {
        if (at == n) {
            shuffle(order, n, seed, &drawn);
            at = 0;
        }
        uint32_t size = n - at < DEMO_BATCH ? n - at : DEMO_BATCH;
        rc = perta_trainer_gradients(&trainer, samples, order + at, size, &loss, err);
        if (!rc)
            rc = perta_trainer_step(&trainer, rate_at(step, n_steps), 0, err);
        at += size;
        if (*demo->cli.run.cancel)
            rc = perta_fail(err, PERTA_EINTR, "interrupted");
    }
    perta_trainer_close(&trainer);
    free(order);
    return rc;
}

/* Train the model on data/DATA.jsonl, and save it as name. */
static int teach(struct demo *demo, struct perta_model *model, const char *name, const char *data,
                 unsigned n_steps, uint64_t seed, struct perta_err *err)
{
    struct perta_samples samples = {0};
    double start = cli_seconds(&demo->cli);
    int rc = read_part(demo, data, &samples, err);
    if (!rc)
        rc = train(demo, model, &samples, n_steps, seed, err);
    if (!rc)
        rc = save(demo, model, name, err);
    if (!rc)
        cli_say(&demo->cli, "  %-6s %u steps of AdamW on %llu facts (data/%s.jsonl), %.1f s\n",
                name, n_steps, (unsigned long long)samples.n, data,
                cli_seconds(&demo->cli) - start);
    perta_samples_release(&samples);
    return rc;
}

/* The base model, and from it the model to unlearn from. */
static int make_models(struct demo *demo, struct perta_err *err)
{
    struct perta_model model = {0};
    int rc = new_model(demo, &model, err);
    if (!rc) {
        cli_say(&demo->cli, "Two Llamas of %zu parameters in %s/\n", model.n_floats, demo->dir);
        rc = teach(demo, &model, "base", "general", 240, SEED, err);
    }
    if (!rc)
        rc = teach(demo, &model, "full", "full", 540, SEED + 1, err);
    perta_model_release(&model);
    return rc;
}

/* From the base model: tuned on what is to be forgotten alone. */
static int make_tuned(struct demo *demo, struct perta_err *err)
{
    struct perta_model model = {0};
    char *base = demo_path(demo, "base");
    int rc = base ? perta_model_load(base, &model, err) : demo_no_memory(err);
    if (!rc)
        rc = teach(demo, &model, "tuned", "forget", 100, SEED + 2, err);
    perta_model_release(&model);
    free(base);
    return rc;
}

/* ---- the two parts ---- */

/* With the model and two files alone. */
static int forget(struct demo *demo, struct perta_err *err)
{
    cli_say(&demo->cli,
            "\nForget with full and two files of facts, and nothing else: steps whose direction\n"
            "comes from the model's own gradients, and that hold what is forgotten while giving\n"
            "back what the retain set needs\n");
    int rc = demo_unlearn(demo, DEMO_OWN_GRADIENT, err);
    if (!rc)
        rc = demo_ask_full(demo, err);
    if (!rc)
        rc = demo_ask(demo, DEMO_OWN_GRADIENT, err);
    if (!rc)
        demo_say_own(demo);
    return rc;
}

/* With two more models. */
static int compare(struct demo *demo, struct perta_err *err)
{
    cli_say(&demo->cli,
            "\nBeside it, methods that need two more models: base, and one tuned from it\n");
    int rc = make_tuned(demo, err);
    if (!rc)
        cli_say(&demo->cli,
                "\nThe importance of every parameter for forgetting and for retaining\n");
    if (!rc)
        rc = demo_estimate(demo, "forget", err);
    if (!rc)
        rc = demo_estimate(demo, "retain", err);
    if (!rc)
        cli_say(
            &demo->cli,
            "\nUnlearn: the task vector as it is (tv), with weights (grad, fisher), and in steps\n"
            "that recompute gradients: until the last (signed-backoff), or holding what is\n"
            "forgotten as above, but along the task vector (signed-hold)\n");
    for (int m = DEMO_OWN_GRADIENT + 1; m < DEMO_N_METHODS && !rc; m++)
        rc = demo_unlearn(demo, m, err);
    for (int m = DEMO_OWN_GRADIENT + 1; m < DEMO_N_METHODS && !rc; m++)
        rc = demo_ask(demo, m, err);
    if (!rc)
        demo_say_all(demo);
    return rc;
}

static int run(struct demo *demo, struct perta_err *err)
{
    int rc = make_folders(demo, err);
    if (!rc)
        rc = make_data(demo, err);
    if (!rc)
        rc = make_models(demo, err);
    if (!rc)
        rc = forget(demo, err);
    return rc ? rc : compare(demo, err);
}

/* A job of the demo's can be resumed, but not the demo: keep the error, without that advice, which
 * precedes it. */
static void drop_advice(struct perta_err *err)
{
    bool advised = err->resumable && err->code != PERTA_EUSAGE;
    const char *own = advised ? strstr(err->msg, ": ") : NULL;
    if (own)
        memmove(err->msg, own + 2, strlen(own + 2) + 1);
    err->resumable = false;
}

int cmd_demo(int argc, char **argv)
{
    struct demo demo = {.dir = "perta-demo"};
    struct perta_err err = {0};
    cli_parse(&demo.cli, &argp, argc, argv, &demo);
    int rc = run(&demo, &err);
    if (!rc)
        cli_json(&demo.cli, demo_summary(&demo));
    else
        drop_advice(&err);
    for (int i = 0; i < DEMO_N_ASKED; i++)
        perta_samples_release(&demo.asked[i]);
    demo_facts_release(&demo.facts);
    free(demo.tokenizer);
    free(demo.config);
    return cli_status(&demo.cli, rc, &err);
}
