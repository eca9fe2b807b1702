/* perta apply and perta revert: one job in two directions. */
#include "stream/patch/apply.h"
#include "tools/cli.h"

enum { KEY_OUT = CLI_KEY_OWN, KEY_IN_PLACE };

struct args {
    struct cli cli;
    struct perta_apply apply;
    bool in_place;
};

static const struct argp_option options[] = {
    {"out", KEY_OUT, "DIR", 0, "Write the model here", 1},
    {"in-place", KEY_IN_PLACE, NULL, 0,
     "Change MODEL itself instead of writing a second one, to save disk space; if the run is "
     "killed, the same command completes it",
     1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = state->child_inputs[1] = &args->cli;
        return 0;
    case KEY_OUT:
        args->apply.out = arg;
        return 0;
    case KEY_IN_PLACE:
        args->in_place = true;
        return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1)
            return ARGP_ERR_UNKNOWN;
        *(state->arg_num ? &args->apply.patch : &args->apply.model) = arg;
        return 0;
    case ARGP_KEY_END:
        if (!args->apply.out == !args->in_place)
            argp_error(state, "give either --out DIR or --in-place");
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_child children[] = {
    {&cli_writing_argp, 0, "Output:", 5}, {&cli_common_argp, 0, "Common:", 6}, {0}};

static const struct argp apply_argp = {
    options,
    parse,
    "MODEL PATCH",
    "Write the model that PATCH leads to from MODEL. Every chunk is checked before and after; a "
    "patch for another model is refused (exit 1) and nothing is written."
    "\v"
    "Example:\n"
    "  perta apply full patches/alpha-1 --out forgotten\n"
    "  perta apply full patches/alpha-1 --in-place",
    children,
    NULL,
    NULL};

static const struct argp revert_argp = {
    options,
    parse,
    "MODEL PATCH",
    "Write the model that PATCH was made from, byte for byte; MODEL is the model that the patch "
    "leads to."
    "\v"
    "Example:\n"
    "  perta revert forgotten patches/alpha-1 --out full-again",
    children,
    NULL,
    NULL};

static int run(int argc, char **argv, const struct argp *argp, enum perta_apply_mode mode)
{
    struct args args = {.apply = {.mode = mode}};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, argp, argc, argv, &args);
    args.apply.force = args.cli.force;
    int rc = perta_apply(&args.apply, &args.cli.run, &summary, &err);
    if (!rc) {
        double written = json_number_value(json_object_get(summary, "written_bytes"));
        double chunks = json_number_value(json_object_get(summary, "chunks"));
        double t = cli_seconds(&args.cli);
        char a[32], b[32];
        if (args.cli.run.dry_run && args.in_place)
            cli_say(&args.cli,
                    "dry run: the headers match and the shards are writable%s; nothing "
                    "was written\n",
                    json_is_true(json_object_get(summary, "interrupted"))
                        ? ", and an interrupted run would be completed"
                        : "");
        else if (args.cli.run.dry_run)
            cli_say(&args.cli, "dry run: the headers match; nothing was written\n");
        else if (args.in_place)
            cli_say(&args.cli,
                    "%s: %.0f of %.0f chunks overwritten, %s, digests correct before and "
                    "after%s\n%.2f s\n",
                    args.apply.model, json_number_value(json_object_get(summary, "written_chunks")),
                    chunks, cli_bytes(written, a),
                    json_is_true(json_object_get(summary, "went_on"))
                        ? " (completed an interrupted run)"
                        : "",
                    t);
        else
            cli_say(&args.cli,
                    "%s: %s, %.0f chunks, digests correct before and after\n%.2f s (%s/s)\n",
                    args.apply.out, cli_bytes(written, a), chunks, t, cli_bytes(written / t, b));
        cli_say_left_behind(&args.cli, summary);
        size_t i;
        json_t *name;
        json_array_foreach (json_object_get(summary, "unedited"), i, name)
            cli_say(&args.cli,
                    "  not edited (weights that are not among the model's shards; a copy of "
                    "the model still has the old values): %s\n",
                    json_string_value(name));
        perta_json_set(&summary, "seconds", json_real(t));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}

int cmd_apply(int argc, char **argv)
{
    return run(argc, argv, &apply_argp, PERTA_APPLY);
}

int cmd_revert(int argc, char **argv)
{
    return run(argc, argv, &revert_argp, PERTA_REVERT);
}
