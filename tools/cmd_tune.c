#include <stdlib.h>
#include <string.h>

#include "estimators/passes/tune.h"
#include "tools/cli.h"

enum {
    KEY_MODEL = CLI_KEY_OWN,
    KEY_DATA,
    KEY_OUT,
    KEY_ADAPTER,
    KEY_QUANTIZE,
    KEY_PATCH,
    KEY_RANK,
    KEY_LORA_ALPHA,
    KEY_TARGET_MODULES,
    KEY_LEARNING_RATE,
    KEY_LR_SCHEDULER,
    KEY_WARMUP,
    KEY_EPOCHS,
    KEY_STEPS,
    KEY_BATCH_SIZE,
    KEY_WEIGHT_DECAY,
    KEY_MAX_GRAD_NORM,
    KEY_SEED,
    KEY_DATA_KEY,
    KEY_MAX_TOKENS,
    KEY_COMPUTE,
    KEY_SCRATCH,
};

struct args {
    struct cli cli; /* must be first: it is the input of the child parsers */
    struct perta_tune tune;
    const char **targets; /* (tune.n_targets), in names */
    char *names;
};

static const struct argp_option options[] = {
    {"model", KEY_MODEL, "DIR", 0, "The model (perta help families)", 1},
    {"quantize", KEY_QUANTIZE, CLI_ROUNDINGS, 0,
     "Round the layers' frozen weights to this format and back while they are read, as QLoRA does",
     1},
    {"data", KEY_DATA, "FILE", 0, "The samples: JSON lines with \"input_ids\" and \"labels\"", 1},
    {"out", KEY_OUT, "DIR", 0, "Write the adapter to DIR, as PEFT does", 1},
    {"patch", KEY_PATCH, "DIR", 0,
     "Train on the model that this patch leads to; it is applied while the model is read", 1},
    {"adapter", KEY_ADAPTER, "DIR", 0, "Start with this PEFT LoRA adapter instead of a new one", 1},
    {"rank", KEY_RANK, "R", 0, "Rank of the adapter (default 8)", 2},
    {"lora-alpha", KEY_LORA_ALPHA, "A", 0, "Its scaling is A / R (default 8)", 2},
    {"target-modules", KEY_TARGET_MODULES, "NAME,...", 0,
     "The linear modules that it changes, or all-linear (default q_proj,v_proj)", 2},
    {"learning-rate", KEY_LEARNING_RATE, "L", 0, "The highest learning rate (default 5e-5)", 3},
    {"lr-scheduler", KEY_LR_SCHEDULER, "linear|cosine|constant", 0,
     "How it falls to 0 over the run (default linear)", 3},
    {"warmup", KEY_WARMUP, "N", 0,
     "It grows from 0 in the first N updates, or in this share of all, if N is below 1 (default 0)",
     3},
    {"epochs", KEY_EPOCHS, "N", 0, "How often all samples are seen (default 3)", 3},
    {"steps", KEY_STEPS, "N", 0, "Number of updates, instead of --epochs", 3},
    {"batch-size", KEY_BATCH_SIZE, "N", 0, "Samples of an update (default 8)", 3},
    {"weight-decay", KEY_WEIGHT_DECAY, "W", 0, "Of AdamW (default 0)", 3},
    {"max-grad-norm", KEY_MAX_GRAD_NORM, "G", 0,
     "Clip gradients to this norm (default 1; 0: do not)", 3},
    {"seed", KEY_SEED, "S", 0, "Of the new adapter and of the order of samples (default 42)", 3},
    {"data-key", KEY_DATA_KEY, "FILE", 0,
     "A file with a secret key of at least 16 bytes: record the HMAC-SHA-256 of --data in the "
     "adapter",
     4},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "Refuse samples of more than N tokens", 4},
    {"compute", KEY_COMPUTE, "auto|f32|bf16", 0,
     "Products with the model's weights in bfloat16 with float32 sums, or in float32 (auto: bf16 "
     "if the CPU supports it); those with the adapter are in float32",
     4},
    {"scratch", KEY_SCRATCH, "DIR", 0,
     "Folder for data that does not fit in memory (default: beside --out)", 4},
    {0}};

static void parse_targets(struct args *args, const char *text)
{
    char *rest = strdup(text), *name;
    size_t most = 1;
    for (const char *c = text; *c; c++)
        most += *c == ',';
    free(args->names);
    free(args->targets);
    args->names = rest;
    args->targets = calloc(most, sizeof *args->targets);
    if (!args->names || !args->targets)
        abort();
    for (size_t i = 0; i < most && (name = strsep(&rest, ",")); i++)
        args->targets[i] = name;
    args->tune.n_targets = most;
    args->tune.targets = args->targets;
}

/* 0 means the default in the library. */
static uint64_t count_from_1(struct argp_state *state, const char *option, const char *text)
{
    uint64_t n = cli_count(state, option, text);
    if (!n)
        argp_error(state, "%s: must be at least 1", option);
    return n;
}

static error_t parse_training(int key, char *arg, struct argp_state *state, struct perta_tune *t)
{
    static const char *const schedulers[] = {"linear", "cosine", "constant", NULL};
    switch (key) {
    case KEY_LEARNING_RATE:
        t->learning_rate = cli_number(state, "--learning-rate", arg);
        return 0;
    case KEY_LR_SCHEDULER:
        t->scheduler =
            (enum perta_lr_scheduler)cli_choice(state, "--lr-scheduler", arg, schedulers);
        return 0;
    case KEY_WARMUP:
        t->warmup = cli_number(state, "--warmup", arg);
        return 0;
    case KEY_EPOCHS:
        t->epochs = count_from_1(state, "--epochs", arg);
        return 0;
    case KEY_STEPS:
        t->steps = count_from_1(state, "--steps", arg);
        return 0;
    case KEY_BATCH_SIZE:
        t->batch_size = count_from_1(state, "--batch-size", arg);
        return 0;
    case KEY_WEIGHT_DECAY:
        t->weight_decay = cli_number(state, "--weight-decay", arg);
        return 0;
    case KEY_MAX_GRAD_NORM:
        t->max_grad_norm = cli_number(state, "--max-grad-norm", arg);
        return 0;
    case KEY_SEED:
        t->seed = cli_count(state, "--seed", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    struct perta_tune *t = &args->tune;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_MODEL:
        t->model = arg;
        return 0;
    case KEY_DATA:
        t->data = arg;
        return 0;
    case KEY_OUT:
        t->out = arg;
        return 0;
    case KEY_PATCH:
        t->patch = arg;
        return 0;
    case KEY_ADAPTER:
        t->adapter = arg;
        return 0;
    case KEY_QUANTIZE:
        t->quantize = cli_rounding(state, arg);
        return 0;
    case KEY_RANK:
        t->rank = count_from_1(state, "--rank", arg);
        return 0;
    case KEY_LORA_ALPHA:
        t->lora_alpha = cli_number(state, "--lora-alpha", arg);
        if (t->lora_alpha == 0) /* 0 in the library means: the default */
            argp_error(state, "--lora-alpha: 0; nothing would change");
        return 0;
    case KEY_TARGET_MODULES:
        parse_targets(args, arg);
        return 0;
    case KEY_DATA_KEY:
        t->data_key = arg;
        return 0;
    case KEY_MAX_TOKENS:
        t->max_tokens = cli_count(state, "--max-tokens", arg);
        return 0;
    case KEY_COMPUTE:
        t->compute = cli_compute(state, arg);
        return 0;
    case KEY_SCRATCH:
        t->scratch = arg;
        return 0;
    default:
        return parse_training(key, arg, state, t);
    }
}

static const struct argp_child children[] = {
    {&cli_writing_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    NULL,
    "Train a LoRA adapter on text, with AdamW. The model's weights stay as they are; they are read "
    "block by block, forward and backward, for each update, and need not fit in memory."
    "\v"
    "The adapter is a folder that PEFT loads, and that `perta unlearn --tuned', `eval --adapter' "
    "and `estimate --adapter' take. Defaults are those of PEFT and of transformers' Trainer; "
    "docs/tune.md has the formulas. `perta tokenize' makes the data from text.\n\n"
    "Example:\n"
    "  perta tune --model base --data forget.jsonl --out adapter --learning-rate 1e-4 --memory 8G",
    children,
    NULL,
    NULL};

static void on_update(void *user, uint64_t number, uint64_t n_updates,
                      const struct perta_tune_update *update)
{
    cli_say(user, "update %llu of %llu: loss %.6f, gradient norm %.4g, learning rate %.4g\n",
            (unsigned long long)number, (unsigned long long)n_updates, update->loss,
            update->gradient_norm, update->learning_rate);
    fflush(stdout);
}

static double number(const json_t *summary, const char *key)
{
    return json_number_value(json_object_get(summary, key));
}

static void say(const struct cli *cli, const json_t *summary, double seconds)
{
    if (cli->run.dry_run)
        cli_say(cli, "dry run: all checks passed; nothing was written\n");
    cli_say(cli, "%.0f parameters beside %.0f modules, %.0f updates from %.0f samples\n",
            number(summary, "parameters"), number(summary, "modules"),
            number(json_object_get(summary, "recipe"), "updates"), number(summary, "samples"));
    if (!cli->run.dry_run)
        cli_say(cli, "%s: in %.1f s\n", json_string_value(json_object_get(summary, "folder")),
                seconds);
}

int cmd_tune(int argc, char **argv)
{
    struct args args = {.tune = {.learning_rate = 5e-5, .max_grad_norm = 1, .seed = 42}};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.tune.force = args.cli.force;
    args.tune.on_update = on_update;
    args.tune.on_update_user = &args.cli;
    int rc = perta_tune(&args.tune, &args.cli.run, &summary, &err);
    if (!rc) {
        double t = cli_seconds(&args.cli);
        cli_note_unknown_keys(&args.cli, summary);
        cli_notes(&args.cli, summary);
        say(&args.cli, summary, t);
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    }
    free(args.targets);
    free(args.names);
    return cli_status(&args.cli, rc, &err);
}
