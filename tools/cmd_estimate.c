#include "estimators/passes/estimate.h"
#include "tools/cli.h"

enum {
    KEY_MODEL = CLI_KEY_OWN,
    KEY_ADAPTER,
    KEY_QUANTIZE,
    KEY_DATA,
    KEY_OUT,
    KEY_STAT,
    KEY_MAX_TOKENS,
    KEY_COMPUTE,
    KEY_SCRATCH,
    KEY_DATA_KEY,
};

struct args {
    struct cli cli; /* must be first: it is the input of the child parsers */
    struct perta_estimate estimate;
};

static const struct argp_option options[] = {
    {"model", KEY_MODEL, "DIR", 0, "The model (perta help families)", 1},
    {"adapter", KEY_ADAPTER, "DIR", 0,
     "Use the model with this PEFT LoRA adapter: the gradients are those of the model's own "
     "parameters",
     1},
    {"quantize", KEY_QUANTIZE, CLI_ROUNDINGS, 0,
     "Round the layers' weights to this format and back while they are read: the gradients are "
     "those at the rounded weights",
     1},
    {"data", KEY_DATA, "FILE", 0, "The samples: JSON lines with \"input_ids\" and \"labels\"", 1},
    {"out", KEY_OUT, "DIR", 0, "Write DIR/mean and DIR/meansq", 1},
    {"data-key", KEY_DATA_KEY, "FILE", 0,
     "A file with a secret key of at least 16 bytes: record the HMAC-SHA-256 of --data in the "
     "importance, and in patches made with it",
     2},
    {"stat", KEY_STAT, "mean,meansq", 0,
     "Which statistics over the samples: mean gradient, mean squared gradient, or both "
     "(default mean)",
     2},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "Refuse samples of more than N tokens", 2},
    {"compute", KEY_COMPUTE, "auto|f32|bf16", 0,
     "Matrix products in bfloat16 with float32 sums, or in float32 (auto: bf16 if the CPU "
     "supports it)",
     2},
    {"scratch", KEY_SCRATCH, "DIR", 0,
     "Folder for data that does not fit in memory (default: inside --out)", 2},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    struct perta_estimate *e = &args->estimate;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_MODEL:
        e->model = arg;
        return 0;
    case KEY_ADAPTER:
        e->adapter = arg;
        return 0;
    case KEY_QUANTIZE:
        e->quantize = cli_rounding(state, arg);
        return 0;
    case KEY_DATA:
        e->data = arg;
        return 0;
    case KEY_DATA_KEY:
        e->data_key = arg;
        return 0;
    case KEY_OUT:
        e->out = arg;
        return 0;
    case KEY_STAT:
        cli_stats(state, arg, &e->mean, &e->meansq);
        return 0;
    case KEY_MAX_TOKENS:
        e->max_tokens = cli_count(state, "--max-tokens", arg);
        return 0;
    case KEY_COMPUTE:
        e->compute = cli_compute(state, arg);
        return 0;
    case KEY_SCRATCH:
        e->scratch = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {
    {&cli_writing_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    NULL,
    "Compute importance from a model and text: the mean gradient of the loss over samples, and the "
    "mean of its squares. The model is read block by block and need not fit in memory."
    "\v"
    "The loss of a sample is the mean cross-entropy over its labels, as transformers computes "
    "it. `perta tokenize' makes the data from text.\n\n"
    "Example:\n"
    "  perta estimate --model base --data forget.jsonl --out imp/forget --memory 8G",
    children,
    NULL,
    NULL};

int cmd_estimate(int argc, char **argv)
{
    struct args args = {.estimate = {.mean = true}};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.estimate.force = args.cli.force;
    int rc = perta_estimate(&args.estimate, &args.cli.run, &summary, &err);
    if (!rc) {
        double t = cli_seconds(&args.cli);
        double tokens = json_number_value(json_object_get(summary, "tokens"));
        size_t i;
        json_t *folder;
        cli_note_unknown_keys(&args.cli, summary);
        cli_notes(&args.cli, summary);
        if (args.cli.run.dry_run)
            cli_say(&args.cli, "dry run: all checks passed; nothing was written\n");
        json_array_foreach (json_object_get(summary, "folders"), i, folder)
            cli_say(&args.cli, "%s: over %lld samples\n", json_string_value(folder),
                    (long long)json_integer_value(json_object_get(summary, "samples")));
        if (!args.cli.run.dry_run)
            cli_say(&args.cli, "loss %.6f over %.0f tokens, in %.1f s (%.0f tokens/s)\n",
                    json_number_value(json_object_get(summary, "loss")), tokens, t, tokens / t);
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}
