/* Writes a page about a patch. tools/report.html draws everything from the patch's record, which is
 * embedded unchanged. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/format/canonical.h"
#include "io/publish/publish.h"
#include "report_page.h"
#include "stream/patch/patch_in.h"
#include "tools/cli.h"

#define MARK "<!--manifest-->"
#define TITLE "<title>perta report</title>" /* identifies a page that an earlier report wrote */

enum { KEY_HTML = CLI_KEY_OWN, KEY_FORCE };

struct args {
    struct cli cli;
    const char *patch, *html;
    bool force;
};

static const struct argp_option options[] = {
    {"html", KEY_HTML, "FILE", 0, "Write the page here", 1},
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

/* The caller frees it. */
static char *page_of(const json_t *manifest)
{
    const char *mark = strstr(report_page, MARK);
    char *text = perta_canonical_json(manifest), *record = text ? escaped(text) : NULL;
    char *page = NULL;
    if (record && asprintf(&page, "%.*s%s%s", (int)(mark - report_page), report_page, record,
                           mark + strlen(MARK)) < 0)
        page = NULL;
    free(record);
    free(text);
    return page;
}

static int report(const struct args *args, struct perta_err *err)
{
    struct perta_patch_in patch = {0};
    json_t *record = NULL;
    int rc = perta_patch_in_open(&patch, args->patch, err);
    if (!rc)
        rc = perta_patch_in_manifest(&patch, &record, err);
    char *page = rc ? NULL : page_of(record);
    json_decref(record);
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
