#include "estimators/edit/unlearn_arguments.h"

#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/recipe.h"

/* The value must be what the command would read from the text, whatever the locale. */
static int check_value(const struct perta_alpha *alpha, struct perta_err *err)
{
    locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!c)
        return perta_fail_sys(err, ENOMEM, "--alpha");
    char *end;
    float value = (float)strtod_l(alpha->text, &end, c);
    freelocale(c);
    if (end == alpha->text || *end)
        return perta_fail(err, PERTA_EUSAGE, "--alpha: %s is not a number", alpha->text);
    if (!isfinite(value) || !isfinite(alpha->value))
        return perta_fail(err, PERTA_EUSAGE, "--alpha: %s does not fit in float32", alpha->text);
    return value == alpha->value
               ? 0
               : perta_fail(err, PERTA_EUSAGE, "--alpha: the value is %.9g, but its text is %s",
                            (double)alpha->value, alpha->text);
}

static int check_alphas(const struct perta_unlearn *u, struct perta_err *err)
{
    if (!u->n_alphas || u->n_alphas > PERTA_ALPHAS_MAX)
        return perta_fail(err, PERTA_EUSAGE,
                          "--alpha: 1 to %d values are needed, not %u (n_alphas)", PERTA_ALPHAS_MAX,
                          u->n_alphas);
    for (unsigned a = 0; a < u->n_alphas; a++) {
        const char *text = u->alphas[a].text;
        if (!text || strspn(text, "0123456789.eE+-") != strlen(text) || strlen(text) > 32)
            return perta_fail(err, PERTA_EUSAGE,
                              "--alpha: write %.40s as a decimal number of at most 32 characters",
                              text ? text : "its text");
        int rc = check_value(&u->alphas[a], err);
        if (rc)
            return rc;
        for (unsigned b = 0; b < a; b++)
            if (!strcmp(u->alphas[b].text, text))
                return perta_fail(err, PERTA_EUSAGE, "--alpha: %s is given twice", text);
    }
    return 0;
}

static int check_rule(const struct perta_rule *rule, struct perta_err *err)
{
    int rc = perta_arguments_choice("--method", (int)rule->method, PERTA_SCALE + 1, err);
    if (rc)
        return rc;
    if ((rule->method == PERTA_POWER) != (rule->power != 0))
        return perta_fail(err, PERTA_EUSAGE,
                          "--method power needs --power P (above 0), and no other method takes it");
    if (rule->method == PERTA_POWER && !(rule->power > 0 && rule->power <= 64))
        return perta_fail(err, PERTA_EUSAGE, "--power: must be above 0 and at most 64");
    if (rule->method != PERTA_CONSTANT && rule->weight != 0)
        return perta_fail(err, PERTA_EUSAGE,
                          "--method constant needs --weight W, and no other method takes it");
    if (!(rule->weight >= 0 && rule->weight <= 1))
        return perta_fail(err, PERTA_EUSAGE, "--weight: must be from 0 to 1");
    return rule->method != PERTA_RANDOM && rule->seed
               ? perta_fail(err, PERTA_EUSAGE, "--seed: only --method random takes it")
               : 0;
}

int perta_globs_arguments(const struct perta_globs *globs, struct perta_err *err)
{
    int rc = perta_arguments_list("--include", globs->include, globs->n_include, err);
    return rc ? rc : perta_arguments_list("--exclude", globs->exclude, globs->n_exclude, err);
}

static int check_importance(const struct perta_unlearn *u, struct perta_err *err)
{
    bool needs = perta_rule_needs_importance(&u->rule);
    if (needs && (!u->forget || !u->retain))
        return perta_fail(err, PERTA_EUSAGE, "--method %s needs --forget and --retain",
                          perta_method_name(u->rule.method));
    return (u->rule.method == PERTA_SCALE) == (u->scale != NULL)
               ? 0
               : perta_fail(err, PERTA_EUSAGE,
                            "scale: PERTA_SCALE needs it, and no other method takes it");
}

int perta_unlearn_arguments(const struct perta_unlearn *u, struct perta_err *err)
{
    const struct perta_argument needed[] = {
        {"--model DIR", u->model}, {"--tuned DIR", u->tuned}, {"--patch DIR", u->patch}};
    const struct perta_argument given[] = {
        {"--base", u->base}, {"--forget", u->forget}, {"--retain", u->retain}, {"--out", u->out}};
    int rc = check_alphas(u, err);
    if (!rc)
        rc = check_rule(&u->rule, err);
    if (!rc)
        rc = perta_arguments_choice("--missing", (int)u->missing, PERTA_MISSING_KEEP + 1, err);
    if (!rc)
        rc = perta_globs_arguments(&u->globs, err);
    if (!rc)
        rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (!rc)
        rc = perta_arguments_optional(given, sizeof given / sizeof *given, err);
    return rc ? rc : check_importance(u, err);
}
