#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/unlearn.h"
#include "tools/unlearn_steps.h"

enum {
    KEY_MODEL = CLI_KEY_OWN,
    KEY_TUNED,
    KEY_BASE,
    KEY_FORGET,
    KEY_RETAIN,
    KEY_METHOD,
    KEY_POWER,
    KEY_WEIGHT,
    KEY_SEED,
    KEY_ALPHA,
    KEY_PATCH,
    KEY_OUT,
    KEY_INCLUDE,
    KEY_EXCLUDE,
    KEY_MISSING,
    KEY_NONFINITE,
    KEY_ONE_WAY,
};

struct args {
    struct cli cli; /* must be first: it is the input of the child parsers */
    struct perta_unlearn unlearn;
    char *alpha_texts;
    const char **include, **exclude;
    bool has_power, has_weight, has_seed, has_method, has_alpha;
    struct unlearn_steps steps;
};

static const struct argp_option options[] = {
    {"model", KEY_MODEL, "DIR", 0, "The model to unlearn from", 1},
    {"tuned", KEY_TUNED, "DIR", 0,
     "The --base model tuned on the forget set alone: a model, or a PEFT LoRA adapter", 1},
    {"base", KEY_BASE, "DIR", 0,
     "The model that --tuned was tuned from; a LoRA adapter needs it only for modules_to_save", 1},
    {"forget", KEY_FORGET, "DIR", 0, "Importance over the forget set", 1},
    {"retain", KEY_RETAIN, "DIR", 0, "Importance over the retain set", 1},
    {"patch", KEY_PATCH, "DIR", 0, "Write the patch here", 2},
    {"out", KEY_OUT, "DIR", 0, "Also write the edited model, here", 2},
    {"one-way", KEY_ONE_WAY, NULL, 0,
     "Write a patch of new values only, for publishing: it reveals nothing about the old values "
     "and cannot be reverted",
     2},
    {"alpha", KEY_ALPHA, "A[,A...]", 0,
     "How far to go (default 1). With several A, one pass writes DIR/alpha-A for each", 3},
    {"method", KEY_METHOD, "METHOD", 0,
     "How parameters are weighted: grad (default), fisher, power, tv, constant, random; with "
     "--steps: signed, signed-backoff (default), signed-hold",
     3},
    {"power", KEY_POWER, "P", 0, "The exponent p of --method power", 3},
    {"weight", KEY_WEIGHT, "W", 0, "The weight of --method constant, from 0 to 1", 3},
    {"seed", KEY_SEED, "S", 0, "Seed of --method random (default 0)", 3},
    {"include", KEY_INCLUDE, "GLOB", 0, "Edit only tensors whose name matches; repeatable", 4},
    {"exclude", KEY_EXCLUDE, "GLOB", 0, "Leave tensors whose name matches unchanged; repeatable",
     4},
    {"missing", KEY_MISSING, "error|tv|keep", 0,
     "Tensors without importance: an error (default), keep them, or subtract their whole task "
     "vector",
     4},
    {"nonfinite", KEY_NONFINITE, "error|keep", 0,
     "NaN or Inf in an input: an error (default), or keep that parameter unchanged", 4},
    {0}};

static void parse_alphas(struct argp_state *state, struct args *args, const char *arg)
{
    struct perta_unlearn *u = &args->unlearn;
    free(args->alpha_texts);
    args->alpha_texts = strdup(arg);
    u->n_alphas = 0;
    for (char *rest = args->alpha_texts, *text; rest && (text = strsep(&rest, ","));) {
        if (u->n_alphas == PERTA_ALPHAS_MAX)
            argp_error(state, "--alpha: at most %d values", PERTA_ALPHAS_MAX);
        float value = (float)cli_number(state, "--alpha", text);
        u->alphas[u->n_alphas++] = (struct perta_alpha){value, text};
    }
}

static void add_glob(const char ***list, unsigned *n, const char *arg)
{
    *list = realloc(*list, (*n + 1) * sizeof **list);
    if (!*list)
        abort();
    (*list)[(*n)++] = arg;
}

/* With --steps there are no weights to choose, only signs. */
static void check_steps(struct argp_state *state, struct args *args)
{
    struct perta_unlearn *u = &args->unlearn;
    struct perta_steps *s = &args->steps.steps;
    bool is_signed = u->rule.method >= PERTA_SCALE;
    s->hold = u->rule.method == PERTA_SCALE + 2;
    unlearn_steps_check(state, &args->steps, is_signed);
    if (!s->n_steps)
        return;
    if (args->has_method && !is_signed)
        argp_error(state, "--steps needs --method signed, signed-backoff or signed-hold");
    if (u->forget || u->retain || args->has_alpha || u->missing || u->rule.keep_nonfinite)
        argp_error(state,
                   "--forget, --retain, --alpha, --missing and --nonfinite cannot be used with "
                   "--steps");
    if (u->rule.method == PERTA_SCALE && args->steps.has_back_off)
        argp_error(state, "--method signed never backs off; --method signed-backoff does");
    if (u->rule.method == PERTA_SCALE)
        s->rule.back_off = 0;
    u->rule.method = PERTA_SCALE;
}

/* Check which options are given together; the library checks their values. */
static void check(struct argp_state *state, struct args *args)
{
    const struct perta_unlearn *u = &args->unlearn;
    check_steps(state, args);
    if ((u->rule.method == PERTA_POWER) != args->has_power)
        argp_error(state, "--method power needs --power P (above 0), and no other method takes it");
    if ((u->rule.method == PERTA_CONSTANT) != args->has_weight)
        argp_error(state, "--method constant needs --weight W, and no other method takes it");
    if (u->rule.method != PERTA_RANDOM && args->has_seed)
        argp_error(state, "--seed: only --method random takes it");
}

static error_t parse_rest(int key, char *arg, struct argp_state *state);

static error_t parse(int key, char *arg, struct argp_state *state)
{
    static const char *const methods[] = {"grad",        "fisher", "power",  "tv",
                                          "constant",    "random", "signed", "signed-backoff",
                                          "signed-hold", NULL};
    static const char *const missing[] = {"error", "tv", "keep", NULL};
    static const char *const nonfinite[] = {"error", "keep", NULL};
    struct args *args = state->input;
    struct perta_unlearn *u = &args->unlearn;
    switch (key) {
    case KEY_METHOD:
        u->rule.method = (enum perta_method)cli_choice(state, "--method", arg, methods);
        args->has_method = true;
        return 0;
    case KEY_POWER:
        u->rule.power = cli_number(state, "--power", arg);
        args->has_power = true;
        return 0;
    case KEY_WEIGHT:
        u->rule.weight = cli_number(state, "--weight", arg);
        args->has_weight = true;
        return 0;
    case KEY_SEED:
        u->rule.seed = cli_count(state, "--seed", arg);
        args->has_seed = true;
        return 0;
    case KEY_ALPHA:
        parse_alphas(state, args, arg);
        args->has_alpha = true;
        return 0;
    case KEY_MISSING:
        u->missing = (enum perta_missing)cli_choice(state, "--missing", arg, missing);
        return 0;
    case KEY_NONFINITE:
        u->rule.keep_nonfinite = cli_choice(state, "--nonfinite", arg, nonfinite);
        return 0;
    default:
        return parse_rest(key, arg, state);
    }
}

static error_t parse_rest(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    struct perta_unlearn *u = &args->unlearn;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &args->steps;
        state->child_inputs[1] = state->child_inputs[2] = &args->cli;
        return 0;
    case KEY_ONE_WAY:
        u->one_way = true;
        return 0;
    case KEY_MODEL:
        u->model = arg;
        return 0;
    case KEY_TUNED:
        u->tuned = arg;
        return 0;
    case KEY_BASE:
        u->base = arg;
        return 0;
    case KEY_FORGET:
        u->forget = arg;
        return 0;
    case KEY_RETAIN:
        u->retain = arg;
        return 0;
    case KEY_PATCH:
        u->patch = arg;
        return 0;
    case KEY_OUT:
        u->out = arg;
        return 0;
    case KEY_INCLUDE:
        add_glob(&args->include, &u->globs.n_include, arg);
        return 0;
    case KEY_EXCLUDE:
        add_glob(&args->exclude, &u->globs.n_exclude, arg);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state,
                   "unexpected argument %s; folders are given with --model, --tuned and so on",
                   arg);
        return 0;
    case ARGP_KEY_END:
        check(state, args);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_child children[] = {{&unlearn_steps_argp, 0, "In steps:", 5},
                                             {&cli_patching_argp, 0, "Output:", 6},
                                             {&cli_common_argp, 0, "Common:", 7},
                                             {0}};
static const struct argp argp = {
    options,
    parse,
    NULL,
    "Make a model forget: subtract the task vector from it, each parameter weighted by how much it "
    "matters for forgetting against retaining. One pass over all folders."
    "\v"
    "The task vector is tau = tuned - base, the weight of a parameter w = |g_f|^p / (|g_f|^p + "
    "|g_r|^p), the result model - alpha * w * tau.\n\n"
    "Examples:\n"
    "  perta unlearn --model full --tuned tuned --base base \\\n"
    "    --forget imp/forget/mean --retain imp/retain/mean \\\n"
    "    --alpha 0.5,1,2 --patch patches --out models\n"
    "  perta unlearn --model full --tuned tuned --base base --steps 20 \\\n"
    "    --data-forget forget.jsonl --data-retain retain.jsonl \\\n"
    "    --stop-forget 3 --patch forget.patch\n"
    "  perta unlearn --model full --tuned tuned --base base --steps 2,4,8 \\\n"
    "    --data-forget forget.jsonl --data-retain retain.jsonl --patch patches\n"
    "  perta unlearn --model full --method signed-hold --steps 16 \\\n"
    "    --data-forget forget.jsonl --data-retain retain.jsonl \\\n"
    "    --stop-probability 0.15 --patch forget.patch",
    children,
    NULL,
    NULL};

static double real(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static void say_result(const struct cli *cli, const json_t *result)
{
    char a[32], b[32];
    const json_t *counts = json_object_get(result, "counts");
    double n = real(counts, "parameters"), changed = real(counts, "changed");
    double patch = real(result, "patch_bytes"), model = real(result, "model_bytes");
    const json_t *step = json_object_get(result, "step");
    if (step)
        cli_say(cli, "step %.0f: ", json_number_value(step));
    else
        cli_say(cli, "alpha %s: ", json_string_value(json_object_get(result, "alpha")));
    cli_say(cli, "%.0f of %.0f parameters changed (%.2f%%), mean weight %.4f\n", changed, n,
            n > 0 ? 100 * changed / n : 0, real(counts, "mean_weight"));
    if (real(counts, "rounded_away") > 0)
        cli_say(cli, "  %.0f changes were too small for the model's dtype\n",
                real(counts, "rounded_away"));
    if (real(counts, "nonfinite") > 0)
        cli_say(cli, "  %.0f parameters with NaN or Inf stay unchanged\n",
                real(counts, "nonfinite"));
    cli_say(cli, "  patch %s: %s, %.3f bits a parameter\n",
            json_string_value(json_object_get(result, "patch")), cli_bytes(patch, a),
            n > 0 ? 8 * patch / n : 0);
    if (model > 0)
        cli_say(cli, "  model written: %s\n", cli_bytes(model, b));
    cli_say_left_behind(cli, result);
}

/* Print how much stays unchanged, and why. */
static void say_unedited(const struct cli *cli, const json_t *unedited)
{
    size_t i;
    json_t *reason;
    if (!unedited)
        return;
    cli_say(cli, "unedited: %.0f of %.0f parameters", real(unedited, "parameters"),
            real(unedited, "of"));
    json_array_foreach (json_object_get(unedited, "reasons"), i, reason)
        cli_say(cli, "%s %.0f in %.0f tensor%s %s", i ? ";" : ":", real(reason, "parameters"),
                real(reason, "tensors"), real(reason, "tensors") == 1 ? "" : "s",
                json_string_value(json_object_get(reason, "why")));
    cli_say(cli, "\n");
}

static void say(const struct cli *cli, const json_t *summary)
{
    size_t i;
    json_t *item;
    json_array_foreach (json_object_get(summary, "notes"), i, item)
        cli_say(cli, "note: %s\n", json_string_value(item));
    say_unedited(cli, json_object_get(summary, "unedited"));
    unlearn_steps_say(cli, summary);
    json_array_foreach (json_object_get(summary, "results"), i, item)
        say_result(cli, item);
    char a[32], b[32];
    double read = real(summary, "read_bytes"), t = cli_seconds(cli);
    const json_t *io = json_object_get(summary, "io");
    if (io)
        cli_say(cli, "read %s in %.2f s (%s/s) by %s: %s\n", cli_bytes(read, a), t,
                cli_bytes(read / t, b), json_string_value(json_object_get(io, "engine")),
                json_string_value(json_object_get(io, "why")));
    else
        cli_say(cli, "dry run: all checks passed; nothing was written\n");
}

/* With --steps the names of several patches are known only at the end, so only that of a single one
 * is checked. */
static int check_statements(const struct args *args, struct perta_err *err)
{
    const struct perta_unlearn *u = &args->unlearn;
    int rc = 0;
    for (unsigned a = 0; a < u->n_alphas && u->n_alphas > 1 && !rc; a++) {
        char *patch = NULL;
        rc = asprintf(&patch, "%s/alpha-%s", u->patch, u->alphas[a].text) < 0
                 ? perta_fail_sys(err, ENOMEM, "%s", u->patch)
                 : cli_statement_check(&args->cli, patch, err);
        free(patch);
    }
    return u->n_alphas > 1 ? rc : cli_statement_check(&args->cli, u->patch, err);
}

static int run(struct args *args, json_t **summary, struct perta_err *err)
{
    struct perta_unlearn *u = &args->unlearn;
    struct perta_steps *s = &args->steps.steps;
    u->force = args->cli.force;
    u->globs.include = args->include;
    u->globs.exclude = args->exclude;
    int rc = check_statements(args, err);
    if (rc)
        return rc;
    if (!s->n_steps)
        return perta_unlearn(u, &args->cli.run, summary, err);
    unlearn_steps_take(s, u);
    return perta_steps(s, &args->cli.run, summary, err);
}

int cmd_unlearn(int argc, char **argv)
{
    struct args args = {.unlearn = {.n_alphas = 1, .alphas = {{1, "1"}}}};
    struct perta_err err = {0};
    json_t *summary = NULL;
    unlearn_steps_init(&args.steps);
    cli_parse(&args.cli, &argp, argc, argv, &args);
    int rc = run(&args, &summary, &err);
    bool reached = true;
    size_t i;
    json_t *result;
    json_array_foreach (json_object_get(summary, "results"), i, result)
        rc = rc ? rc
                : cli_statement(&args.cli, json_string_value(json_object_get(result, "patch")),
                                summary, &err);
    if (!rc) {
        say(&args.cli, summary);
        reached = unlearn_steps_reached(&args.cli, &args.steps.steps, summary);
        perta_json_set(&summary, "seconds", json_real(cli_seconds(&args.cli)));
        cli_json(&args.cli, summary);
    } else {
        json_decref(summary);
    }
    free(args.alpha_texts);
    free(args.include);
    free(args.exclude);
    int status = cli_status(&args.cli, rc, &err);
    return status || reached ? status : -PERTA_ECHECK;
}
