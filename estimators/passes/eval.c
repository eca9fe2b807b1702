#include "estimators/passes/eval.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "estimators/passes/estimate_job.h"
#include "estimators/passes/generate.h"
#include "estimators/passes/measures.h"
#include "estimators/passes/pass_arguments.h"
#include "io/fpenv.h"
#include "io/text.h"

/* ---- numbers ---- */

/* Score of one answer. */
struct score {
    double loss; /* mean over its labels */
    uint64_t n_labels, n_right;
};

static int score_of(const struct perta_estimate_job *job, uint64_t sample, struct score *score,
                    struct perta_err *err)
{
    const struct perta_head *h = &job->head;
    *score = (struct score){.n_labels = h->starts[sample + 1] - h->starts[sample]};
    for (size_t i = h->starts[sample]; i < h->starts[sample + 1]; i++)
        score->n_right += h->best[i] == h->target[i];
    return perta_estimate_loss(job, sample, &score->loss, err);
}

/* Sums over lines, and over lines with perturbed answers or with more than one label. */
struct sums {
    uint64_t n, n_perturbed, n_memorization;
    double loss, probability, exact, accuracy;
    double choice, ratio, ratio_forget, ratio_retain;
    struct perta_measures measures;
    const double *norms; /* of each line's gradient; NULL: not wanted */
    uint64_t n_norms;
    double norm;
};

/* The other answers of a line. */
struct others {
    double paraphrased; /* loss of the paraphrased answer, or of the line's own */
    uint64_t n_perturbed;
    double loss, probability; /* of the perturbed answers: mean, sum */
};

static uint64_t count_perturbed(const struct perta_samples *s, uint64_t at)
{
    uint64_t n = 0;
    for (at++; at < s->n && s->kinds[at] != PERTA_SAMPLE; at++)
        n += s->kinds[at] == PERTA_PERTURBED;
    return n;
}

/* Go through the other answers that follow sample number at, whose loss is answer. *next is the
 * first sample of the next line. */
static int take_others(const struct perta_estimate_job *job, uint64_t at, uint64_t *next,
                       double answer, struct others *o, json_t **item, struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    json_t *list = json_array();
    struct score score;
    int rc = 0;
    *o = (struct others){.paraphrased = answer, .n_perturbed = count_perturbed(s, at)};
    for (*next = at + 1; !rc && *next < s->n && s->kinds[*next] != PERTA_SAMPLE; ++*next) {
        rc = score_of(job, *next, &score, err);
        if (s->kinds[*next] == PERTA_PERTURBED) {
            o->loss += score.loss / (double)o->n_perturbed;
            o->probability += exp(-score.loss);
            perta_json_append(&list, perta_real_json(score.loss));
            continue;
        }
        o->paraphrased = score.loss;
        perta_json_set(item, "paraphrased_loss", perta_real_json(score.loss));
    }
    if (o->n_perturbed)
        perta_json_set(item, "perturbed_loss", json_incref(list));
    json_decref(list);
    return rc;
}

/* Add the measures of the TOFU benchmark. */
static void add_perturbed(struct sums *sums, const struct others *o, double answer, json_t **item)
{
    double ratio = exp(o->paraphrased - o->loss);
    double choice = exp(-answer) / (exp(-answer) + o->probability);
    sums->n_perturbed++;
    sums->choice += choice;
    sums->ratio += ratio;
    sums->ratio_forget += ratio < 1 ? ratio : 1 / ratio;
    sums->ratio_retain += ratio < 1 ? 1 - ratio : 0;
    perta_json_set(item, "choice_probability", perta_real_json(choice));
    perta_json_set(item, "truth_ratio", perta_real_json(ratio));
}

/* Add the measures of a line's answer. */
static int add_measures(const struct perta_estimate_job *job, uint64_t at, struct sums *sums,
                        json_t **item, struct perta_err *err)
{
    struct perta_measures m, *sum = &sums->measures;
    int rc = perta_measures_of(&job->head, at, &m, err);
    if (rc)
        return rc;
    bool some = !isnan(m.exact_memorization);
    sums->n_memorization += some;
    sum->exact_memorization += some ? m.exact_memorization : 0;
    sum->extraction_strength += m.extraction_strength;
    sum->min_k += m.min_k;
    sum->min_k_plus_plus += m.min_k_plus_plus;
    perta_json_set(item, "exact_memorization", perta_real_json(m.exact_memorization));
    perta_json_set(item, "extraction_strength", perta_real_json(m.extraction_strength));
    perta_json_set(item, "min_k", perta_real_json(m.min_k));
    perta_json_set(item, "min_k_plus_plus", perta_real_json(m.min_k_plus_plus));
    return 0;
}

/* Add the norm of a line's gradient; null for an answer whose only label is left out. */
static int add_norm(const struct perta_estimate_job *job, uint64_t at, const struct score *answer,
                    struct sums *sums, json_t **item, struct perta_err *err)
{
    double norm = sums->norms[sums->n - 1];
    if (!isfinite(norm))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: line %llu: the norm of the gradient is not a finite number",
                          job->estimate->data, (unsigned long long)job->samples.lines[at]);
    bool some = answer->n_labels > 1;
    sums->n_norms += some;
    sums->norm += some ? norm : 0;
    perta_json_set(item, "gradient_norm", some ? perta_real_json(norm) : json_null());
    return 0;
}

/* Add a line: sample number at and the other answers that follow it. *next is the first sample of
 * the next line. */
static int add_line(const struct perta_estimate_job *job, uint64_t at, uint64_t *next,
                    struct sums *sums, json_t **list, struct perta_err *err)
{
    struct score answer;
    struct others others = {0};
    json_t *item = json_object();
    int rc = score_of(job, at, &answer, err);
    if (!rc)
        rc = take_others(job, at, next, answer.loss, &others, &item, err);
    bool exact = answer.n_right == answer.n_labels;
    double accuracy = (double)answer.n_right / (double)answer.n_labels;
    sums->n++;
    sums->loss += answer.loss;
    sums->probability += exp(-answer.loss);
    sums->exact += exact;
    sums->accuracy += accuracy;
    perta_json_set(&item, "line", json_integer((json_int_t)job->samples.lines[at]));
    perta_json_set(&item, "labels", json_integer((json_int_t)answer.n_labels));
    perta_json_set(&item, "loss", perta_real_json(answer.loss));
    perta_json_set(&item, "probability", perta_real_json(exp(-answer.loss)));
    perta_json_set(&item, "exact_match", json_boolean(exact));
    perta_json_set(&item, "accuracy", perta_real_json(accuracy));
    if (!rc && job->measured)
        rc = add_measures(job, at, sums, &item, err);
    if (!rc && sums->norms)
        rc = add_norm(job, at, &answer, sums, &item, err);
    if (others.n_perturbed)
        add_perturbed(sums, &others, answer.loss, &item);
    perta_json_append(list, item);
    return rc;
}

static void set_mean(json_t **summary, const char *name, double sum, uint64_t n)
{
    if (n)
        perta_json_set(summary, name, perta_real_json(sum / (double)n));
}

static void set_measures(json_t **summary, const struct sums *sums)
{
    const struct perta_measures *sum = &sums->measures;
    set_mean(summary, "exact_memorization", sum->exact_memorization, sums->n_memorization);
    set_mean(summary, "extraction_strength", sum->extraction_strength, sums->n);
    set_mean(summary, "min_k", sum->min_k, sums->n);
    set_mean(summary, "min_k_plus_plus", sum->min_k_plus_plus, sums->n);
}

static int report(const struct perta_estimate_job *job, const double *norms, bool per_sample,
                  json_t **summary, struct perta_err *err)
{
    struct sums sums = {.norms = norms};
    json_t *list = json_array();
    int rc = 0;
    for (uint64_t at = 0; at < job->samples.n && !rc;)
        rc = add_line(job, at, &at, &sums, &list, err);
    set_mean(summary, "loss", sums.loss, sums.n);
    set_mean(summary, "probability", sums.probability, sums.n);
    set_mean(summary, "exact_match", sums.exact, sums.n);
    set_mean(summary, "accuracy", sums.accuracy, sums.n);
    if (job->measured)
        set_measures(summary, &sums);
    set_mean(summary, "gradient_norm", sums.norm, sums.n_norms);
    set_mean(summary, "choice_probability", sums.choice, sums.n_perturbed);
    set_mean(summary, "truth_ratio", sums.ratio, sums.n_perturbed);
    set_mean(summary, "truth_ratio_forget", sums.ratio_forget, sums.n_perturbed);
    set_mean(summary, "truth_ratio_retain", sums.ratio_retain, sums.n_perturbed);
    perta_json_set(summary, "perturbed_samples", json_integer((json_int_t)sums.n_perturbed));
    if (per_sample)
        perta_json_set(summary, "per_sample", json_incref(list));
    json_decref(list);
    perta_json_set(summary, "batches", json_integer((json_int_t)job->n_batches));
    perta_json_set(summary, "read_bytes", json_integer((json_int_t)job->weights.read_bytes));
    perta_json_set(summary, "scratch_bytes", json_integer((json_int_t)job->scratch.file_bytes));
    return rc;
}

/* ---- the way forward ---- */

/* Set total_bytes: every weight is read once, except an embedding that is not the head's, of which
 * only rows are read. */
static void count_bytes(struct perta_estimate_job *job)
{
    for (uint64_t i = 0; i < job->weights.ck->n_tensors; i++) {
        const struct perta_ref *t = &job->weights.ck->by_name[i];
        if (job->weights.llm.tied ||
            strcmp(t->tensor->name, perta_weights_embedding(&job->weights)))
            job->total_bytes += perta_weights_stored(&job->weights, t);
    }
}

static int start(struct perta_estimate_job *job, struct perta_err *err)
{
    int rc = perta_estimate_scratch_here(job, err);
    if (!rc)
        rc = perta_estimate_plan(job, perta_estimate_bf16(job), err);
    if (!rc)
        rc = perta_weights_start(&job->weights, job->run->io, err);
    count_bytes(job);
    return rc ? rc : perta_estimate_open_head(job, NULL, err);
}

static int run_all(struct perta_estimate_job *job, struct perta_generation *generation,
                   struct perta_err *err)
{
    struct perta_store *x = &job->x[0];
    int rc = perta_store_open(x, &job->scratch, NULL, job->samples.n_tokens,
                              job->weights.llm.hidden, err);
    if (!rc && generation->most)
        rc = perta_generation_open(generation, job, err);
    if (!rc)
        rc = perta_estimate_forward_all(job, x, err);
    if (!rc && generation->most)
        rc = perta_generation_run(generation, job, err);
    return rc ? rc : perta_weights_unchanged(&job->weights, err);
}

/* Begin the summary: numbers of lines, and of tokens of all answers. */
static json_t *summary_of(const struct perta_samples *s)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < s->n; i++)
        n += s->kinds[i] == PERTA_SAMPLE;
    return json_pack("{s:I, s:I, s:O}", "samples", (json_int_t)n, "tokens", (json_int_t)s->n_tokens,
                     "notes", s->notes);
}

static int open_job(struct perta_estimate_job *job, const struct perta_eval *eval,
                    struct perta_patched *patched, struct perta_err *err)
{
    int rc = perta_estimate_open(job, err);
    return rc ? rc : perta_estimate_apply(job, eval->patch, patched, err);
}

/* The norms of the lines' gradients, in a pass of its own over the lines' own answers. xxh128:
 * digest of the data that it read. */
static int run_norms(const struct perta_eval *eval, const struct perta_estimate *estimate,
                     const struct perta_run *run, struct perta_norms *norms,
                     char xxh128[PERTA_XXH128_HEX], struct perta_err *err)
{
    struct perta_estimate_job *job = calloc(1, sizeof *job);
    struct perta_patched patched = {0};
    if (!job)
        return perta_fail_sys(err, ENOMEM, "eval");
    job->estimate = estimate;
    job->run = run;
    job->norms = norms;
    int rc = open_job(job, eval, &patched, err);
    if (!rc)
        rc = perta_estimate_norms(job, err);
    memcpy(xxh128, job->samples.file.xxh128, PERTA_XXH128_HEX);
    perta_estimate_release(job);
    perta_patched_close(&patched);
    free(job);
    return rc;
}

static int run_job(struct perta_estimate_job *job, const struct perta_eval *eval,
                   const double *norms, struct perta_patched *patched,
                   struct perta_generation *generation, json_t **summary, struct perta_err *err)
{
    int rc = open_job(job, eval, patched, err);
    if (!rc && eval->generate)
        rc = perta_generation_begin(generation, job, eval->generate, err);
    if (rc)
        return rc;
    *summary = summary_of(&job->samples);
    perta_json_set(summary, "unknown_config_keys", perta_llm_unknown_keys(job->weights.ck->config));
    perta_estimate_say_rounded(job, summary);
    if (!job->run->dry_run)
        rc = start(job, err);
    if (!rc && !job->run->dry_run)
        rc = run_all(job, generation, err);
    if (!rc && !job->run->dry_run)
        rc = report(job, norms, eval->per_sample || eval->generate, summary, err);
    if (!rc && !job->run->dry_run && eval->generate)
        perta_generation_report(generation, summary);
    return rc || *summary ? rc : perta_fail_sys(err, ENOMEM, "eval");
}

static int run_eval(const struct perta_eval *eval, const struct perta_estimate *estimate,
                    const struct perta_run *run, const double *norms, json_t **summary,
                    struct perta_err *err)
{
    struct perta_estimate_job *job = calloc(1, sizeof *job);
    struct perta_patched patched = {0};
    struct perta_generation generation = {0};
    if (!job)
        return perta_fail_sys(err, ENOMEM, "eval");
    job->estimate = estimate;
    job->run = run;
    job->answers = job->measured = !eval->as_estimate;
    int rc = run_job(job, eval, norms, &patched, &generation, summary, err);
    perta_generation_close(&generation, job);
    perta_estimate_release(job);
    perta_patched_close(&patched);
    free(job);
    return rc;
}

static int check_arguments(const struct perta_eval *e, struct perta_err *err)
{
    const struct perta_argument needed[] = {{"--model DIR", e->model}, {"--data FILE", e->data}};
    const struct perta_argument given[] = {
        {"--patch", e->patch}, {"--adapter", e->adapter}, {"--scratch", e->scratch}};
    int rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (!rc)
        rc = perta_arguments_optional(given, sizeof given / sizeof *given, err);
    if (!rc && e->generate > PERTA_GENERATE_MAX)
        rc = perta_fail(err, PERTA_EUSAGE, "--generate: at most %u", PERTA_GENERATE_MAX);
    if (!rc && e->patch && e->at)
        rc = perta_fail(err, PERTA_EUSAGE, "--patch or at, not both");
    if (!rc && e->pick.what != PERTA_PICK_ALL && !e->as_estimate)
        rc = perta_fail(err, PERTA_EUSAGE, "pick: only with as_estimate");
    if (!rc)
        rc = perta_pick_argument(&e->pick, err);
    if (!rc)
        rc = perta_compute_argument(e->compute, err);
    if (!rc)
        rc = perta_rounding_argument(e->quantize, err);
    return rc ? rc : perta_scaled_arguments(e->at, err);
}

/* Two passes read the data twice, which a pipe does not allow. A file that is not there is refused
 * when it is read. */
static int check_data(const struct perta_eval *e, struct perta_err *err)
{
    struct stat st;
    if (!e->gradient_norm || stat(e->data, &st) || S_ISREG(st.st_mode))
        return 0;
    return perta_fail(err, PERTA_EUSAGE, "--gradient-norm reads the data twice: %s is not a file",
                      e->data);
}

int perta_eval(const struct perta_eval *eval, const struct perta_run *run, json_t **summary,
               struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(eval, run, summary, err);
    if (!rc)
        rc = check_arguments(eval, err);
    if (!rc)
        rc = check_data(eval, err);
    if (rc)
        return rc;
    /* The forward pass is that of an estimate. */
    struct perta_estimate estimate = {.model = eval->model,
                                      .adapter = eval->adapter,
                                      .at = eval->at,
                                      .quantize = eval->quantize,
                                      .data = eval->data,
                                      .data_xxh128 = eval->data_xxh128,
                                      .pick = eval->pick,
                                      .max_tokens = eval->max_tokens,
                                      .compute = eval->compute,
                                      .scratch = eval->scratch};
    struct perta_run each = *run; /* of two passes */
    struct perta_norms norms = {0};
    char xxh128[PERTA_XXH128_HEX];
    if (eval->gradient_norm && !run->dry_run) {
        each.before_bytes = run->before_bytes ? run->before_bytes : perta_memory_trimmed();
        rc = run_norms(eval, &estimate, &each, &norms, xxh128, err);
        estimate.data_xxh128 = xxh128;
    }
    if (!rc)
        rc = run_eval(eval, &estimate, &each, norms.means, summary, err);
    perta_norms_release(&norms);
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    return rc;
}
