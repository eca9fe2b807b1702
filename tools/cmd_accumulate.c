#include "estimators/passes/accumulate.h"
#include "tools/cli.h"

enum { KEY_OUT = CLI_KEY_OWN, KEY_STAT };

struct args {
    struct cli cli;
    struct perta_accumulate accumulate;
};

static const struct argp_option options[] = {
    {"out", KEY_OUT, "DIR", 0, "Write DIR/mean and DIR/meansq", 1},
    {"stat", KEY_STAT, "mean,meansq", 0,
     "Which statistics: mean gradient, mean squared gradient, or both (default mean)", 1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_OUT:
        args->accumulate.out = arg;
        return 0;
    case KEY_STAT:
        cli_stats(state, arg, &args->accumulate.mean, &args->accumulate.meansq);
        return 0;
    case ARGP_KEY_ARGS:
        args->accumulate.gradients = (const char *const *)(state->argv + state->next);
        args->accumulate.n_gradients = (uint32_t)(state->argc - state->next);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_child children[] = {
    {&cli_writing_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "GRADIENTS...",
    "Compute the mean, and the mean of squares, over gradient dumps: safetensors files or "
    "checkpoint folders, one for each sample or batch, which are read side by side."
    "\v"
    "Sums are float32 with compensation. The results are F32 folders, for --forget and --retain of "
    "`perta unlearn'.\n\n"
    "Example:\n"
    "  perta accumulate --out imp/forget --stat mean,meansq \\\n"
    "    grads/forget/*.safetensors",
    children,
    NULL,
    NULL};

int cmd_accumulate(int argc, char **argv)
{
    struct args args = {.accumulate = {.mean = true}};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.accumulate.force = args.cli.force;
    int rc = perta_accumulate(&args.accumulate, &args.cli.run, &summary, &err);
    if (!rc) {
        double t = cli_seconds(&args.cli);
        double read = json_number_value(json_object_get(summary, "read_bytes"));
        char a[32], b[32];
        size_t i;
        json_t *folder;
        if (args.cli.run.dry_run)
            cli_say(&args.cli, "dry run: all checks passed; nothing was written\n");
        json_array_foreach (json_object_get(summary, "folders"), i, folder)
            cli_say(&args.cli, "%s: over %u gradients\n", json_string_value(folder),
                    args.accumulate.n_gradients);
        if (!args.cli.run.dry_run)
            cli_say(&args.cli, "read %s in %.2f s (%s/s)\n", cli_bytes(read, a), t,
                    cli_bytes(read / t, b));
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}
