#include "stream/patch/diff.h"

#include "tools/cli.h"

enum { KEY_PATCH = CLI_KEY_OWN, KEY_ONE_WAY };

struct args {
    struct cli cli;
    struct perta_diff diff;
};

static const struct argp_option options[] = {
    {"patch", KEY_PATCH, "DIR", 0, "Write the patch here", 1},
    {"one-way", KEY_ONE_WAY, NULL, 0,
     "Write a patch of new values only, for publishing: it reveals nothing about the old "
     "values and cannot be reverted",
     1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_ONE_WAY:
        args->diff.one_way = true;
        return 0;
    case KEY_PATCH:
        args->diff.patch = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1)
            return ARGP_ERR_UNKNOWN;
        *(state->arg_num ? &args->diff.after : &args->diff.before) = arg;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_child children[] = {
    {&cli_patching_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "OLD NEW",
    "Write the exact difference of two checkpoints that have the same shards, tensors, shapes and "
    "dtypes. `perta apply OLD PATCH' gives the shards of NEW, byte for byte; `perta revert NEW "
    "PATCH' gives those of OLD."
    "\v"
    "Example:\n"
    "  perta diff base tuned --patch tuned.patch",
    children,
    NULL,
    NULL};

int cmd_diff(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    args.diff.force = args.cli.force;
    int rc = cli_statement_check(&args.cli, args.diff.patch, &err);
    if (!rc)
        rc = perta_diff(&args.diff, &args.cli.run, &summary, &err);
    if (!rc)
        rc = cli_statement(&args.cli, args.diff.patch, summary, &err);
    if (!rc) {
        const json_t *counts = json_object_get(summary, "counts");
        double n = json_number_value(json_object_get(counts, "parameters"));
        double changed = json_number_value(json_object_get(counts, "changed"));
        double bytes = json_number_value(json_object_get(summary, "patch_bytes"));
        double read = json_number_value(json_object_get(summary, "read_bytes"));
        double t = cli_seconds(&args.cli);
        char a[32], b[32], c[32];
        if (args.cli.run.dry_run)
            cli_say(&args.cli, "dry run: all checks passed; nothing was written\n");
        else
            cli_say(&args.cli,
                    "%.0f of %.0f parameters differ (%.2f%%)\npatch %s: %s, %.3f bits a "
                    "parameter\nread %s in %.2f s (%s/s)\n",
                    changed, n, n > 0 ? 100 * changed / n : 0, args.diff.patch, cli_bytes(bytes, a),
                    n > 0 ? 8 * bytes / n : 0, cli_bytes(read, b), t, cli_bytes(read / t, c));
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    } else {
        json_decref(summary);
    }
    return cli_status(&args.cli, rc, &err);
}
