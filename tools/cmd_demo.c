/* The whole story on a model that is made here: train, estimate, unlearn, ask. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "estimators/backprop/train.h"
#include "estimators/estimate.h"
#include "estimators/unlearn.h"
#include "io/publish.h"
#include "tools/cli.h"
#include "tools/demo_facts.h"

#define SEED 22030
#define BATCH 128
#define LEARNING_RATE 3e-3f

static const char *const alphas[] = {"0.25", "0.5", "0.75", "1", "1.25", "1.5"};
enum { N_ALPHAS = sizeof alphas / sizeof *alphas, N_METHODS = 3, N_ASKED = 3 };

static const struct method {
    const char *name, *stat;
    enum perta_method method;
} methods[N_METHODS] = {
    {"tv", NULL, PERTA_TV}, {"grad", "mean", PERTA_GRAD}, {"fisher", "meansq", PERTA_FISHER}};

/* Share of answers that are right, and probability of the right one, by part: forget, retain,
 * held out. */
struct score {
    double right[N_ASKED], probability[N_ASKED];
};

struct demo {
    struct cli cli; /* first: the children's input */
    const char *dir;
    struct demo_facts facts;
    char *tokenizer, *config;
    struct perta_samples asked[N_ASKED];
    struct score full, unlearned[N_METHODS][N_ALPHAS];
};

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
            argp_error(state, "one folder is enough");
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
    options, parse, "[DIR]",
    "Train a small model that knows made-up people, make it forget some of them by three methods, "
    "and ask it what it still knows. Everything stays in DIR (default perta-demo)."
    "\v"
    "Example:\n"
    "  perta demo /tmp/demo",
    children, NULL, NULL};

/* ---- paths ---- */

/* DIR/..., the caller's to free; NULL only without memory. */
__attribute__((format(printf, 2, 3))) static char *path_of(const struct demo *demo,
                                                            const char *fmt, ...)
{
    char name[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name, sizeof name, fmt, ap);
    va_end(ap);
    return perta_path_join(demo->dir, name);
}

static int no_memory(struct perta_err *err)
{
    return perta_fail_sys(err, ENOMEM, "demo");
}

static int make_folders(const struct demo *demo, struct perta_err *err)
{
    char *data = path_of(demo, "data");
    int rc = data ? 0 : no_memory(err);
    if (!rc && mkdir(demo->dir, 0777) && errno != EEXIST)
        rc = perta_fail_sys(err, errno, "%s", demo->dir);
    if (!rc && mkdir(data, 0777) && (errno != EEXIST || !demo->cli.force))
        rc = errno == EEXIST ? perta_fail(err, PERTA_EUSAGE,
                                          "%s is there already; give another folder, or --force",
                                          data)
                             : perta_fail_sys(err, errno, "%s", data);
    free(data);
    return rc;
}

/* ---- data ---- */

static int write_part(const struct demo *demo, const char *name, enum demo_part from,
                      enum demo_part to, struct perta_err *err)
{
    char *path = path_of(demo, "data/%s.jsonl", name);
    int rc = path ? demo_facts_write(&demo->facts, from, to, path, err) : no_memory(err);
    free(path);
    return rc;
}

static int read_part(const struct demo *demo, const char *name, struct perta_samples *samples,
                     struct perta_err *err)
{
    const struct perta_samples_wanted wanted = {.vocab = (uint32_t)demo->facts.n_words};
    char *path = path_of(demo, "data/%s.jsonl", name);
    int rc = path ? perta_samples_read(path, &wanted, samples, err) : no_memory(err);
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
    static const char *const names[N_ASKED] = {"forget", "retain", "held-out"};
    for (int i = 0; i < N_ASKED && !rc; i++)
        rc = read_part(demo, names[i], &demo->asked[i], err);
    return rc;
}

/* ---- the models ---- */

static int new_model(struct demo *demo, struct perta_model *model, struct perta_err *err)
{
    struct perta_llm llm;
    json_t *config = json_pack(
        "{s:[s], s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:i, s:i, s:i, "
        "s:i}",
        "architectures", "LlamaForCausalLM", "model_type", "llama", "torch_dtype", "bfloat16",
        "hidden_act", "silu", "vocab_size", (int)demo->facts.n_words, "hidden_size", 128,
        "intermediate_size", 256, "num_hidden_layers", 2, "num_attention_heads", 4,
        "num_key_value_heads", 2, "head_dim", 32, "rms_norm_eps", 1e-6, "rope_theta", 10000.0,
        "tie_word_embeddings", 0, "max_position_embeddings", 64, "pad_token_id", DEMO_PAD,
        "bos_token_id", DEMO_BEGIN, "eos_token_id", DEMO_END);
    demo->config = config ? json_dumps(config, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    demo->tokenizer = demo_facts_tokenizer(&demo->facts);
    int rc = demo->config && demo->tokenizer ? 0 : no_memory(err);
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
    char *path = path_of(demo, "%s", name);
    int rc = path ? perta_model_save(model, path, files, 3, demo->cli.force, err) : no_memory(err);
    free(path);
    return rc;
}

/* Up over a tenth of the steps, then down to nothing along a cosine. */
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
    int rc = order ? perta_trainer_open(&trainer, model, samples, BATCH,
                                        perta_run_threads(&demo->cli.run), err)
                   : no_memory(err);
    for (uint32_t i = 0; i < n && order; i++)
        order[i] = i;
    for (unsigned step = 0; step < n_steps && !rc; step++) {
        if (at == n) {
            shuffle(order, n, seed, &drawn);
            at = 0;
        }
        uint32_t size = n - at < BATCH ? n - at : BATCH;
        rc = perta_trainer_gradients(&trainer, samples, order + at, size, &loss, err);
        perta_trainer_step(&trainer, rate_at(step, n_steps), 0);
        at += size;
        if (*demo->cli.run.cancel)
            rc = perta_fail(err, PERTA_EINTR, "interrupted");
    }
    perta_trainer_close(&trainer);
    free(order);
    return rc;
}

/* Train the model on data/DATA.jsonl and save it under its name. */
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

static int make_models(struct demo *demo, struct perta_err *err)
{
    struct perta_model model = {0};
    int rc = new_model(demo, &model, err);
    if (!rc) {
        cli_say(&demo->cli, "Three Llamas of %zu parameters in %s/\n", model.n_floats, demo->dir);
        rc = teach(demo, &model, "base", "general", 300, SEED, err);
    }
    float *base = rc ? NULL : malloc(model.n_floats * sizeof *base);
    if (!rc && !base)
        rc = no_memory(err);
    if (!rc) {
        memcpy(base, model.weights, model.n_floats * sizeof *base);
        rc = teach(demo, &model, "full", "full", 600, SEED + 1, err);
    }
    if (!rc) {
        memcpy(model.weights, base, model.n_floats * sizeof *base);
        rc = teach(demo, &model, "tuned", "forget", 100, SEED + 2, err);
    }
    free(base);
    perta_model_release(&model);
    return rc;
}

/* ---- estimate, unlearn ---- */

static struct perta_run quiet_run(const struct demo *demo)
{
    struct perta_run run = demo->cli.run;
    run.progress = NULL; /* each step is short */
    return run;
}

static int estimate(const struct demo *demo, const char *set, struct perta_err *err)
{
    char *model = path_of(demo, "base"), *data = path_of(demo, "data/%s.jsonl", set);
    char *out = path_of(demo, "importance/%s", set);
    const struct perta_estimate job = {.model = model, .data = data, .out = out, .mean = true,
                                       .meansq = true, .force = demo->cli.force};
    const struct perta_run run = quiet_run(demo);
    json_t *summary = NULL;
    int rc = model && data && out ? perta_estimate(&job, &run, &summary, err) : no_memory(err);
    if (!rc)
        cli_say(&demo->cli,
                "$ perta estimate --model base --data data/%s.jsonl --stat mean,meansq --out "
                "importance/%s\n",
                set, set);
    json_decref(summary);
    free(model);
    free(data);
    free(out);
    return rc;
}

static int unlearn(const struct demo *demo, const struct method *method, struct perta_err *err)
{
    char *paths[7] = {path_of(demo, "full"),
                      path_of(demo, "tuned"),
                      path_of(demo, "base"),
                      path_of(demo, "patches/%s", method->name),
                      path_of(demo, "models/%s", method->name),
                      path_of(demo, "importance/forget/%s", method->stat ? method->stat : ""),
                      path_of(demo, "importance/retain/%s", method->stat ? method->stat : "")};
    struct perta_unlearn job = {.model = paths[0], .tuned = paths[1], .base = paths[2],
                                .patch = paths[3], .out = paths[4],
                                .forget = method->stat ? paths[5] : NULL,
                                .retain = method->stat ? paths[6] : NULL,
                                .rule.method = method->method, .n_alphas = N_ALPHAS,
                                .force = demo->cli.force};
    for (int a = 0; a < N_ALPHAS; a++)
        job.alphas[a] = (struct perta_alpha){strtof(alphas[a], NULL), alphas[a]};
    const struct perta_run run = quiet_run(demo);
    json_t *summary = NULL;
    int rc = 0;
    for (int i = 0; i < 7; i++)
        rc = paths[i] ? rc : no_memory(err);
    if (!rc)
        rc = perta_unlearn(&job, &run, &summary, err);
    json_decref(summary);
    for (int i = 0; i < 7; i++)
        free(paths[i]);
    return rc;
}

static void say_unlearn(const struct demo *demo, const struct method *method)
{
    cli_say(&demo->cli, "$ perta unlearn --model full --tuned tuned --base base --method %s",
            method->name);
    if (method->stat)
        cli_say(&demo->cli, " \\\n    --forget importance/forget/%s --retain importance/retain/%s",
                method->stat, method->stat);
    cli_say(&demo->cli, " \\\n    --alpha ");
    for (int a = 0; a < N_ALPHAS; a++)
        cli_say(&demo->cli, "%s%s", a ? "," : "", alphas[a]);
    cli_say(&demo->cli, " --patch patches/%s --out models/%s\n", method->name, method->name);
}

/* ---- ask ---- */

static size_t argmax(const float *x, size_t n)
{
    size_t most = 0;
    for (size_t i = 1; i < n; i++)
        most = x[i] > x[most] ? i : most;
    return most;
}

static double softmax_at(const float *x, size_t n, size_t at)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)x[i] - (double)x[at]);
    return 1 / sum;
}

/* An answer is right when greedy writing gives exactly it and then the end: both of a sample's
 * labels are then the likeliest after the right text before them. */
static int ask_part(struct perta_trainer *trainer, const struct perta_samples *samples,
                    double *right, double *probability, struct perta_err *err)
{
    size_t V = trainer->model->llm.vocab, n_labels;
    uint32_t which[BATCH];
    int rc = 0;
    *right = *probability = 0;
    for (uint32_t at = 0; at < samples->n && !rc; at += BATCH) {
        uint32_t n = (uint32_t)samples->n - at < BATCH ? (uint32_t)samples->n - at : BATCH;
        for (uint32_t i = 0; i < n; i++)
            which[i] = at + i;
        rc = perta_trainer_forward(trainer, samples, which, n, &n_labels, err);
        for (uint32_t i = 0; i < n && !rc; i++) {
            const float *answer = trainer->logits + 2 * i * V, *end = answer + V;
            size_t target = (size_t)trainer->target[2 * i];
            *right += argmax(answer, V) == target && argmax(end, V) == DEMO_END;
            *probability += softmax_at(answer, V, target);
        }
    }
    *right /= (double)samples->n;
    *probability /= (double)samples->n;
    return rc;
}

static int ask(const struct demo *demo, const char *path, struct score *score,
               struct perta_err *err)
{
    struct perta_model model;
    int rc = path ? perta_model_load(path, &model, err) : no_memory(err);
    if (rc)
        return rc;
    for (int i = 0; i < N_ASKED && !rc; i++) {
        struct perta_trainer trainer;
        rc = perta_trainer_open(&trainer, &model, &demo->asked[i], BATCH,
                                perta_run_threads(&demo->cli.run), err);
        if (!rc) {
            rc = ask_part(&trainer, &demo->asked[i], &score->right[i], &score->probability[i], err);
            perta_trainer_close(&trainer);
        }
    }
    perta_model_release(&model);
    return rc;
}

static int ask_all(struct demo *demo, struct perta_err *err)
{
    char *path = path_of(demo, "full");
    int rc = ask(demo, path, &demo->full, err);
    free(path);
    for (int m = 0; m < N_METHODS; m++)
        for (int a = 0; a < N_ALPHAS && !rc; a++) {
            path = path_of(demo, "models/%s/alpha-%s", methods[m].name, alphas[a]);
            rc = ask(demo, path, &demo->unlearned[m][a], err);
            free(path);
        }
    return rc;
}

/* ---- the table ---- */

static void say_row(const struct demo *demo, const char *name, const struct score *s)
{
    cli_say(&demo->cli, "%-26s", name);
    for (int i = 0; i < N_ASKED; i++)
        cli_say(&demo->cli, "  %6.1f%%  %6.3f ", 100 * s->right[i], s->probability[i]);
    cli_say(&demo->cli, "\n");
}

static json_t *score_json(const char *method, const char *alpha, const struct score *s)
{
    return json_pack("{s:s, s:s, s:[f,f,f], s:[f,f,f]}", "method", method, "alpha", alpha, "right",
                     s->right[0], s->right[1], s->right[2], "probability", s->probability[0],
                     s->probability[1], s->probability[2]);
}

static void say_table(const struct demo *demo)
{
    const struct cli *cli = &demo->cli;
    cli_say(cli, "\n%26s  facts to forget    facts to retain    held-out retain\n", "");
    cli_say(cli, "%-26s    right   prob.     right   prob.     right   prob.\n", "model");
    say_row(demo, "full", &demo->full);
    for (int m = 0; m < N_METHODS; m++)
        for (int a = 0; a < N_ALPHAS; a++) {
            char name[64];
            snprintf(name, sizeof name, "models/%s/alpha-%s", methods[m].name, alphas[a]);
            say_row(demo, name, &demo->unlearned[m][a]);
        }
}

/* What is left of the rest when half of what is to be forgotten is gone: between the two alphas
 * around it, by a straight line. False: it never comes to that. */
static bool at_half(const struct demo *demo, int m, double *retain, double *held_out)
{
    const struct score *before = &demo->full;
    for (int a = 0; a < N_ALPHAS; a++) {
        const struct score *after = &demo->unlearned[m][a];
        if (before->right[0] > 0.5 && after->right[0] <= 0.5) {
            double t = (before->right[0] - 0.5) / (before->right[0] - after->right[0]);
            *retain = before->right[1] + t * (after->right[1] - before->right[1]);
            *held_out = before->right[2] + t * (after->right[2] - before->right[2]);
            return true;
        }
        before = after;
    }
    return false;
}

static void say_verdict(const struct demo *demo)
{
    const struct cli *cli = &demo->cli;
    cli_say(cli, "\nWhen the model has lost half of the facts to forget, it still answers:\n");
    for (int m = 0; m < N_METHODS; m++) {
        double retain, held_out;
        if (at_half(demo, m, &retain, &held_out))
            cli_say(cli, "  %-6s %5.1f%% of those to retain, %5.1f%% of those held out\n",
                    methods[m].name, 100 * retain, 100 * held_out);
        else
            cli_say(cli, "  %-6s (never lost half)\n", methods[m].name);
    }
    cli_say(cli,
            "\nIn %s/: base, full, tuned (models; transformers loads them), data, importance,\n"
            "patches (perta verify, apply, revert), models (unlearned). It took %.0f s.\n",
            demo->dir, cli_seconds(cli));
}

static json_t *summary_of(const struct demo *demo)
{
    json_t *scores = json_array();
    json_array_append_new(scores, score_json("full", "0", &demo->full));
    for (int m = 0; m < N_METHODS; m++)
        for (int a = 0; a < N_ALPHAS; a++)
            json_array_append_new(
                scores, score_json(methods[m].name, alphas[a], &demo->unlearned[m][a]));
    return json_pack("{s:s, s:[s,s,s], s:o, s:f}", "folder", demo->dir, "parts", "forget",
                     "retain", "held-out", "scores", scores, "seconds", cli_seconds(&demo->cli));
}

static int run(struct demo *demo, struct perta_err *err)
{
    int rc = make_folders(demo, err);
    if (!rc)
        rc = make_data(demo, err);
    if (!rc)
        rc = make_models(demo, err);
    if (!rc)
        cli_say(&demo->cli, "\nEvery parameter's importance for forgetting, and for retaining\n");
    if (!rc)
        rc = estimate(demo, "forget", err);
    if (!rc)
        rc = estimate(demo, "retain", err);
    if (!rc)
        cli_say(&demo->cli, "\nUnlearn: the task vector as it is (tv), and weighed (grad, fisher)\n");
    for (int m = 0; m < N_METHODS && !rc; m++) {
        rc = unlearn(demo, &methods[m], err);
        if (!rc)
            say_unlearn(demo, &methods[m]);
    }
    return rc ? rc : ask_all(demo, err);
}

int cmd_demo(int argc, char **argv)
{
    struct demo demo = {.dir = "perta-demo"};
    struct perta_err err = {0};
    cli_parse(&demo.cli, &argp, argc, argv, &demo);
    int rc = run(&demo, &err);
    if (!rc) {
        say_table(&demo);
        say_verdict(&demo);
        cli_json(&demo.cli, summary_of(&demo));
    }
    for (int i = 0; i < N_ASKED; i++)
        perta_samples_release(&demo.asked[i]);
    demo_facts_release(&demo.facts);
    free(demo.tokenizer);
    free(demo.config);
    return cli_status(&demo.cli, rc, &err);
}
