#include "stream/patch/compose.h"

#include "tools/cli.h"

enum { KEY_PATCH = CLI_KEY_OWN, KEY_MODEL };

struct args {
    struct cli cli;
    struct perta_compose compose;
};

static const struct argp_option options[] = {
    {"patch", KEY_PATCH, "DIR", 0, "Write the combined patch here", 1},
    {"model", KEY_MODEL, "DIR", 0,
     "The model that the first patch was made from; needed if several patches change the same "
     "floats",
     1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_PATCH:
        args->compose.patch = arg;
        return 0;
    case KEY_MODEL:
        args->compose.model = arg;
        return 0;
    case ARGP_KEY_ARGS:
        args->compose.patches = (const char *const *)(state->argv + state->next);
        args->compose.n_patches = (uint32_t)(state->argc - state->next);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_child children[] = {
    {&cli_patching_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "PATCH PATCH...",
    "Combine patches made one after another into one, from the model before the first to the "
    "model after the last: the same patch as `perta diff' of these two. A patch that does not "
    "begin at the model where the one before it ends is refused (exit 1), and nothing is written."
    "\v"
    "The model is read only if several patches change the same chunk of 2^20 elements. --model "
    "can be left out if that happens in no BF16, F16, F32 or F64 tensor.\n\n"
    "Example:\n"
    "  perta compose monday.patch tuesday.patch --model full --patch both.patch",
    children,
    NULL,
    NULL};

static void say(const struct args *args, const json_t *summary, double t)
{
    const json_t *counts = json_object_get(summary, "counts");
    double n = json_number_value(json_object_get(counts, "parameters"));
    double bytes = json_number_value(json_object_get(summary, "patch_bytes"));
    char a[32], b[32];
    cli_say(&args->cli,
            "%u patches combined: %.0f of %.0f parameters differ\n"
            "chunks: %.0f changed by one patch, %.0f by several\n"
            "patch %s: %s, %.3f bits a parameter\nread %s in %.2f s\n",
            args->compose.n_patches, json_number_value(json_object_get(counts, "changed")), n,
            json_number_value(json_object_get(summary, "kept")),
            json_number_value(json_object_get(summary, "summed")), args->compose.patch,
            cli_bytes(bytes, a), n > 0 ? 8 * bytes / n : 0,
            cli_bytes(json_number_value(json_object_get(summary, "read_bytes")), b), t);
}

int cmd_compose(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.compose.force = args.cli.force;
    int rc = cli_statement_check(&args.cli, args.compose.patch, &err);
    if (!rc)
        rc = perta_compose(&args.compose, &args.cli.run, &summary, &err);
    if (!rc)
        rc = cli_statement(&args.cli, args.compose.patch, summary, &err);
    if (!rc) {
        double t = cli_seconds(&args.cli);
        if (args.cli.run.dry_run)
            cli_say(&args.cli, "dry run: the patches follow one another; nothing was written\n");
        else
            say(&args, summary, t);
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    } else {
        json_decref(summary);
    }
    return cli_status(&args.cli, rc, &err);
}
