#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "io/text.h"
#include "stream/manifest.h"
#include "tools/cli.h"

enum { KEY_FORMAT = CLI_KEY_OWN };
enum format { FORMAT_PERTA, FORMAT_XXHSUM, FORMAT_SHA256SUM };

struct args {
    struct cli cli;
    enum format format;
    const char *path;
};

static const struct argp_option options[] = {
    {"format", KEY_FORMAT, "perta|xxhsum|sha256sum", 0,
     "perta: JSON with digests of every tensor (default). The others: what xxhsum --check and "
     "sha256sum --check read, run inside PATH", 1},
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
    return cli_one_argument(key, arg, state, &args->path, "which folder?");
}

static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options, parse, "PATH",
    "Print digests of every file in a folder (or of one file): XXH3-128 for speed, SHA-256 for "
    "authenticity; for safetensors files, of every tensor."
    "\v"
    "Examples:\n"
    "  perta manifest model >model.manifest.json\n"
    "  perta verify model --manifest model.manifest.json\n"
    "  perta manifest --format sha256sum model >SHA256SUMS\n"
    "  (cd model && sha256sum --check ../SHA256SUMS)",
    children, NULL, NULL};

/* As GNU sha256sum writes a name, and as it reads it: escaped where the line begins with a
 * backslash. xxhsum has no such thing. Other control characters would reach the terminal. */
static int check_name(const struct args *args, const char *name, struct perta_err *err)
{
    char plain[NAME_MAX + 1];
    snprintf(plain, sizeof plain, "%s", name);
    for (char *c = plain; args->format == FORMAT_SHA256SUM && (c = strpbrk(c, "\n\r")); c++)
        *c = ' ';
    return perta_text_is_plain(plain)
               ? 0
               : perta_fail(err, PERTA_EINPUT,
                            "%s/%s: has a %scontrol character in its name, which this format "
                            "cannot name; --format perta can",
                            args->path, name,
                            args->format == FORMAT_XXHSUM ? "line break or another " : "");
}

static void print_name(const char *name, bool escaped)
{
    for (; *name; name++) {
        const char *as = !escaped        ? NULL
                         : *name == '\\' ? "\\\\"
                         : *name == '\n' ? "\\n"
                         : *name == '\r' ? "\\r"
                                         : NULL;
        if (as)
            fputs(as, stdout);
        else
            putchar(*name);
    }
    putchar('\n');
}

static int print_sums(const struct args *args, const json_t *manifest, struct perta_err *err)
{
    bool sha256 = args->format == FORMAT_SHA256SUM;
    const json_t *files = json_object_get(manifest, "files");
    size_t i;
    json_t *file;
    int rc = 0;
    json_array_foreach (files, i, file)
        rc = rc ? rc : check_name(args, json_string_value(json_object_get(file, "name")), err);
    json_array_foreach (files, i, file) {
        const char *name = json_string_value(json_object_get(file, "name"));
        bool escaped = sha256 && strpbrk(name, "\\\n\r");
        if (rc)
            break;
        printf("%s%s  ", escaped ? "\\" : "",
               json_string_value(json_object_get(file, sha256 ? "sha256" : "xxh3_128")));
        print_name(name, escaped);
    }
    return rc;
}

int cmd_manifest(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *manifest = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = perta_manifest(args.path, args.format != FORMAT_XXHSUM, NULL, &args.cli.run,
                            &manifest, &err);
    if (!rc) {
        if (args.format == FORMAT_PERTA)
            args.cli.json = true;
        else
            rc = print_sums(&args, manifest, &err);
        if (args.format != FORMAT_PERTA)
            args.cli.json = false;
        cli_json(&args.cli, manifest);
    }
    return cli_status(&args.cli, rc, &err);
}
