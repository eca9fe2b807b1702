#include <stdio.h>
#include <string.h>

#include "stream/patch/manifest.h"
#include "tools/cli.h"

enum { KEY_FORMAT = CLI_KEY_OWN };
enum format { FORMAT_PERTA, FORMAT_XXHSUM, FORMAT_SHA256SUM };

struct args {
    struct cli cli;
    enum format format;
    const char *path;
};

static const struct argp_option options[] = {
    {"format", KEY_FORMAT, "FORMAT", 0,
     "perta: JSON with digests of every tensor (default). xxhsum and sha256sum: lists for "
     "xxhsum --check and sha256sum --check, which must run inside PATH",
     1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    static const char *const formats[] = {"perta", "xxhsum", "sha256sum", NULL};
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &args->cli;
        return 0;
    case KEY_FORMAT:
        args->format = (enum format)cli_choice(state, "--format", arg, formats);
        return 0;
    }
    return cli_one_argument(key, arg, state, &args->path, "PATH is missing: which folder?");
}

static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "PATH",
    "Print the digests of every file in a folder (or of one file): XXH3-128 for speed, SHA-256 for "
    "authenticity; for safetensors files also those of every tensor."
    "\v"
    "Examples:\n"
    "  perta manifest model >model.manifest.json\n"
    "  perta verify model --manifest model.manifest.json\n"
    "  perta manifest --format sha256sum model >SHA256SUMS\n"
    "  (cd model && sha256sum --check ../SHA256SUMS)",
    children,
    NULL,
    NULL};

/* Print a line as sha256sum does (gnu), which doubles a backslash in a name and puts one before the
 * line; or as xxhsum does, which does neither. A manifest holds no other names that need
 * escaping. */
static void print_sum(const char *sum, const char *name, bool gnu)
{
    printf("%s%s  ", gnu && strchr(name, '\\') ? "\\" : "", sum);
    for (; *name; name++)
        fputs(gnu && *name == '\\' ? "\\\\" : (char[]){*name, '\0'}, stdout);
    putchar('\n');
}

static void print_sums(const json_t *manifest, bool gnu)
{
    size_t i;
    json_t *file;
    json_array_foreach (json_object_get(manifest, "files"), i, file)
        print_sum(json_string_value(json_object_get(file, gnu ? "sha256" : "xxh3_128")),
                  json_string_value(json_object_get(file, "name")), gnu);
}

int cmd_manifest(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *manifest = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = perta_manifest(args.path, args.format != FORMAT_XXHSUM, NULL, &args.cli.run, &manifest,
                            &err);
    if (!rc) {
        if (args.format == FORMAT_PERTA)
            args.cli.json = true;
        else
            print_sums(manifest, args.format == FORMAT_SHA256SUM);
        if (args.format != FORMAT_PERTA)
            args.cli.json = false;
        cli_json(&args.cli, manifest);
    }
    return cli_status(&args.cli, rc, &err);
}
