/* --statement: writes who made a patch from what, when and where, as an in-toto statement with SLSA
 * provenance. Spec: docs/provenance.md */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "io/format/canonical.h"
#include "io/isa.h"
#include "io/publish/publish.h"
#include "stream/patch/patch_in.h"
#include "tools/cli.h"

#define SUFFIX ".intoto.json"
#define BUILD_TYPE "https://perta.invalid/provenance/v1"
#define SHA256_TEXT "sha256"

/* The last component of a path. */
static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static void add_file(json_t **list, const char *folder, const char *name, const char *algorithm,
                     const char *hex)
{
    if (hex) /* a file without a digest cannot be identified */
        perta_json_append(list, json_pack("{s:o, s:{s:s}}", "name",
                                          perta_text_json("%s/%s", folder, name), "digest",
                                          algorithm, hex));
}

static const char *text(const json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

/* The output files: those of the patch, and of the model that it leads to. */
static json_t *subjects(const struct perta_patch_in *patch)
{
    const json_t *outputs = json_object_get(patch->manifest, "outputs");
    const char *folder = base_of(patch->path);
    json_t *list = json_array();
    json_t *file;
    size_t i;
    add_file(&list, folder, "manifest.json", SHA256_TEXT, patch->manifest_digest.sha256);
    json_array_foreach (json_object_get(outputs, "patch"), i, file)
        add_file(&list, folder, text(file, "name"), SHA256_TEXT, text(file, "sha256"));
    json_array_foreach (json_object_get(outputs, "model"), i, file)
        add_file(&list, "model", text(file, "name"), SHA256_TEXT, text(file, "sha256"));
    return list;
}

/* The input files, each under the role of its folder. */
static json_t *dependencies(const json_t *manifest)
{
    json_t *list = json_array(), *input, *file;
    const char *role;
    size_t i;
    json_object_foreach (json_object_get(manifest, "inputs"), role, input)
        json_array_foreach (json_object_get(input, "shards"), i, file)
            add_file(&list, role, text(file, "name"), "xxh3_128", text(file, "xxh3_128"));
    return list;
}

static json_t *when(time_t t)
{
    struct tm utc;
    char stamp[32];
    gmtime_r(&t, &utc);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return json_string(stamp);
}

/* The name that the kernel reports; the caller frees it. NULL when out of memory. */
static char *cpu_name(void)
{
    char line[256];
    const char *name = NULL;
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file && !name && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (colon && !strncmp(line, "model name", 10)) {
            char *rest = colon + 1;
            name = strsep(&rest, "\n");
            name += strspn(name, " ");
        }
    }
    if (file)
        fclose(file);
    return strdup(name ? name : "unknown");
}

static json_t *run_details(const json_t *summary)
{
    time_t started = json_integer_value(json_object_get(summary, "started"));
    char *cpu = cpu_name();
    const char *engine = text(json_object_get(summary, "io"), "engine");
    json_t *details =
        json_pack("{s:{s:s, s:{s:s, s:s, s:s, s:s, s:s*}}, s:{s:o, s:o}}", "builder", "id",
                  BUILD_TYPE "/builder", "version", "perta", PERTA_VERSION, "compiler", __VERSION__,
                  "cpu", cpu, "instruction_set", perta_isa_name(perta_isa_chosen()), "io", engine,
                  "metadata", "startedOn", when(started), "finishedOn", when(time(NULL)));
    free(cpu);
    return details;
}

static json_t *statement_of(const struct perta_patch_in *patch, const json_t *summary)
{
    return json_pack("{s:s, s:o, s:s, s:{s:{s:s, s:O, s:o}, s:o}}", "_type",
                     "https://in-toto.io/Statement/v1", "subject", subjects(patch), "predicateType",
                     "https://slsa.dev/provenance/v1", "predicate", "buildDefinition", "buildType",
                     BUILD_TYPE, "externalParameters", json_object_get(patch->manifest, "recipe"),
                     "resolvedDependencies", dependencies(patch->manifest), "runDetails",
                     run_details(summary));
}

int cli_statement_check(const struct cli *cli, const char *patch, struct perta_err *err)
{
    char *to = NULL;
    if (!cli->statement || !patch) /* the verb reports that --patch is missing */
        return 0;
    size_t len = strlen(patch);
    while (len > 1 && patch[len - 1] == '/')
        len--;
    int rc = asprintf(&to, "%.*s" SUFFIX, (int)len, patch) < 0
                 ? perta_fail_sys(err, ENOMEM, "%s", patch)
                 : perta_publish_check_mark(to, "\"" BUILD_TYPE "\"", err);
    free(to);
    return rc;
}

int cli_statement(const struct cli *cli, const char *path, const json_t *summary,
                  struct perta_err *err)
{
    if (!cli->statement || cli->run.dry_run)
        return 0;
    struct perta_patch_in patch = {0};
    int rc = perta_patch_in_open(&patch, path, err);
    json_t *statement = rc ? NULL : statement_of(&patch, summary);
    char *body = statement ? perta_canonical_json(statement) : NULL, *to = NULL;
    if (!rc && (!body || asprintf(&to, "%s" SUFFIX, patch.path) < 0))
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    /* The patch is new, so the statement of an older patch of the same name is replaced. */
    if (!rc)
        rc = perta_publish_single(to, "\"" BUILD_TYPE "\"", body, strlen(body), true, err);
    free(to);
    free(body);
    json_decref(statement);
    perta_patch_in_close(&patch);
    return rc;
}
