/* The output of tune, its record, and how a run is resumed. Spec: docs/tune.md, docs/resume.md */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "estimators/passes/pick.h"
#include "estimators/passes/tune_job.h"
#include "io/text.h"

#define WEIGHTS "adapter_model.safetensors"
#define PREFIX "base_model.model."
#define ENDING ".weight"

/* ---- the record ---- */

json_t *perta_tune_recipe(const struct perta_tune_job *job)
{
    const struct perta_tune *t = &job->tune;
    json_t *recipe =
        json_pack("{s:s, s:I, s:I, s:I, s:f, s:s, s:f, s:f, s:f, s:I, s:b, s:s}", "tool",
                  "perta " PERTA_VERSION, "updates", (json_int_t)job->n_updates, "batch_size",
                  (json_int_t)t->batch_size, "samples", (json_int_t)job->all.n, "learning_rate",
                  t->learning_rate, "lr_scheduler", perta_lr_scheduler_name(t->scheduler), "warmup",
                  t->warmup, "weight_decay", t->weight_decay, "max_grad_norm", t->max_grad_norm,
                  "seed", (json_int_t)t->seed, "continued", t->adapter != NULL, "compute",
                  t->compute == PERTA_COMPUTE_REFERENCE ? "reference"
                  : perta_estimate_bf16(&job->pass)     ? "bf16"
                                                        : "f32");
    if (t->epochs)
        perta_json_set(&recipe, "epochs", json_integer((json_int_t)t->epochs));
    if (t->quantize)
        perta_json_set(&recipe, "quantize", json_string(perta_rounding_name(t->quantize)));
    if (t->patch) /* a patch is known by its manifest, which has the digests of all its files */
        perta_json_set(&recipe, "patch", json_string(job->patched.patch.manifest_digest.sha256));
    return recipe;
}

/* ---- adapter_config.json ---- */

/* Append a string, unless the list has it. */
static void append_once(json_t **list, const char *text)
{
    for (size_t i = 0; i < json_array_size(*list); i++)
        if (!strcmp(json_string_value(json_array_get(*list, i)), text))
            return;
    perta_json_append(list, json_string(text));
}

/* Names of the modules, as they were given; all-linear becomes a list, as PEFT writes it. */
static json_t *target_modules(const struct perta_tune_job *job)
{
    const struct perta_llm *llm = &job->pass.weights.llm;
    json_t *names = json_array();
    for (size_t i = 0; i < job->tune.n_targets; i++)
        if (strcmp(job->tune.targets[i], "all-linear"))
            perta_json_append(&names, json_string(job->tune.targets[i]));
    for (size_t i = 0; i < job->tune.n_targets; i++)
        for (size_t p = 0; !strcmp(job->tune.targets[i], "all-linear") && p < job->pass.factors.n;
             p++) {
            const struct perta_factor *f = &job->pass.factors.of[p];
            char name[PERTA_NAME_BYTES];
            perta_llm_name(llm, f->site, perta_llm_param(llm, f->site.layer, f->param), name);
            name[strlen(name) - strlen(ENDING)] = '\0';
            append_once(&names, strrchr(name, '.') + 1);
        }
    return names;
}

/* Are the weights stored as (in, out)? A family has all of them so, or none. */
static bool is_transposed(const struct perta_tune_job *job)
{
    const struct perta_factor *f = job->pass.factors.n ? &job->pass.factors.of[0] : NULL;
    return f && perta_llm_param(job->pass.factors.llm, f->site.layer, f->param)->transposed;
}

/* The caller's; NULL only when out of memory. An adapter that was continued keeps its config. */
static json_t *config_of(const struct perta_tune_job *job)
{
    const struct perta_tune *t = &job->tune;
    if (t->adapter)
        return json_deep_copy(job->pass.adapted.ck->config);
    json_t *config = json_pack(
        "{s:s, s:s, s:o, s:I, s:f, s:f, s:s, s:b, s:b, s:b, s:n, s:n, s:{}, s:{}, s:b}",
        "peft_type", "LORA", "task_type", "CAUSAL_LM", "base_model_name_or_path",
        perta_text_json("%s", t->model), "r", (json_int_t)t->rank, "lora_alpha", t->lora_alpha,
        "lora_dropout", 0.0, "bias", "none", "fan_in_fan_out", is_transposed(job), "use_rslora",
        false, "inference_mode", true, "modules_to_save", "exclude_modules", "rank_pattern",
        "alpha_pattern", "init_lora_weights", true);
    if (t->lora_alpha == floor(t->lora_alpha) && fabs(t->lora_alpha) < 1e15)
        perta_json_set(&config, "lora_alpha", json_integer((json_int_t)t->lora_alpha));
    perta_json_set(&config, "target_modules", target_modules(job));
    return config;
}

static int write_config(struct perta_tune_job *job, struct perta_err *err)
{
    json_t *config = config_of(job);
    char *text = config ? perta_json_text(config, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    int rc = text ? perta_publish_clear(&job->folder, PERTA_ADAPTER_CONFIG, err)
                  : perta_fail_sys(err, ENOMEM, PERTA_ADAPTER_CONFIG);
    if (!rc)
        rc = perta_publish_file(&job->folder, PERTA_ADAPTER_CONFIG, text, strlen(text), err);
    free(text);
    json_decref(config);
    return rc;
}

/* ---- adapter_model.safetensors ---- */

/* Its tensors, two for each factor, in the order of factors. */
struct tensors {
    struct perta_tensor *of; /* (n) */
    uint64_t n;
    uint64_t (*shapes)[2];
    char (*names)[PERTA_NAME_BYTES + 64];
};

static bool name_tensors(const struct perta_tune_job *job, struct tensors *t)
{
    const struct perta_factors *factors = &job->pass.factors;
    const struct perta_llm *llm = factors->llm;
    t->n = 2 * factors->n;
    t->of = calloc(t->n, sizeof *t->of);
    t->shapes = calloc(t->n, sizeof *t->shapes);
    t->names = calloc(t->n, sizeof *t->names);
    if (!t->of || !t->shapes || !t->names)
        return false;
    for (uint64_t i = 0; i < t->n; i++) {
        const struct perta_factor *f = &factors->of[i / 2];
        char name[PERTA_NAME_BYTES];
        perta_llm_name(llm, f->site, perta_llm_param(llm, f->site.layer, f->param), name);
        name[strlen(name) - strlen(ENDING)] = '\0';
        snprintf(t->names[i], sizeof t->names[i], PREFIX "%s.lora_%c" ENDING, name, "AB"[i % 2]);
        t->shapes[i][0] = i % 2 ? f->out : f->r;
        t->shapes[i][1] = i % 2 ? f->r : f->in;
        t->of[i] = (struct perta_tensor){.name = t->names[i],
                                         .dtype = PERTA_F32,
                                         .n_dims = 2,
                                         .shape = t->shapes[i],
                                         .n_elems = t->shapes[i][0] * t->shapes[i][1]};
    }
    return true;
}

/* Strings, as safetensors wants them. */
static json_t *metadata_of(const struct perta_tune_job *job)
{
    json_t *recipe = perta_tune_recipe(job);
    char *text = recipe ? perta_json_text(recipe, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    json_t *metadata =
        json_pack("{s:s, s:s*, s:o, s:o}", "format", "pt", "perta.tune", text, "perta.samples",
                  json_sprintf("%llu", (unsigned long long)job->all.n), "perta.tokens",
                  json_sprintf("%llu", (unsigned long long)job->all.n_tokens));
    if (*job->all.file.hmac)
        perta_json_set(&metadata, "perta.data_hmac_sha256", json_string(job->all.file.hmac));
    if (!text) {
        json_decref(metadata);
        metadata = NULL;
    }
    free(text);
    json_decref(recipe);
    return metadata;
}

#define PIECE_FLOATS 16384

/* Write n floats of the backend's; they must be finite. name: of the tensor. */
static int write_floats(struct perta_tune_job *job, int fd, struct perta_array from, uint64_t n,
                        const char *path, const char *name, struct perta_err *err)
{
    struct perta_backend *be = job->pass.be;
    float some[PIECE_FLOATS];
    int rc = 0;
    for (uint64_t at = 0; at < n && !rc; at += PIECE_FLOATS) {
        uint64_t here = n - at < PIECE_FLOATS ? n - at : PIECE_FLOATS;
        be->ops->get(be, perta_array_at(from, at), some, here * sizeof *some);
        rc = perta_backend_wait(be, err);
        for (uint64_t i = 0; i < here && !rc; i++)
            if (!isfinite(some[i]))
                rc = perta_fail(err, PERTA_EINPUT,
                                "tensor %s, element %llu: not a finite number after the last "
                                "update; is the learning rate (%g) too large?",
                                name, (unsigned long long)(at + i), job->tune.learning_rate);
        if (!rc)
            rc = perta_write_all(fd, some, here * sizeof *some, path, err);
    }
    return rc;
}

static int write_tensors(struct perta_tune_job *job, struct tensors *t, int fd, const char *path,
                         struct perta_err *err)
{
    const struct perta_factors *factors = &job->pass.factors;
    json_t *metadata = metadata_of(job);
    uint8_t *header = NULL;
    uint64_t len_bytes;
    int rc = metadata ? perta_safetensors_build(t->of, t->n, metadata, &header, &len_bytes, err)
                      : perta_fail_sys(err, ENOMEM, WEIGHTS);
    if (!rc)
        rc = perta_write_all(fd, header, len_bytes, path, err);
    for (uint64_t i = 0; i < t->n && !rc; i++) {
        struct perta_low_rank of = perta_factor_in(&factors->of[i / 2], factors->values);
        rc = write_floats(job, fd, i % 2 ? of.b : of.a, t->of[i].n_elems, path, t->names[i], err);
    }
    if (!rc && fsync(fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", path);
    free(header);
    json_decref(metadata);
    return rc;
}

static int write_weights(struct perta_tune_job *job, struct perta_err *err)
{
    struct tensors t = {0};
    char *path = perta_publish_path(&job->folder, WEIGHTS);
    int rc = path && name_tensors(job, &t) ? perta_publish_clear(&job->folder, WEIGHTS, err)
                                           : perta_fail_sys(err, ENOMEM, WEIGHTS);
    int fd = rc ? -1 : open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (!rc && fd < 0)
        rc = perta_fail_sys(err, errno, "%s", path);
    if (!rc)
        rc = write_tensors(job, &t, fd, path, err);
    if (fd >= 0 && close(fd) && !rc)
        rc = perta_fail_sys(err, errno, "%s", path);
    free(path);
    free(t.of);
    free(t.shapes);
    free(t.names);
    return rc;
}

/* ---- begin, go on ---- */

/* Whatever decides the bytes of the result. */
static json_t *identity_of(const struct perta_tune_job *job)
{
    const struct perta_tune *t = &job->tune;
    const struct perta_samples_file *file = &job->all.file;
    const struct perta_checkpoint *ck = job->pass.weights.ck;
    char version[64];
    json_t *identity = json_pack(
        "{s:s, s:s, s:o, s:s, s:I, s:s, s:o, s:o, s:o, s:o}", "tool", "perta " PERTA_VERSION,
        "verb", "tune", "flags", perta_tune_recipe(job), "data key gives", file->hmac, "cpu",
        (json_int_t)perta_gemm_isa(), "products", perta_gemm_version(version), "model",
        perta_journal_checkpoint(ck), "config.json", perta_journal_config(ck), "data",
        perta_journal_file(file->len_bytes, &file->mtime), PERTA_ADAPTER_CONFIG, config_of(job));
    if (t->adapter)
        perta_json_set(&identity, "adapter", perta_adapted_json(&job->pass.adapted));
    if (t->at)
        perta_json_set(&identity, "at", perta_scaled_json(&job->pass.scaled));
    perta_pick_identity(&t->pick, &identity);
    return identity;
}

int perta_tune_begin(struct perta_tune_job *job, bool *publishing, struct perta_err *err)
{
    const struct perta_tune *t = &job->tune;
    struct perta_journal *journal = &job->pass.journal;
    json_t *identity = identity_of(job);
    int rc = perta_journal_open(journal, t->out, identity, job->run->resume, t->force, err);
    json_decref(identity);
    if (!rc)
        rc = perta_journal_folder(journal, &job->folder, t->out, NULL, t->force, err);
    if (rc)
        return rc;
    *publishing = perta_journal_is_publishing(journal);
    job->pass.scratch.dir = perta_estimate_scratch(t->scratch, t->out, t->out, job->folder.partial);
    return job->pass.scratch.dir ? 0 : perta_fail_sys(err, ENOMEM, "scratch");
}

static const char *const state_names[] = {"tune-0", "tune-1"};

/* Take the updates of a record. */
static int use_record(void *ctx, json_t *record, struct perta_err *err)
{
    struct perta_tune_job *job = ctx;
    size_t i;
    json_t *update;
    job->state = json_integer_value(json_object_get(record, "state")) == 1;
    json_array_foreach (json_object_get(record, "updates"), i, update) {
        if (job->n_done == job->n_updates)
            return perta_fail(err, PERTA_EINPUT, "%s: too many updates; --force starts over",
                              job->pass.journal.path);
        job->updates[job->n_done++] =
            (struct perta_tune_update){json_number_value(json_array_get(update, 0)),
                                       json_number_value(json_array_get(update, 1)),
                                       json_number_value(json_array_get(update, 2))};
    }
    return 0;
}

int perta_tune_restore(struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_journal *journal = &job->pass.journal;
    if (!perta_journal_last(journal))
        return 0;
    int rc = perta_journal_replay(journal, use_record, job, err);
    job->n_recorded = job->n_done;
    return rc ? rc
              : perta_scratch_load(&job->pass.scratch, state_names[job->state],
                                   job->pass.factors.values, 3 * job->pass.factors.n_floats, err);
}

/* ---- commit ---- */

/* With the updates since the record before. */
static json_t *record_of(const struct perta_tune_job *job, unsigned state)
{
    json_t *updates = json_array();
    for (uint64_t i = job->n_recorded; i < job->n_done; i++) {
        const struct perta_tune_update *u = &job->updates[i];
        perta_json_append(&updates,
                          json_pack("[f, f, f]", u->loss, u->gradient_norm, u->learning_rate));
    }
    return json_pack("{s:i, s:o}", "state", (int)state, "updates", updates);
}

/* The state goes to one of two files in turn: the one that the last record needs stays. */
int perta_tune_commit(struct perta_tune_job *job, struct perta_err *err)
{
    struct perta_estimate_job *pass = &job->pass;
    struct perta_journal *journal = &pass->journal;
    unsigned state = !job->state;
    if (!perta_journal_due(journal, pass->scratch.file_bytes))
        return 0;
    int rc = perta_scratch_save(&pass->scratch, state_names[state], pass->factors.values,
                                3 * pass->factors.n_floats, err);
    if (!rc)
        rc = perta_folder_sync(pass->scratch.dir, err);
    if (!rc)
        rc = perta_name_sync(pass->scratch.dir, err);
    if (!rc)
        rc = perta_publish_sync(&job->folder, err);
    json_t *record = record_of(job, state);
    if (!rc)
        rc = record ? perta_journal_commit(journal, record, pass->scratch.file_bytes, err)
                    : perta_fail_sys(err, ENOMEM, "journal");
    json_decref(record);
    if (rc)
        return rc;
    job->n_recorded = job->n_done;
    job->state = state;
    return 0;
}

/* ---- the end ---- */

/* Only files with our names are removed, because the folder may be the user's. */
static int remove_scratch(const struct perta_tune_job *job, struct perta_err *err)
{
    const struct perta_scratch *scratch = &job->pass.scratch;
    if (!scratch->dir)
        return 0;
    for (int i = 0; i < 2; i++)
        perta_store_forget(scratch, state_names[i]);
    if (!rmdir(scratch->dir) || errno == ENOENT || job->tune.scratch)
        return 0;
    return perta_fail_sys(err, errno, "%s: remove", scratch->dir);
}

int perta_tune_publish(struct perta_tune_job *job, json_t **summary, struct perta_err *err)
{
    struct perta_publish *const folders[] = {&job->folder};
    struct perta_journal *journal = &job->pass.journal;
    int rc = 0;
    if (perta_journal_is_publishing(journal)) {
        json_decref(*summary);
        *summary = perta_journal_summary(journal);
    } else {
        rc = write_config(job, err);
        if (!rc)
            rc = write_weights(job, err);
    }
    if (!rc)
        rc = perta_journal_complete(journal, folders, 1, *summary, err);
    if (!rc)
        rc = remove_scratch(job, err);
    return rc ? rc : perta_journal_publish(journal, folders, 1, *summary, err);
}

void perta_tune_abandon(struct perta_tune_job *job, int rc, struct perta_err *err)
{
    struct perta_publish *const folders[] = {&job->folder};
    struct perta_err ignored = {0};
    perta_journal_abandon(&job->pass.journal, folders, 1, rc, err);
    if (!job->folder.keep)
        remove_scratch(job, &ignored);
}
