/* Replaces what needs matrix products in a build without them (meson setup -Dmodel=disabled): each
 * verb prints that it is missing. */
#include <stdio.h>

#include "estimators/steps/steps.h"
#include "tools/cli.h"

#define MISSING "this build has no matrix products (oneDNN)"

const bool cli_has_model = false;

static int say(const char *verb)
{
    fprintf(stderr, "perta %s: " MISSING "\n", verb);
    return 2;
}

int cli_check_model(const char *path, struct perta_err *err)
{
    (void)path;
    return perta_fail(err, PERTA_EUSAGE, MISSING);
}

int cmd_estimate(int argc, char **argv)
{
    (void)argc;
    return say(argv[0]);
}

int cmd_eval(int argc, char **argv)
{
    (void)argc;
    return say(argv[0]);
}

int cmd_tune(int argc, char **argv)
{
    (void)argc;
    return say(argv[0]);
}

int cmd_demo(int argc, char **argv)
{
    (void)argc;
    return say(argv[0]);
}

int perta_steps(const struct perta_steps *steps, const struct perta_run *run, json_t **summary,
                struct perta_err *err)
{
    (void)steps, (void)run, (void)summary;
    return perta_fail(err, PERTA_EUSAGE, "--steps: " MISSING);
}
