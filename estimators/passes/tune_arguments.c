#include <math.h>
#include <string.h>

#include "estimators/passes/pass_arguments.h"
#include "estimators/passes/tune_job.h"

#define RANK_MAX 65536u
#define COUNT_MAX (1u << 30)

const char *perta_lr_scheduler_name(enum perta_lr_scheduler scheduler)
{
    static const char *const names[] = {"linear", "cosine", "constant"};
    return names[scheduler];
}

static int check_number(const char *name, double value, struct perta_err *err)
{
    return isfinite(value) && value >= 0
               ? 0
               : perta_fail(err, PERTA_EUSAGE, "%s: must be a finite number, not below 0", name);
}

static int check_count(const char *name, uint64_t value, uint64_t most, struct perta_err *err)
{
    return value <= most ? 0
                         : perta_fail(err, PERTA_EUSAGE, "%s: must be at most %llu", name,
                                      (unsigned long long)most);
}

static int check_adapter(const struct perta_tune *t, struct perta_err *err)
{
    int rc = check_count("--rank", t->rank, RANK_MAX, err);
    if (!rc && !isfinite(t->lora_alpha))
        rc = perta_fail(err, PERTA_EUSAGE, "--lora-alpha: must be a finite number");
    if (!rc)
        rc = perta_arguments_list("--target-modules", t->targets, t->n_targets, err);
    if (!rc && t->adapter && (t->rank || t->lora_alpha != 0 || t->n_targets))
        rc = perta_fail(err, PERTA_EUSAGE,
                        "--adapter has its own rank, alpha and modules: leave out --rank, "
                        "--lora-alpha and --target-modules");
    return rc;
}

static int check_training(const struct perta_tune *t, struct perta_err *err)
{
    int rc = check_number("--learning-rate", t->learning_rate, err);
    if (!rc)
        rc =
            perta_arguments_choice("--lr-scheduler", (int)t->scheduler, PERTA_LR_CONSTANT + 1, err);
    if (!rc)
        rc = check_number("--warmup", t->warmup, err);
    if (!rc && t->warmup >= 1 && t->warmup != floor(t->warmup))
        rc = perta_fail(err, PERTA_EUSAGE,
                        "--warmup: a whole number of updates, or a share below 1");
    if (!rc && t->epochs && t->steps)
        rc = perta_fail(err, PERTA_EUSAGE, "--epochs or --steps, not both");
    if (!rc)
        rc = check_count("--epochs", t->epochs, COUNT_MAX, err);
    if (!rc)
        rc = check_count("--steps", t->steps, COUNT_MAX, err);
    if (!rc)
        rc = check_count("--seed", t->seed, INT64_MAX, err);
    if (!rc)
        rc = check_number("--weight-decay", t->weight_decay, err);
    return rc ? rc : check_number("--max-grad-norm", t->max_grad_norm, err);
}

int perta_tune_arguments(struct perta_tune_job *job, const struct perta_tune *t,
                         struct perta_err *err)
{
    static const char *const default_targets[] = {"q_proj", "v_proj"};
    const struct perta_argument needed[] = {
        {"--model DIR", t->model}, {"--data FILE", t->data}, {"--out DIR", t->out}};
    const struct perta_argument given[] = {{"--patch", t->patch},
                                           {"--adapter", t->adapter},
                                           {"--data-key", t->data_key},
                                           {"--scratch", t->scratch}};
    int rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (!rc)
        rc = perta_arguments_optional(given, sizeof given / sizeof *given, err);
    if (!rc)
        rc = check_adapter(t, err);
    if (!rc)
        rc = check_training(t, err);
    if (!rc)
        rc = perta_compute_argument(t->compute, err);
    if (!rc)
        rc = perta_rounding_argument(t->quantize, err);
    if (!rc)
        rc = perta_scaled_arguments(t->at, err);
    if (!rc)
        rc = perta_pick_argument(&t->pick, err);
    if (rc)
        return rc;
    job->tune = *t;
    if (!t->n_targets) {
        job->tune.targets = default_targets;
        job->tune.n_targets = 2;
    }
    job->tune.rank = t->rank ? t->rank : 8;
    job->tune.lora_alpha = t->lora_alpha != 0 ? t->lora_alpha : 8;
    job->tune.epochs = t->epochs || t->steps ? t->epochs : 3;
    job->tune.batch_size = t->batch_size ? t->batch_size : 8;
    job->estimate = (struct perta_estimate){.model = t->model,
                                            .adapter = t->adapter,
                                            .quantize = t->quantize,
                                            .at = t->at,
                                            .data = t->data,
                                            .data_xxh128 = t->data_xxh128,
                                            .pick = t->pick,
                                            .data_key = t->data_key,
                                            .out = t->out,
                                            .max_tokens = t->max_tokens,
                                            .compute = t->compute,
                                            .scratch = t->scratch,
                                            .force = t->force};
    return 0;
}
