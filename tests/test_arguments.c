/* Arguments that make no sense: every verb returns PERTA_EUSAGE and a message that names the field
 * as the command spells it, whatever err and summary held before. It reads and writes nothing. */
#include <math.h>

#include "estimators/edit/unlearn.h"
#include "estimators/passes/accumulate.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/eval.h"
#include "estimators/passes/tune.h"
#include "estimators/steps/steps.h"
#include "stream/patch/apply.h"
#include "stream/patch/compose.h"
#include "stream/patch/dequantize.h"
#include "stream/patch/diff.h"
#include "stream/patch/manifest.h"
#include "tests/scratch.h"

static struct perta_err err;
static struct perta_run run;
static json_t *summary;

/* Like uninitialised variables on the stack. */
static void make_a_mess(void)
{
    memset(&err, 0xa5, sizeof err);
    summary = (json_t *)(uintptr_t)0xa5a5a5a5a5a5a5a5;
}

static void check(int rc, int code, const char *says, const char *what)
{
    ck_assert_msg(rc == code && err.code == code && strstr(err.msg, says), "%s: %d: %s", what, rc,
                  err.code == rc ? err.msg : "(none)");
    ck_assert_msg(!summary, "%s: a summary", what);
    ck_assert_uint_eq(count_entries("."), 0);
}

/* The good arguments, with one thing changed. */
#define BAD(verb, change, says)                                                                  \
    do {                                                                                         \
        struct perta_##verb job = good_##verb();                                                 \
        change;                                                                                  \
        make_a_mess();                                                                           \
        check(perta_##verb(&job, &run, &summary, &err), PERTA_EUSAGE, says, #verb ": " #change); \
    } while (0)

/* What all verbs check; and good arguments get as far as the files. */
#define COMMON(verb)                                                                           \
    do {                                                                                       \
        struct perta_##verb good = good_##verb();                                              \
        const struct perta_run as_it_was = run;                                                \
        make_a_mess();                                                                         \
        check(perta_##verb(&good, &run, &summary, &err), PERTA_EINPUT, "no such file", #verb); \
        make_a_mess();                                                                         \
        check(perta_##verb(NULL, &run, &summary, &err), PERTA_EUSAGE, "job is NULL", #verb);   \
        make_a_mess();                                                                         \
        check(perta_##verb(&good, NULL, &summary, &err), PERTA_EUSAGE, "run is NULL", #verb);  \
        make_a_mess();                                                                         \
        summary = NULL;                                                                        \
        check(perta_##verb(&good, &run, NULL, &err), PERTA_EUSAGE, "summary is NULL", #verb);  \
        ck_assert_int_eq(perta_##verb(&good, &run, &summary, NULL), PERTA_EUSAGE);             \
        ck_assert_int_eq(perta_##verb(NULL, NULL, NULL, NULL), PERTA_EUSAGE);                  \
        BAD(verb, run.memory_bytes = 0, "--memory");                                           \
        run = as_it_was;                                                                       \
        BAD(verb, run.n_threads = 257, "--threads: 1 to 256");                                 \
        run = as_it_was;                                                                       \
        BAD(verb, run.io = (enum perta_io_mode)4, "--io: 4");                                  \
        BAD(verb, run.io = (enum perta_io_mode) - 1, "--io: -1");                              \
        run = as_it_was;                                                                       \
    } while (0)

static void enter_nothing(void)
{
    enter();
    run = (struct perta_run){.memory_bytes = PERTA_MEMORY_DEFAULT, .n_threads = 1};
}

/* ---- folders ---- */

static struct perta_diff good_diff(void)
{
    return (struct perta_diff){.before = "a", .after = "b", .patch = "p"};
}

START_TEST(diff)
{
    COMMON(diff);
    BAD(diff, job.before = NULL, "OLD (before) is needed");
    BAD(diff, job.after = NULL, "NEW (after) is needed");
    BAD(diff, job.patch = NULL, "--patch DIR is needed");
    BAD(diff, job.patch = "", "--patch DIR is needed");
    BAD(diff, job = (struct perta_diff){0}, "OLD (before), NEW (after) and --patch DIR are needed");
}
END_TEST

static struct perta_apply good_apply(void)
{
    return (struct perta_apply){.model = "a", .patch = "p", .out = "o"};
}

START_TEST(apply)
{
    COMMON(apply);
    BAD(apply, job.model = NULL, "MODEL is needed");
    BAD(apply, job.patch = NULL, "PATCH is needed");
    BAD(apply, job.out = "", "--out: a name is needed");
    BAD(apply, job.mode = (enum perta_apply_mode)2, "mode: 2");
    BAD(apply, job = (struct perta_apply){0}, "MODEL and PATCH are needed");
}
END_TEST

static struct perta_dequantize good_dequantize(void)
{
    return (struct perta_dequantize){.model = "a", .out = "o"};
}

START_TEST(dequantize)
{
    COMMON(dequantize);
    BAD(dequantize, job.model = NULL, "MODEL is needed");
    BAD(dequantize, job.out = "", "--out DIR is needed");
    BAD(dequantize, job = (struct perta_dequantize){0}, "MODEL and --out DIR are needed");
}
END_TEST

static const char *const two[] = {"a", "b"}, *const with_none[] = {"a", NULL};

static struct perta_compose good_compose(void)
{
    return (struct perta_compose){.patches = two, .n_patches = 2, .patch = "p"};
}

START_TEST(compose)
{
    COMMON(compose);
    BAD(compose, job.n_patches = 1, "at least two patches");
    BAD(compose, job.patches = NULL, "patches: the list of 2 is NULL");
    BAD(compose, job.patches = with_none, "patches: number 2 of 2 is empty");
    BAD(compose, job.patch = NULL, "--patch DIR is needed");
    BAD(compose, job.model = "", "--model: a name is needed");
}
END_TEST

static struct perta_accumulate good_accumulate(void)
{
    return (struct perta_accumulate){.gradients = two, .n_gradients = 2, .out = "o", .mean = true};
}

START_TEST(accumulate)
{
    COMMON(accumulate);
    BAD(accumulate, job.n_gradients = 0, "no gradients given");
    BAD(accumulate, job.gradients = NULL, "gradients: the list of 2 is NULL");
    BAD(accumulate, job.gradients = with_none, "gradients: number 2 of 2 is empty");
    BAD(accumulate, job.out = NULL, "--out DIR is needed");
    BAD(accumulate, job.mean = false, "--stat: mean, meansq or both");
}
END_TEST

START_TEST(manifest_and_verify)
{
    make_a_mess();
    check(perta_manifest(NULL, true, NULL, &run, &summary, &err), PERTA_EUSAGE, "PATH is needed",
          "");
    check(perta_manifest("a", true, NULL, NULL, &summary, &err), PERTA_EUSAGE, "run is NULL", "");
    check(perta_manifest("a", true, NULL, &run, NULL, &err), PERTA_EUSAGE, "summary is NULL", "");
    ck_assert_int_eq(perta_manifest("a", true, NULL, &run, &summary, NULL), PERTA_EUSAGE);
    make_a_mess();
    check(perta_manifest("a", true, NULL, &run, &summary, &err), PERTA_EINPUT, "no such file", "");
    make_a_mess();
    check(perta_manifest_verify("a", NULL, &run, &summary, &err), PERTA_EUSAGE, "--manifest FILE",
          "");
    check(perta_manifest_verify(NULL, "a", &run, &summary, &err), PERTA_EUSAGE, "PATH is needed",
          "");
    ck_assert_int_eq(perta_manifest_verify("a", "b", &run, &summary, NULL), PERTA_EUSAGE);
    make_a_mess();
    check(perta_patch_verify(NULL, &run, &summary, &err), PERTA_EUSAGE, "PATH is needed", "");
    ck_assert_int_eq(perta_patch_verify("a", &run, &summary, NULL), PERTA_EUSAGE);
    make_a_mess();
    check(perta_model_verify(NULL, "p", true, &run, &summary, &err), PERTA_EUSAGE, "PATH (model)",
          "");
    check(perta_model_verify("a", NULL, true, &run, &summary, &err), PERTA_EUSAGE, "--patch DIR",
          "");
    ck_assert_int_eq(perta_model_verify("a", "p", true, &run, &summary, NULL), PERTA_EUSAGE);
}
END_TEST

/* ---- an edit ---- */

static struct perta_unlearn good_unlearn(void)
{
    return (struct perta_unlearn){.model = "a",
                                  .tuned = "b",
                                  .base = "c",
                                  .forget = "f",
                                  .retain = "r",
                                  .patch = "p",
                                  .n_alphas = 2,
                                  .alphas = {{0.3f, "0.3"}, {-2, "-2e0"}}};
}

START_TEST(unlearn)
{
    COMMON(unlearn);
    BAD(unlearn, job = (struct perta_unlearn){0}, "--alpha: 1 to 32 values are needed, not 0");
    BAD(unlearn, job.n_alphas = 33, "--alpha: 1 to 32");
    BAD(unlearn, job.alphas[1].text = NULL, "--alpha");
    BAD(unlearn, job.alphas[1].text = "", "--alpha");
    BAD(unlearn, job.alphas[1].text = "../x", "as a decimal number");
    BAD(unlearn, job.alphas[1].text = "000000000000000000000000000000002",
        "of at most 32 characters");
    BAD(unlearn, job.alphas[1].text = "1e39", "1e39 does not fit in float32");
    BAD(unlearn, job.alphas[1].value = NAN, "does not fit in float32");
    BAD(unlearn, job.alphas[1].value = INFINITY, "does not fit in float32");
    BAD(unlearn, job.alphas[1].value = 2, "--alpha: the value is 2, but its text is -2e0");
    BAD(unlearn, job.alphas[1] = job.alphas[0], "--alpha: 0.3 is given twice");
    BAD(unlearn, job.model = NULL, "--model DIR is needed");
    BAD(unlearn, job.tuned = NULL, "--tuned DIR is needed");
    BAD(unlearn, job.patch = NULL, "--patch DIR is needed");
    BAD(unlearn, job.base = "", "--base: a name is needed");
    BAD(unlearn, job.forget = "", "--forget: a name is needed");
    BAD(unlearn, job.retain = "", "--retain: a name is needed");
    BAD(unlearn, job.out = "", "--out: a name is needed");
    BAD(unlearn, job.forget = NULL, "--method grad needs --forget and --retain");
    BAD(unlearn, job.retain = NULL, "--method grad needs --forget and --retain");
    BAD(unlearn, job.rule.method = (enum perta_method)7, "--method: 7");
    BAD(unlearn, job.rule.method = (enum perta_method) - 1, "--method: -1");
    BAD(unlearn, job.rule.method = PERTA_SCALE, "scale");
    BAD(unlearn, job.scale = "s", "scale");
    BAD(unlearn, job.box = "b", "box: only PERTA_SCALE takes it");
    BAD(unlearn, (job.box = job.scale = "b", job.rule.method = PERTA_SCALE),
        "box: only PERTA_SCALE takes it, and in place of --tuned and --base");
    BAD(unlearn, job.rule.power = 2, "--power P");
    BAD(unlearn, job.rule.power = (double)NAN, "--power P");
    BAD(unlearn, job.rule.method = PERTA_POWER, "--power P");
    BAD(unlearn, (job.rule.method = PERTA_POWER, job.rule.power = (double)NAN),
        "--power: must be above 0");
    BAD(unlearn, (job.rule.method = PERTA_POWER, job.rule.power = -1), "--power: must be above 0");
    BAD(unlearn, (job.rule.method = PERTA_POWER, job.rule.power = 65),
        "--power: must be above 0 and at most 64");
    BAD(unlearn, job.rule.weight = 0.5, "--weight W");
    BAD(unlearn, (job.rule.method = PERTA_CONSTANT, job.rule.weight = 2),
        "--weight: must be from 0 to 1");
    BAD(unlearn, (job.rule.method = PERTA_CONSTANT, job.rule.weight = (double)NAN),
        "--weight: must be from 0 to 1");
    BAD(unlearn, job.rule.seed = 1, "--seed: only --method random takes it");
    BAD(unlearn, job.missing = (enum perta_missing)3, "--missing: 3");
    BAD(unlearn, job.globs.n_include = 1, "--include: the list of 1 is NULL");
    BAD(unlearn, (job.globs.n_exclude = 2, job.globs.exclude = with_none),
        "--exclude: number 2 of 2");
}
END_TEST

/* ---- with a model ---- */

#if HAS_MODEL
static const struct perta_scaled_paths nowhere = {.tuned = "t", .scale = "s"},
                                       both = {"t", "b", "s", .box = "x", .box_size = 1},
                                       all_dropped = {"t", "b", "s", .drop = 1};

static struct perta_estimate good_estimate(void)
{
    return (struct perta_estimate){.model = "a", .data = "d", .out = "o", .mean = true};
}

START_TEST(estimate)
{
    COMMON(estimate);
    BAD(estimate, job.model = NULL, "--model DIR is needed");
    BAD(estimate, job.data = NULL, "--data FILE is needed");
    BAD(estimate, job.out = NULL, "--out DIR is needed");
    BAD(estimate, job.adapter = "", "--adapter: a name is needed");
    BAD(estimate, job.data_key = "", "--data-key: a name is needed");
    BAD(estimate, job.scratch = "", "--scratch: a name is needed");
    BAD(estimate, job.mean = false, "--stat: mean, meansq or both");
    BAD(estimate, job.compute = (enum perta_compute)4, "--compute: 4");
    BAD(estimate, job.quantize = (enum perta_rounding)6, "--quantize: 6");
    BAD(estimate, job.at = &nowhere, "base (of at) is needed");
    BAD(estimate, job.at = &both, "box (of at), or tuned and base, not both");
    BAD(estimate, job.at = &all_dropped, "drop (of at): 1; must be at least 0, and below 1");
    BAD(estimate, job.pick.what = PERTA_PICK_BATCH, "pick: its size must be above 0");
    BAD(estimate, job.pick.what = (enum perta_picked)4, "pick: 4");
}
END_TEST

static struct perta_eval good_eval(void)
{
    return (struct perta_eval){.model = "a", .data = "d"};
}

START_TEST(eval)
{
    COMMON(eval);
    BAD(eval, job.model = NULL, "--model DIR is needed");
    BAD(eval, job.data = NULL, "--data FILE is needed");
    BAD(eval, job.patch = "", "--patch: a name is needed");
    BAD(eval, job.adapter = "", "--adapter: a name is needed");
    BAD(eval, job.scratch = "", "--scratch: a name is needed");
    BAD(eval, job.compute = (enum perta_compute) - 1, "--compute: -1");
    BAD(eval, job.quantize = (enum perta_rounding)6, "--quantize: 6");
    BAD(eval, job.generate = PERTA_GENERATE_MAX + 1, "--generate: at most 1048576");
    BAD(eval, job.at = &nowhere, "base (of at) is needed");
    BAD(eval, (job.at = &nowhere, job.patch = "p"), "--patch or at, not both");
    BAD(eval, (job.pick.what = PERTA_PICK_SOME, job.pick.size = 1), "pick: only with as_estimate");
    BAD(eval, (job.pick.what = PERTA_PICK_SOME, job.as_estimate = true), "pick: its size");
}
END_TEST

static struct perta_tune good_tune(void)
{
    return (struct perta_tune){.model = "a", .data = "d", .out = "o"};
}

START_TEST(tune)
{
    static const char *const none[] = {NULL}, *const one[] = {"q_proj"};
    const double nan = (double)NAN;
    COMMON(tune);
    BAD(tune, job.model = NULL, "--model DIR is needed");
    BAD(tune, job.data = NULL, "--data FILE is needed");
    BAD(tune, job.out = "", "--out DIR is needed");
    BAD(tune, job.adapter = "", "--adapter: a name is needed");
    BAD(tune, job.patch = "", "--patch: a name is needed");
    BAD(tune, job.scratch = "", "--scratch: a name is needed");
    BAD(tune, job.rank = 1 << 20, "--rank: must be at most 65536");
    BAD(tune, job.lora_alpha = nan, "--lora-alpha: must be a finite number");
    BAD(tune, job.n_targets = 1, "--target-modules: the list of 1 is NULL");
    BAD(tune, (job.n_targets = 1, job.targets = none), "--target-modules: number 1 of 1");
    BAD(tune, (job.n_targets = 1, job.targets = one, job.adapter = "x"), "--adapter has its own");
    BAD(tune, job.learning_rate = nan, "--learning-rate: must be a finite number, not below 0");
    BAD(tune, job.scheduler = (enum perta_lr_scheduler)3, "--lr-scheduler: 3");
    BAD(tune, job.warmup = 2.5, "--warmup: a whole number of updates, or a share below 1");
    BAD(tune, job.epochs = job.steps = 1, "--epochs or --steps, not both");
    BAD(tune, job.epochs = UINT64_MAX, "--epochs: must be at most");
    BAD(tune, job.weight_decay = -1, "--weight-decay: must be a finite number");
    BAD(tune, job.max_grad_norm = nan, "--max-grad-norm: must be a finite number");
    BAD(tune, job.seed = UINT64_MAX, "--seed: must be at most");
    BAD(tune, job.compute = (enum perta_compute)4, "--compute: 4");
    BAD(tune, job.quantize = (enum perta_rounding)6, "--quantize: 6");
    BAD(tune, job.at = &both, "box (of at), or tuned and base, not both");
    BAD(tune, job.pick.what = PERTA_PICK_REST, "pick: its size must be above 0");
}
END_TEST

static struct perta_steps good_steps(void)
{
    return (struct perta_steps){.model = "a",
                                .tuned = "b",
                                .base = "c",
                                .data_forget = "f",
                                .data_retain = "r",
                                .n_steps = 2,
                                .rule = {0.4, 0, 3},
                                .stop_forget = (double)INFINITY,
                                .stop_probability = 0.5,
                                .max_retain_rise = (double)INFINITY,
                                .patch = "p"};
}

START_TEST(steps)
{
    const double nan = (double)NAN, infinite = (double)INFINITY;
    const unsigned nf4 = 1u << PERTA_AT_NF4, taught = 1u << PERTA_RETAUGHT;
    COMMON(steps);
    BAD(steps, job.model = NULL, "--model DIR is needed");
    BAD(steps, job.tuned = NULL, "--tuned DIR is needed");
    BAD(steps, job.base = NULL, "--base DIR is needed");
    BAD(steps, job.data_forget = NULL, "--data-forget FILE is needed");
    BAD(steps, job.data_retain = NULL, "--data-retain FILE is needed");
    BAD(steps, job.patch = NULL, "--patch DIR is needed");
    BAD(steps, job.n_steps = 0, "--steps: must be from 1 to 1000");
    BAD(steps, job.n_steps = 1001, "--steps: must be from 1 to 1000");
    BAD(steps, job.out = "", "--out: a name is needed");
    BAD(steps, job.data_key = "", "--data-key: a name is needed");
    BAD(steps, job.listed[0] = true, "--steps: must be from 1 to 1000, but 0 is listed");
    BAD(steps, job.listed[3] = true, "--steps: 3 is listed, but there are 2 (n_steps)");
    BAD(steps, job.rule.step = 0, "--step: 0; must be from 0.001");
    BAD(steps, job.rule.step = nan, "--step: nan");
    BAD(steps, job.rule.back_off = -1, "--back-off: -1");
    BAD(steps, job.rule.back_off = nan, "--back-off: nan");
    BAD(steps, job.rule.max_scale = infinite, "--max-scale: inf");
    BAD(steps, job.stop_forget = 0, "--stop-forget: 0");
    BAD(steps, job.stop_forget = nan, "--stop-forget: nan");
    BAD(steps, job.stop_probability = 0, "--stop-probability: 0; must be between 0 and 1");
    BAD(steps, job.stop_probability = nan, "--stop-probability: nan");
    BAD(steps, job.max_retain_rise = nan, "--max-retain-rise: nan");
    BAD(steps, (job.hold = true, job.several = true), "takes one number of steps");
    BAD(steps, (job.hold = true, job.stop_probability = infinite), "needs --stop-probability P");
    BAD(steps, job.survive = 1u << PERTA_AS_IT_IS, "--survive: there is no such condition");
    BAD(steps, job.survive = 1u << PERTA_N_CONDITIONS, "--survive: there is no such condition");
    BAD(steps, (job.survive = nf4, job.stop_probability = infinite), "--survive needs --stop-pro");
    BAD(steps, (job.survive = nf4, job.several = true), "--survive takes one number of steps");
    BAD(steps, job.survive = taught, "--reteach-updates: must be from 1 to 1000");
    BAD(steps, (job.survive = taught, job.reteach.updates = 1),
        "--reteach-rate: 0; must be a finite");
    BAD(steps, (job.survive = taught, job.reteach = (struct perta_reteach){1, nan, 1}),
        "--reteach-rate: nan");
    BAD(steps, (job.survive = taught, job.reteach = (struct perta_reteach){1, 1, 0}),
        "--reteach-factor: 0; must be a finite");
    BAD(steps, job.compute = (enum perta_compute)9, "--compute: 9");
    BAD(steps, job.globs.n_include = 1, "--include");
    BAD(steps, (job.several = true, job.retain_batch = 1), "--retain-batch takes one number");
    BAD(steps, job.box = 0.1, "--box C forms the task vector from the model itself");
    BAD(steps, (job.box = 0.1, job.tuned = NULL), "cannot be used with --tuned and --base");
    BAD(steps, job.box = -0.1, "--box: -0.1; must be a finite number above 0");
    BAD(steps, job.box = nan, "--box: nan");
    BAD(steps, job.box = infinite, "--box: inf");
    BAD(steps, job.box = 1e39, "--box: 1e+39");
    BAD(steps, job.box = 1e-60, "--box: 1e-60");
}
END_TEST
#endif

int main(void)
{
    TCase *tests = tcase_create("arguments");
    tcase_add_checked_fixture(tests, enter_nothing, leave);
    tcase_add_test(tests, diff);
    tcase_add_test(tests, apply);
    tcase_add_test(tests, compose);
    tcase_add_test(tests, dequantize);
    tcase_add_test(tests, accumulate);
    tcase_add_test(tests, manifest_and_verify);
    tcase_add_test(tests, unlearn);
#if HAS_MODEL
    tcase_add_test(tests, estimate);
    tcase_add_test(tests, eval);
    tcase_add_test(tests, tune);
    tcase_add_test(tests, steps);
#endif
    return run_suite("arguments", tests);
}
