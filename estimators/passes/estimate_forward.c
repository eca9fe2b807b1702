/* The parts of a pass over a model that estimate and eval share. */
#include "estimators/passes/estimate_job.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/pick.h"
#include "io/text.h"

/* ---- open ---- */

/* Weights that are read from codes are read as they are. */
static int refuse_quantised(const struct perta_estimate_job *job, const char *flag,
                            struct perta_err *err)
{
    return job->weights.dequantised.how
               ? perta_fail(err, PERTA_EINPUT,
                            "%s: the weights are quantised; with %s, dequantise the model to BF16 "
                            "first (perta dequantize MODEL --out DIR)",
                            job->weights.ck->config_path, flag)
               : 0;
}

static void note_quantised(struct perta_estimate_job *job)
{
    const struct perta_dequantise *how = job->weights.dequantised.how;
    if (how)
        perta_json_append(&job->samples.notes,
                          perta_text_json("%s: %llu tensors are quantised; they are dequantised "
                                          "as they are read",
                                          job->estimate->model, (unsigned long long)how->n_coded));
}

int perta_estimate_open(struct perta_estimate_job *job, struct perta_err *err)
{
    const struct perta_estimate *e = job->estimate;
    if (e->compute == PERTA_COMPUTE_BF16 && !perta_gemm_can_bf16())
        return perta_fail(
            err, PERTA_EUSAGE,
            "--compute bf16: this CPU cannot, or ONEDNN_MAX_CPU_ISA forbids it; leave it out, or "
            "--compute f32");
    int rc = perta_weights_open(&job->weights, e->model, err);
    job->source = job->weights.source;
    if (!rc && e->at)
        rc = refuse_quantised(job, "--steps", err);
    if (!rc && e->at) {
        rc = perta_scaled_open(&job->scaled, e->at, job->weights.ck, err);
        job->source = job->weights.source = &job->scaled.source;
    }
    if (!rc)
        rc = perta_weights_round(&job->weights, e->quantize, err);
    if (rc)
        return rc;
    const struct perta_samples_wanted wanted = {.vocab = job->weights.llm.vocab,
                                                .is_whole = job->weights.llm.no_blocks,
                                                .max_tokens = e->max_tokens,
                                                .positions = perta_llm_longest(&job->weights.llm),
                                                .is_short = perta_llm_short(&job->weights.llm),
                                                .beyond = perta_llm_beyond(&job->weights.llm),
                                                .position_ids =
                                                    job->weights.llm.family->position_ids,
                                                .answers = job->answers,
                                                .key_path = e->data_key,
                                                .xxh128 = e->data_xxh128};
    rc = perta_samples_read(e->data, &wanted, &job->samples, err);
    note_quantised(job);
    if (!rc)
        rc = perta_samples_pick(&job->samples, &e->pick, e->data, err);
    if (!rc && e->adapter)
        rc = perta_adapted_open(&job->adapted, e->adapter, &job->weights, &job->factors,
                                job->samples.notes, err);
    if (!rc)
        rc = perta_estimate_tokens(job, err);
    return rc;
}

int perta_estimate_apply(struct perta_estimate_job *job, const char *path,
                         struct perta_patched *patched, struct perta_err *err)
{
    if (path) {
        int rc = refuse_quantised(job, "--patch", err);
        if (rc)
            return rc;
        rc = perta_patched_open(patched, path, job->weights.ck, err);
        job->source = job->weights.source = &patched->source;
        if (rc)
            return rc;
    }
    perta_adapted_note_patch(&job->adapted, path ? patched->patch.manifest_digest.sha256 : NULL,
                             &job->samples.notes);
    return 0;
}

void perta_estimate_say_rounded(const struct perta_estimate_job *job, json_t **summary)
{
    const struct perta_weights *w = &job->weights;
    if (!w->rounding)
        return;
    perta_json_set(summary, "quantize", json_string(perta_rounding_name(w->rounding)));
    perta_json_set(summary, "rounded_parameters",
                   json_integer((json_int_t)perta_weights_n_rounded(w)));
}

bool perta_estimate_bf16(const struct perta_estimate_job *job)
{
    const struct perta_estimate *e = job->estimate;
    return e->compute == PERTA_COMPUTE_BF16 ||
           (e->compute == PERTA_COMPUTE_AUTO && perta_gemm_has_bf16());
}

int perta_estimate_scratch_here(struct perta_estimate_job *job, struct perta_err *err)
{
    const char *dir = job->estimate->scratch, *tmp = getenv("TMPDIR");
    job->scratch.dir = strdup(dir ? dir : tmp && *tmp ? tmp : "/var/tmp");
    return job->scratch.dir ? 0 : perta_fail_sys(err, ENOMEM, "scratch");
}

int perta_estimate_on_part(void *ctx, struct perta_err *err)
{
    return perta_estimate_advance(ctx, err);
}

int perta_estimate_open_head(struct perta_estimate_job *job, struct perta_statistic *statistic,
                             struct perta_err *err)
{
    job->head = (struct perta_head){
        .weights = &job->weights,
        .be = job->be,
        .samples = &job->samples,
        .statistic = statistic,
        .backward = job->tunes,
        .without_last = job->norms,
        .measured = job->measured,
        .pooled = job->tunes,
        .advance = perta_estimate_on_part,
        .ctx = job,
        .by_probability = job->estimate->by_probability,
        .batch_rows = perta_head_rows(&job->samples, job->batch_tokens),
        .room = job->weights.rooms[0],
        .work = job->work,
    };
    return perta_head_open(&job->head, &job->scratch, err);
}

void perta_estimate_release(struct perta_estimate_job *job)
{
    struct perta_err ignored = {0};
    if (job->be) /* after an error, operations may still read what is freed below */
        perta_backend_wait(job->be, &ignored);
    perta_weights_stop(&job->weights);
    perta_behind_close(job->behind);
    perta_head_close(&job->head, &job->scratch);
    for (uint32_t l = 0; job->x && l <= job->weights.llm.n_layers; l++)
        perta_store_close(&job->x[l], &job->scratch);
    perta_store_close(&job->dx, &job->scratch);
    perta_importance_sink_release(&job->sink);
    for (int i = 0; i < 2; i++)
        perta_importance_out_release(&job->outs[i]);
    perta_scaled_close(&job->scaled);
    perta_adapted_close(&job->adapted);
    perta_weights_close(&job->weights);
    if (job->be) {
        job->be->ops->free(job->be, job->factors_memory.buffer);
        job->be->ops->free(job->be, job->memory);
        for (uint32_t l = 0; job->kept && l < job->weights.llm.n_layers; l++)
            job->be->ops->free(job->be, job->kept[l]);
    }
    perta_experts_close(&job->experts);
    perta_factors_release(&job->factors);
    perta_backend_close(job->be);
    perta_workers_close(job->workers);
    perta_pool_give(&job->pool);
    perta_samples_release(&job->samples);
    perta_cut_release(&job->cut);
    perta_chunks_release(&job->chunks);
    free(job->starts);
    free(job->kept);
    free(job->x);
    free(job->inv_freq);
    free(job->slopes);
    free(job->scratch.dir);
    perta_journal_close(&job->journal);
}

/* ---- a block over all tokens ---- */

struct perta_batch perta_estimate_batch(const struct perta_estimate_job *job, size_t *group)
{
    struct perta_cut_batch batch = perta_cut_batch(&job->cut, *group, job->batch_tokens);
    *group = batch.end;
    return (struct perta_batch){
        .n = batch.n,
        .sequences = {batch.n_samples, job->starts + batch.first_sample, batch.first_row},
        .tiles = batch.tiles,
        .places = job->samples.places + batch.first_row,
        .first = batch.first_row,
    };
}

bool perta_estimate_acts(const struct perta_estimate_job *job, uint32_t layer, size_t n,
                         struct perta_acts *acts)
{
    const struct perta_llm *llm = &job->weights.llm;
    if (!job->kept || !job->kept[layer]) {
        perta_acts_lay_out(acts, llm, n, job->work);
        return false;
    }
    perta_acts_lay_out_in(acts, llm, n, (struct perta_array){job->kept[layer], 0}, job->work);
    return true;
}

struct perta_layer perta_estimate_layer(struct perta_estimate_job *job, uint32_t number,
                                        uint32_t next, struct perta_gradient_sink *sink)
{
    const struct perta_span span = {.site = perta_site_of(number)};
    const struct perta_span following = next < job->weights.llm.n_layers
                                            ? (struct perta_span){.site = perta_site_of(next)}
                                            : perta_head_first(&job->head);
    perta_weights_begin(&job->weights, &span, next == UINT32_MAX ? NULL : &following);
    return (struct perta_layer){.llm = &job->weights.llm,
                                .be = job->be,
                                .from = &job->weights.parameters,
                                .sink = sink,
                                .factors = &job->factors,
                                .past = job->adds ? &job->cache->past : NULL,
                                .inv_freq =
                                    perta_llm_rope_table(&job->weights.llm, number, job->inv_freq),
                                .slopes = job->slopes,
                                .site = perta_site_of(number)};
}

int perta_estimate_loss(const struct perta_estimate_job *job, uint64_t sample, double *loss,
                        struct perta_err *err)
{
    *loss = perta_head_loss(&job->head, sample);
    if (isfinite(*loss))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: line %llu: the model gives a loss that is not a finite number; are "
                      "there NaN or Inf in %s?",
                      job->estimate->data, (unsigned long long)job->samples.lines[sample],
                      job->estimate->model);
}

int perta_estimate_advance(struct perta_estimate_job *job, struct perta_err *err)
{
    uint64_t read = job->weights.read_bytes, total = job->total_bytes;
    if (job->run->progress) /* rows read from the embedding are not in the total */
        job->run->progress(job->run->progress_user, read < total ? read : total, total);
    if (job->run->cancel && *job->run->cancel)
        return perta_fail(err, PERTA_EINTR, "interrupted");
    return 0;
}

int perta_estimate_forward(struct perta_estimate_job *job, uint32_t number,
                           const struct perta_store *from, struct perta_store *to,
                           struct perta_err *err)
{
    struct perta_layer layer = perta_estimate_layer(job, number, number + 1, NULL);
    struct perta_acts acts;
    int rc = 0;
    if (perta_llm_has(layer.llm, number, PERTA_LAYER_MIXTURE))
        return perta_experts_forward(job, &layer, from, to, err);
    for (size_t group = 0; group < job->cut.n_groups && !rc;) {
        struct perta_batch batch = perta_estimate_batch(job, &group);
        perta_estimate_acts(job, number, batch.n, &acts);
        rc = perta_store_load(from, batch.first, batch.n, acts.x, err);
        if (!rc)
            perta_block_forward(&layer, &batch, &acts);
        if (!rc && job->cache && !job->adds)
            rc = perta_cache_keep(job->cache, number, &batch, &acts, err);
        if (!rc)
            rc = perta_store_set(to, batch.first, batch.n, acts.out, err);
        if (!rc)
            rc = perta_backend_wait(job->be, err);
        if (!rc)
            rc = perta_estimate_advance(job, err);
    }
    return rc;
}

int perta_estimate_forward_all(struct perta_estimate_job *job, struct perta_store *x,
                               struct perta_err *err)
{
    int rc = perta_embed(&job->head, x, err);
    for (uint32_t l = 0; l < job->weights.llm.n_layers && !rc; l++)
        rc = perta_estimate_forward(job, l, x, x, err);
    return rc ? rc : perta_head_forward(&job->head, x, NULL, &job->means, err);
}
