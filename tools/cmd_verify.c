#include <unistd.h>

#include "io/format/checkpoint.h"
#include "stream/patch/manifest.h"
#include "stream/patch/patch_in.h"
#include "tools/cli.h"

enum { KEY_MANIFEST = CLI_KEY_OWN, KEY_PATCH, KEY_APPLIED, KEY_ORIGINAL };

struct args {
    struct cli cli;
    const char *path, *manifest, *patch;
    bool applied, original;
};

static const struct argp_option options[] = {
    {"manifest", KEY_MANIFEST, "FILE", 0, "Digests to check against, from `perta manifest'", 1},
    {"patch", KEY_PATCH, "DIR", 0, "Check a model against the digests in this patch", 1},
    {"applied", KEY_APPLIED, NULL, 0,
     "With --patch: check that PATH is the model that the patch leads to", 1},
    {"original", KEY_ORIGINAL, NULL, 0,
     "With --patch: check that PATH is the model that it was made from", 1},
    {0}};

static void check(struct argp_state *state, const struct args *args)
{
    if (args->manifest && args->patch)
        argp_error(state, "give --manifest or --patch, not both");
    if ((args->patch != NULL) != (args->applied || args->original) ||
        (args->applied && args->original))
        argp_error(state, "--patch needs one of --applied and --original, which need --patch");
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &args->cli;
        return 0;
    case KEY_MANIFEST:
        args->manifest = arg;
        return 0;
    case KEY_PATCH:
        args->patch = arg;
        return 0;
    case KEY_APPLIED:
        args->applied = true;
        return 0;
    case KEY_ORIGINAL:
        args->original = true;
        return 0;
    case ARGP_KEY_END:
        check(state, args);
        return 0;
    }
    return cli_one_argument(key, arg, state, &args->path,
                            "PATH is missing: what should be verified?");
}

static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "PATH",
    "Check a patch (every table, every frame, every digest), a folder against a manifest, or a "
    "model against a patch. The exit status is 1 if anything differs. Every difference is listed: "
    "with the tensor, and in patches and against patches also with its elements."
    "\v"
    "Examples:\n"
    "  perta verify patches/alpha-1\n"
    "  perta verify model --manifest model.manifest.json\n"
    "  perta verify model --patch patches/alpha-1 --applied",
    children,
    NULL,
    NULL};

static void say_differences(const struct cli *cli, const json_t *summary)
{
    size_t i;
    json_t *item;
    json_array_foreach (json_object_get(summary, "differences"), i, item) {
        const char *tensor = json_string_value(json_object_get(item, "tensor"));
        cli_say(cli, "%s%s%s: %s\n", json_string_value(json_object_get(item, "file")),
                tensor ? ": tensor " : "", tensor ? tensor : "",
                json_string_value(json_object_get(item, "what")));
    }
    json_array_foreach (json_object_get(summary, "damaged"), i, item)
        cli_say(cli, "%s\n", json_string_value(json_object_get(item, "message")));
    json_array_foreach (json_object_get(summary, "unlisted"), i, item)
        cli_say(cli, "note: %s is not in the manifest\n", json_string_value(item));
}

static int verify(struct args *args, json_t **summary, struct perta_err *err)
{
    if (args->patch)
        return perta_model_verify(args->path, args->patch, args->applied, &args->cli.run, summary,
                                  err);
    if (args->manifest)
        return perta_manifest_verify(args->path, args->manifest, &args->cli.run, summary, err);
    if (perta_patch_in_is_patch(args->path))
        return perta_patch_verify(args->path, &args->cli.run, summary, err);
    if (access(args->path, F_OK))
        return perta_fail(err, PERTA_EINPUT, "%s: no such file or folder", args->path);
    return perta_fail(
        err, PERTA_EUSAGE,
        "%s: not a patch; to check another folder give --manifest FILE or --patch DIR", args->path);
}

int cmd_verify(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *summary = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = verify(&args, &summary, &err);
    if (summary) {
        say_differences(&args.cli, summary);
        if (!rc)
            cli_say(&args.cli, "%s: verified\n", args.path);
        perta_json_set(&summary, "ok", json_boolean(!rc));
        perta_json_set(&summary, "seconds", json_real(cli_seconds(&args.cli)));
        cli_json(&args.cli, summary);
    }
    return cli_status(&args.cli, rc, &err);
}
