/* Writes a page about a patch. tools/report.html draws everything from the patch's record, which is
 * embedded unchanged; so is an audit of it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/canonical.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "report_page.h"
#include "stream/patch/patch_in.h"
#include "tools/cli.h"

#define MARK "<!--manifest-->"
#define AUDIT_MARK "<!--audit-->"           /* stands after the other */
#define TITLE "<title>perta report</title>" /* identifies a page that an earlier report wrote */

enum { AUDIT_VERSION = 1 }; /* of audit.json: python/perta/audit.py */
enum { KEY_HTML = CLI_KEY_OWN, KEY_AUDIT, KEY_FORCE };

struct args {
    struct cli cli;
    const char *patch, *html, *audit;
    bool force;
};

static const struct argp_option options[] = {
    {"html", KEY_HTML, "FILE", 0, "Write the page here", 1},
    {"audit", KEY_AUDIT, "FILE", 0, "Also show this audit.json, which `perta audit' wrote", 1},
    {"force", KEY_FORCE, NULL, 0, "Replace a page that an earlier report wrote", 1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &args->cli;
        return 0;
    case KEY_HTML:
        args->html = arg;
        return 0;
    case KEY_AUDIT:
        args->audit = arg;
        return 0;
    case KEY_FORCE:
        args->force = true;
        return 0;
    case ARGP_KEY_END:
        if (!args->html)
            argp_error(state, "--html FILE is needed");
        return 0;
    }
    return cli_one_argument(key, arg, state, &args->patch, "PATCH is missing: which patch?");
}

static const struct argp_child children[] = {{&cli_common_argp, 0, "Common:", 6}, {0}};
static const struct argp argp = {
    options,
    parse,
    "PATCH",
    "Write one self-contained page about a patch: the recipe, the change by layer and module, the "
    "distribution of weights, what rounding took away, and digests. The page needs no network."
    "\v"
    "Example:\n"
    "  perta report forget.patch --html forget.html",
    children,
    NULL,
    NULL};

/* Replace '<' in the record, which could end the HTML element that holds it, by its JSON escape.
 * The caller frees the text. */
static char *escaped(const char *text)
{
    static const char less[] = "\\u003c";
    size_t n = 0;
    for (const char *c = text; *c; c++)
        n += *c == '<' ? sizeof less - 1 : 1;
    char *safe = malloc(n + 1), *to = safe;
    for (const char *c = text; safe && *c; c++)
        if (*c == '<')
            to = stpcpy(to, less);
        else
            *to++ = *c;
    if (safe)
        *to = 0;
    return safe;
}

/* A value as text for the page, which the caller frees. */
static char *record_of(const json_t *value)
{
    char *text = perta_canonical_json(value), *record = text ? escaped(text) : NULL;
    free(text);
    return record;
}

/* audit may be NULL. The caller frees the page. */
static char *page_of(const json_t *manifest, const json_t *audit)
{
    const char *mark = strstr(report_page, MARK), *between = mark + strlen(MARK);
    const char *second = strstr(between, AUDIT_MARK);
    char *record = record_of(manifest), *tried = audit ? record_of(audit) : strdup("null");
    char *page = NULL;
    if (record && tried &&
        asprintf(&page, "%.*s%s%.*s%s%s", (int)(mark - report_page), report_page, record,
                 (int)(second - between), between, tried, second + strlen(AUDIT_MARK)) < 0)
        page = NULL;
    free(record);
    free(tried);
    return page;
}

/* Read an audit of the patch. PERTA_ECHECK if it is of another one. */
static int read_audit(const char *path, const struct perta_patch_in *patch, json_t **audit,
                      struct perta_err *err)
{
    struct stat st;
    int fd = perta_open_regular(path, &st, err);
    int rc = fd < 0 ? fd : perta_json_load(fd, path, audit, err);
    if (fd >= 0)
        close(fd);
    if (rc)
        return rc;
    const char *of =
        json_string_value(json_object_get(json_object_get(*audit, "patch"), "manifest_sha256"));
    if (json_integer_value(json_object_get(*audit, "perta_audit")) != AUDIT_VERSION || !of)
        return perta_fail(err, PERTA_EINPUT, "%s: not an audit.json of this version of perta audit",
                          path);
    return strcmp(of, patch->manifest_digest.sha256)
               ? perta_fail(err, PERTA_ECHECK, "%s: the audit of another patch than %s", path,
                            patch->path)
               : 0;
}

static int report(const struct args *args, struct perta_err *err)
{
    struct perta_patch_in patch = {0};
    json_t *record = NULL, *audit = NULL;
    int rc = perta_patch_in_open(&patch, args->patch, err);
    if (!rc)
        rc = perta_patch_in_manifest(&patch, &record, err);
    if (!rc && args->audit)
        rc = read_audit(args->audit, &patch, &audit, err);
    char *page = rc ? NULL : page_of(record, audit);
    json_decref(record);
    json_decref(audit);
    if (!rc && !page)
        rc = perta_fail_sys(err, ENOMEM, "%s", args->patch);
    if (!rc)
        rc = perta_publish_single(args->html, TITLE, page, strlen(page), args->force, err);
    free(page);
    perta_patch_in_close(&patch);
    return rc;
}

int cmd_report(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = report(&args, &err);
    if (!rc) {
        cli_say(&args.cli, "%s\n", args.html);
        cli_json(&args.cli, json_pack("{s:o}", "html", perta_text_json("%s", args.html)));
    }
    return cli_status(&args.cli, rc, &err);
}
