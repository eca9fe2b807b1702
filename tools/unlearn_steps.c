/* perta unlearn --steps: its options and its output. */
#include "tools/unlearn_steps.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_STEPS = CLI_KEY_OWN + 0x40,
    KEY_DATA_FORGET,
    KEY_DATA_RETAIN,
    KEY_DATA_KEY,
    KEY_BOX,
    KEY_RETAIN_BATCH,
    KEY_STEP,
    KEY_BACK_OFF,
    KEY_MAX_SCALE,
    KEY_STOP_FORGET,
    KEY_STOP_PROBABILITY,
    KEY_SURVIVE,
    KEY_RETEACH_UPDATES,
    KEY_RETEACH_RATE,
    KEY_RETEACH_FACTOR,
    KEY_MAX_RETAIN_RISE,
    KEY_MAX_TOKENS,
    KEY_COMPUTE,
};

static const struct argp_option options[] = {
    {"steps", KEY_STEPS, "K[,K...]", 0,
     "Unlearn in up to K steps, which recompute gradients, instead of with weights from "
     "--forget and --retain. With several K, one run writes DIR/step-K for each",
     1},
    {"data-forget", KEY_DATA_FORGET, "FILE", 0, "The forget set: JSON lines, as for estimate", 1},
    {"data-retain", KEY_DATA_RETAIN, "FILE", 0, "The retain set: likewise", 1},
    {"data-key", KEY_DATA_KEY, "FILE", 0, "A key file: record keyed digests (HMAC-SHA-256) of both",
     1},
    {"box", KEY_BOX, "C", 0,
     "Without --tuned and --base, the task vector has the signs of the forget set's gradient at the "
     "model, for each matrix with C times its root mean square (default: found by trying the first step)",
     1},
    {"retain-batch", KEY_RETAIN_BATCH, "N", 0,
     "Take each step's retain gradients over at most N samples, batch after batch (default: all)",
     1},
    {"step", KEY_STEP, "S", 0, "How much a parameter's scale can grow in a step (default 0.4)", 2},
    {"back-off", KEY_BACK_OFF, "B", 0,
     "How much it shrinks in a step if that helps the retain set (default 0.2; --method "
     "signed: never)",
     2},
    {"max-scale", KEY_MAX_SCALE, "M", 0, "The largest value of a scale (default 3)", 2},
    {"stop-forget", KEY_STOP_FORGET, "L", 0,
     "Stop once the loss over the forget set is at least L; with --method signed-hold, hold it "
     "there",
     2},
    {"stop-probability", KEY_STOP_PROBABILITY, "P", 0,
     "Stop once the mean probability of the forget set's answers is at most P; with --method "
     "signed-hold, hold it there",
     2},
    {"survive", KEY_SURVIVE, "CONDITION[,CONDITION...]", 0,
     "The level has to hold under these conditions, too: nf4, int8, int4, q4_0 or fp8, with weights "
     "rounded to that format; drop, with a random half of the edit taken "
     "back; reteach, after some of the forget set is taught again",
     2},
    {"reteach-updates", KEY_RETEACH_UPDATES, "N", 0,
     "--survive reteach: how many updates it is taught for (default 5)", 2},
    {"reteach-rate", KEY_RETEACH_RATE, "L", 0, "Their learning rate (default 0.01)", 2},
    {"reteach-factor", KEY_RETEACH_FACTOR, "F", 0,
     "The mean probability of the other answers is then to be at most F times P (default 1)", 2},
    {"max-retain-rise", KEY_MAX_RETAIN_RISE, "R", 0,
     "Stop before the loss over the retain set has risen by more than R", 2},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "Refuse samples of more than N tokens", 2},
    {"compute", KEY_COMPUTE, "auto|f32|bf16", 0, "Matrix products, as for estimate", 2},
    {0}};

/* The number of steps is the largest K in the list. */
static void parse_steps(struct argp_state *state, struct perta_steps *s, const char *arg)
{
    char *texts = strdup(arg);
    if (!texts)
        abort();
    s->several = strchr(arg, ',');
    s->n_steps = 0;
    memset(s->listed, 0, sizeof s->listed);
    for (char *rest = texts, *text; (text = strsep(&rest, ","));) {
        uint64_t k = cli_count(state, "--steps", text);
        if (!k || k > PERTA_STEPS_MAX)
            argp_error(state, "--steps: must be from 1 to %d", PERTA_STEPS_MAX);
        else if (s->listed[k])
            argp_error(state, "--steps: %s is given twice", text);
        else
            s->listed[k] = true;
        s->n_steps = k > s->n_steps ? (unsigned)k : s->n_steps;
    }
    free(texts);
}

static void parse_survive(struct argp_state *state, struct perta_steps *s, const char *arg)
{
    char *texts = strdup(arg);
    if (!texts)
        abort();
    s->survive = 0;
    for (char *rest = texts, *text; (text = strsep(&rest, ","));) {
        int c = 1;
        while (c < PERTA_N_CONDITIONS &&
               strcmp(text, perta_condition_name((enum perta_condition)c)))
            c++;
        if (c == PERTA_N_CONDITIONS)
            argp_error(
                state,
                "--survive: %s; must be one or several of nf4, int8, int4, q4_0, fp8, drop, reteach",
                text);
        else if (s->survive & 1u << c)
            argp_error(state, "--survive: %s is given twice", text);
        else
            s->survive |= 1u << c;
    }
    free(texts);
}

static error_t parse_conditions(int key, char *arg, struct argp_state *state)
{
    struct unlearn_steps *own = state->input;
    struct perta_steps *s = &own->steps;
    own->tunes_reteach |= key >= KEY_RETEACH_UPDATES && key <= KEY_RETEACH_FACTOR;
    switch (key) {
    case KEY_SURVIVE:
        parse_survive(state, s, arg);
        return 0;
    case KEY_RETEACH_UPDATES:
        s->reteach.updates = cli_count(state, "--reteach-updates", arg);
        return 0;
    case KEY_RETEACH_RATE:
        s->reteach.learning_rate = cli_number(state, "--reteach-rate", arg);
        return 0;
    case KEY_RETEACH_FACTOR:
        s->reteach.factor = cli_number(state, "--reteach-factor", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct unlearn_steps *own = state->input;
    struct perta_steps *s = &own->steps;
    own->n_given += key >= KEY_DATA_FORGET && key <= KEY_COMPUTE;
    switch (key) {
    case KEY_STEPS:
        parse_steps(state, s, arg);
        return 0;
    case KEY_DATA_FORGET:
        s->data_forget = arg;
        return 0;
    case KEY_DATA_RETAIN:
        s->data_retain = arg;
        return 0;
    case KEY_DATA_KEY:
        s->data_key = arg;
        return 0;
    case KEY_BOX:
        s->box = cli_number(state, "--box", arg);
        if (!(s->box > 0)) /* 0 in the library means: no box */
            argp_error(state, "--box: %s; must be a finite number above 0", arg);
        return 0;
    case KEY_RETAIN_BATCH:
        s->retain_batch = cli_count(state, "--retain-batch", arg);
        if (!s->retain_batch) /* 0 in the library means: all */
            argp_error(state, "--retain-batch: 0; must be 1 or more");
        return 0;
    case KEY_STEP:
        s->rule.step = cli_number(state, "--step", arg);
        return 0;
    case KEY_BACK_OFF:
        s->rule.back_off = cli_number(state, "--back-off", arg);
        own->has_back_off = true;
        if (s->rule.back_off == 0) /* 0 in the library means: never back off */
            argp_error(state, "--back-off: 0; --method signed never backs off");
        return 0;
    case KEY_MAX_SCALE:
        s->rule.max_scale = cli_number(state, "--max-scale", arg);
        return 0;
    case KEY_STOP_FORGET:
        s->stop_forget = cli_number(state, "--stop-forget", arg);
        return 0;
    case KEY_STOP_PROBABILITY:
        s->stop_probability = cli_number(state, "--stop-probability", arg);
        return 0;
    case KEY_MAX_RETAIN_RISE:
        s->max_retain_rise = cli_number(state, "--max-retain-rise", arg);
        return 0;
    case KEY_MAX_TOKENS:
        s->max_tokens = cli_count(state, "--max-tokens", arg);
        return 0;
    case KEY_COMPUTE:
        s->compute = cli_compute(state, arg);
        return 0;
    default:
        return parse_conditions(key, arg, state);
    }
}

const struct argp unlearn_steps_argp = {options, parse, NULL, NULL, NULL, NULL, NULL};

void unlearn_steps_init(struct unlearn_steps *own)
{
    *own = (struct unlearn_steps){.steps = {.rule = {.step = 0.4, .back_off = 0.2, .max_scale = 3},
                                            .stop_forget = INFINITY,
                                            .stop_probability = INFINITY,
                                            .max_retain_rise = INFINITY,
                                            .reteach = {5, 0.01, 1}}};
}

void unlearn_steps_take(struct perta_steps *to, const struct perta_unlearn *from)
{
    to->model = from->model;
    to->tuned = from->tuned;
    to->base = from->base;
    to->patch = from->patch;
    to->out = from->out;
    to->globs = from->globs;
    to->one_way = from->one_way;
    to->force = from->force;
}

void unlearn_steps_check(struct argp_state *state, struct unlearn_steps *own, bool is_signed)
{
    const struct perta_steps *s = &own->steps;
    if (!s->n_steps && (own->n_given || is_signed))
        argp_error(state, "--method signed, signed-backoff and signed-hold, --data-forget, "
                          "--data-retain, --box and the options for them need --steps K");
    if (own->tunes_reteach && !(s->survive & 1u << PERTA_RETAUGHT))
        argp_error(state, "--reteach-updates, --reteach-rate and --reteach-factor need --survive "
                          "reteach");
}

static double real(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static bool has_patch(const json_t *summary, size_t step)
{
    size_t i;
    json_t *result;
    json_array_foreach (json_object_get(summary, "results"), i, result)
        if (real(result, "step") == (double)step)
            return true;
    return false;
}

/* A column for each condition that the first point of the path names: its name, or the number at a
 * point. */
static void say_conditions(const struct cli *cli, const json_t *first, const json_t *point)
{
    for (int c = 0; c < PERTA_N_CONDITIONS; c++) {
        const char *name = perta_condition_name((enum perta_condition)c);
        if (!json_object_get(json_object_get(first, "survive"), name))
            continue;
        if (point)
            cli_say(cli, "  %11.5f", real(json_object_get(point, "survive"), name));
        else
            cli_say(cli, "  %11s", name);
    }
}

/* At the end of the path, under each condition. */
static void say_end(const struct cli *cli, const json_t *summary)
{
    size_t i;
    json_t *end;
    json_array_foreach (json_object_get(summary, "conditions"), i, end) {
        cli_say(cli, "%s %s: probability %.5f of at most %g: %s", i ? "      " : "worst,",
                json_string_value(json_object_get(end, "condition")), real(end, "probability"),
                real(end, "limit"),
                json_is_true(json_object_get(end, "holds")) ? "holds" : "does not hold");
        if (json_object_get(end, "taught"))
            cli_say(cli, " (what was taught: %.5f)", real(end, "taught"));
        cli_say(cli, "\n");
    }
}

void unlearn_steps_say(const struct cli *cli, const json_t *summary)
{
    const json_t *path = json_object_get(summary, "path");
    size_t i;
    json_t *point;
    if (!json_array_size(path))
        return;
    if (json_object_get(summary, "box"))
        cli_say(cli, "box %.5g: task vector from the model's own gradient\n", real(summary, "box"));
    cli_say(cli, "step  forget loss  probability  retain loss  scales moved  mean scale");
    say_conditions(cli, json_array_get(path, 0), NULL);
    cli_say(cli, "\n");
    json_array_foreach (path, i, point) {
        if (json_object_get(point, "mean_from"))
            cli_say(cli, "mean");
        else
            cli_say(cli, "%4zu", i);
        cli_say(cli, "  %11.5f  %11.5f  %11.5f  %11.2f%%  %10.4f", real(point, "forget_loss"),
                real(point, "forget_probability"), real(point, "retain_loss"),
                100 * real(point, "moved"), real(point, "mean_scale"));
        say_conditions(cli, json_array_get(path, 0), point);
        cli_say(cli, "%s\n", has_patch(summary, i) ? "  <- a patch" : "");
    }
    say_end(cli, summary);
}

static void say_limit(const char *option, double limit, const char *what, double is)
{
    if (isfinite(limit))
        fprintf(stderr, "%s %g (%s is %.5f)", option, limit, what, is);
}

/* The conditions, besides the model as it is, under which the level does not hold. */
static void say_broken(const json_t *summary)
{
    const char *as_it_is = perta_condition_name(PERTA_AS_IT_IS);
    size_t i;
    json_t *end;
    json_array_foreach (json_object_get(summary, "conditions"), i, end) {
        const char *name = json_string_value(json_object_get(end, "condition"));
        if (strcmp(name, as_it_is) && json_is_false(json_object_get(end, "holds")))
            fprintf(stderr, " and --survive %s (probability is %.5f of at most %g)", name,
                    real(end, "probability"), real(end, "limit"));
    }
}

bool unlearn_steps_reached(const struct cli *cli, const struct perta_steps *s,
                           const json_t *summary)
{
    const json_t *chosen = json_object_get(summary, "chosen");
    const json_t *end =
        json_array_get(json_object_get(summary, "path"), (size_t)json_integer_value(chosen));
    if (!json_is_false(json_object_get(summary, "reached")))
        return true;
    bool own = !s->tuned && !s->base;
    fprintf(stderr, "perta %s: not enough is forgotten: ", cli->verb);
    say_limit("--stop-probability", s->stop_probability, "probability",
              real(end, "forget_probability"));
    if (isfinite(s->stop_probability) && isfinite(s->stop_forget))
        fputs(" and ", stderr);
    say_limit("--stop-forget", s->stop_forget, "loss", real(end, "forget_loss"));
    say_broken(summary);
    fprintf(stderr,
            ", not reached at step %lld, to which the patch leads; more --steps, a larger "
            "--step%s --max-scale%s%s would go further\n",
            (long long)json_integer_value(chosen), own ? "," : " or", own ? " or --box" : "",
            isfinite(s->max_retain_rise) ? " or --max-retain-rise" : "");
    return false;
}
