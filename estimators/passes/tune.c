#include "estimators/passes/tune.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/tune_job.h"
#include "io/fpenv.h"
#include "io/text.h"
#include "stream/arguments.h"

/* ---- checks ---- */

static int check_outputs(const struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_tune *t = &job->tune;
    const char *const inputs[] = {t->model, t->data, t->adapter, t->patch};
    /* The output of a run that is resumed was checked when it began, and may be published by
     * now. */
    return job->run->resume && perta_journal_found(t->out)
               ? 0
               : perta_publish_check(&t->out, 1, inputs, 4, t->force, err);
}

static int prepare(struct perta_tune_job *job, struct perta_err *err)
{
    int rc = perta_estimate_open(&job->pass, err);
    if (!rc)
        rc = perta_estimate_apply(&job->pass, job->tune.patch, &job->patched, err);
    if (!rc)
        rc = perta_tune_count(job, err);
    return rc ? rc : check_outputs(job, err);
}

/* ---- the run ---- */

/* Set total_bytes, for progress: the weights that remain to be read. An update reads every layer
 * forward, those with a LoRA above or in them backward, and the head twice. */
static void count_bytes(struct perta_tune_job *job)
{
    struct perta_estimate_job *pass = &job->pass;
    const struct perta_llm *llm = &pass->weights.llm;
    uint64_t all = 0, embedding = 0, n = llm->n_layers;
    for (uint64_t i = 0; i < pass->weights.ck->n_tensors; i++) {
        const struct perta_ref *t = &pass->weights.ck->by_name[i];
        uint64_t bytes = perta_weights_stored(&pass->weights, t);
        all += bytes;
        if (!strcmp(t->tensor->name, perta_weights_embedding(&pass->weights)))
            embedding = bytes;
    }
    uint64_t layer = (all - (llm->tied ? 1 : 2) * embedding) / n;
    pass->total_bytes =
        (job->n_updates - job->n_done) * (layer * (2 * n - job->lowest) + 2 * embedding);
}

static int run_updates(struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_tune *t = &job->tune;
    int rc = 0;
    while (job->n_done < job->n_updates && !rc) {
        rc = perta_tune_update(job, err);
        if (!rc && t->on_update)
            t->on_update(t->on_update_user, job->n_done, job->n_updates,
                         &job->updates[job->n_done - 1]);
        if (!rc)
            rc = perta_tune_commit(job, err);
    }
    return rc ? rc : perta_weights_unchanged(&job->pass.weights, err);
}

static int run_all(struct perta_tune_job *job, struct perta_err *err)
{
    bool publishing = false;
    int rc = perta_tune_plan(job, err);
    if (!rc)
        rc = perta_tune_begin(job, &publishing, err);
    if (rc || publishing)
        return rc;
    rc = perta_weights_start(&job->pass.weights, job->run->io, err);
    if (!rc)
        rc = perta_tune_restore(job, err);
    count_bytes(job);
    return rc ? rc : run_updates(job, err);
}

/* ---- the summary ---- */

/* Trained parameters, without the gaps between factors. */
static uint64_t count_parameters(const struct perta_factors *factors)
{
    uint64_t n = 0;
    for (size_t i = 0; i < factors->n; i++)
        n += factors->of[i].r * (factors->of[i].in + factors->of[i].out);
    return n;
}

static json_t *summary_of(const struct perta_tune_job *job)
{
    json_t *summary =
        json_pack("{s:I, s:I, s:I, s:I, s:o, s:O}", "samples", (json_int_t)job->all.n, "tokens",
                  (json_int_t)job->all.n_tokens, "modules", (json_int_t)job->pass.factors.n,
                  "parameters", (json_int_t)count_parameters(&job->pass.factors), "recipe",
                  perta_tune_recipe(job), "notes", job->all.notes);
    perta_json_set(&summary, "unknown_config_keys",
                   perta_llm_unknown_keys(job->pass.weights.ck->config));
    perta_estimate_say_rounded(&job->pass, &summary);
    return summary;
}

static void fill_summary(const struct perta_tune_job *job, json_t **summary)
{
    json_t *updates = json_array();
    for (uint64_t i = 0; i < job->n_done; i++) {
        const struct perta_tune_update *u = &job->updates[i];
        perta_json_append(&updates, json_pack("{s:f, s:f, s:f}", "loss", u->loss, "gradient_norm",
                                              u->gradient_norm, "learning_rate", u->learning_rate));
    }
    perta_json_set(summary, "updates", updates);
    perta_json_set(summary, "folder", perta_text_json("%s", job->tune.out));
    perta_json_set(summary, "read_bytes", json_integer((json_int_t)job->pass.weights.read_bytes));
    perta_json_set(summary, "scratch_bytes",
                   json_integer((json_int_t)job->pass.scratch.file_bytes));
}

static int run_job(struct perta_tune_job *job, json_t **summary, struct perta_err *err)
{
    int rc = prepare(job, err);
    if (rc)
        return rc;
    *summary = summary_of(job);
    if (!*summary)
        return perta_fail_sys(err, ENOMEM, "tune");
    if (job->run->dry_run)
        return 0;
    rc = run_all(job, err);
    fill_summary(job, summary);
    if (!rc)
        rc = perta_tune_publish(job, summary, err);
    if (rc)
        perta_tune_abandon(job, rc, err);
    return rc;
}

int perta_tune(const struct perta_tune *tune, const struct perta_run *run, json_t **summary,
               struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(tune, run, summary, err);
    struct perta_tune_job *job = rc ? NULL : calloc(1, sizeof *job);
    if (!rc && !job)
        rc = perta_fail_sys(err, ENOMEM, "tune");
    if (!rc)
        rc = perta_tune_arguments(job, tune, err);
    if (rc) {
        free(job);
        return rc;
    }
    job->run = job->pass.run = run;
    job->pass.estimate = &job->estimate;
    job->pass.tunes = true;
    rc = run_job(job, summary, err);
    perta_estimate_release(&job->pass);
    perta_patched_close(&job->patched);
    perta_publish_release(&job->folder);
    perta_samples_release(&job->all);
    free(job->order);
    free(job->updates);
    free(job);
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    return rc;
}
