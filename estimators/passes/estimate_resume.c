/* Outputs, journal and leftovers of an estimate, and how a run is resumed. Spec: docs/resume.md */
#include "estimators/passes/estimate_job.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "estimators/edit/recipe.h"
#include "estimators/passes/pick.h"
#include "io/hash.h"
#include "io/text.h"

static const char *const stage_names[] = {"begun", "forward", "head", "backward", "publish"};

/* ---- names ---- */

const char *perta_estimate_x_name(char *buf, uint32_t layer)
{
    snprintf(buf, 16, "x-%u", layer);
    return buf;
}

const char *perta_estimate_dx_name(char *buf, uint32_t layer)
{
    snprintf(buf, 16, "dx-%u", layer);
    return buf;
}

/* Path of an output. The caller frees it; NULL only when out of memory. */
static char *path_of(const struct perta_estimate_job *job, int stat)
{
    return perta_path_join(job->estimate->out, perta_stat_name((enum perta_stat)stat));
}

static bool wanted(const struct perta_estimate_job *job, int stat)
{
    return stat == PERTA_STAT_MEAN ? job->estimate->mean : job->estimate->meansq;
}

/* The journal is beside the output that is published last. */
static int home_of(const struct perta_estimate_job *job)
{
    return job->estimate->meansq ? PERTA_STAT_MEANSQ : PERTA_STAT_MEAN;
}

char *perta_estimate_scratch(const char *scratch, const char *out, const char *home,
                             const char *partial)
{
    char *path = NULL, *real = NULL;
    if (!scratch)
        return perta_path_join(partial, "perta-scratch");
    real = realpath(out, NULL);
    const char *name = real ? real : home;
    if (asprintf(&path, "%s/perta-scratch-%016llx", scratch,
                 (unsigned long long)perta_hash64(name, strlen(name))) < 0)
        path = NULL;
    free(real);
    return path;
}

/* For the output that is published last. OUT exists by now, with its partial folder in it. */
static char *scratch_dir(const struct perta_estimate_job *job, const char *home)
{
    return perta_estimate_scratch(job->estimate->scratch, job->estimate->out, home,
                                  job->outs[home_of(job)].folder.partial);
}

/* ---- identity: whatever decides the bytes of the result ---- */

/* Identified by size and modification time. A digest in a leftover journal would let a short text
 * be guessed. */
static json_t *data_file(const struct perta_estimate_job *job)
{
    const struct perta_samples_file *file = &job->samples.file;
    return perta_journal_file(file->len_bytes, &file->mtime);
}

static json_t *identity_of(const struct perta_estimate_job *job, bool bf16)
{
    const struct perta_estimate *e = job->estimate;
    char version[64];
    json_t *identity = json_pack(
        "{s:s, s:s, s:{s:b, s:b, s:b, s:s, s:s}, s:I, s:s, s:o, s:o, s:o}", "tool",
        "perta " PERTA_VERSION, "verb", "estimate", "flags", "mean", (int)e->mean, "meansq",
        (int)e->meansq, "by probability", (int)e->by_probability, "compute",
        e->compute == PERTA_COMPUTE_REFERENCE ? "reference"
        : bf16                                ? "bf16"
                                              : "f32",
        "data key gives", job->samples.file.hmac, "cpu", (json_int_t)perta_gemm_isa(), "products",
        perta_gemm_version(version), "model", perta_journal_checkpoint(job->weights.ck),
        "config.json", perta_journal_config(job->weights.ck), "data", data_file(job));
    perta_pick_identity(&e->pick, &identity);
    if (e->quantize)
        perta_json_set(&identity, "quantize", json_string(perta_rounding_name(e->quantize)));
    if (e->at)
        perta_json_set(&identity, "at", perta_scaled_json(&job->scaled));
    if (e->adapter)
        perta_json_set(&identity, "adapter", perta_adapted_json(&job->adapted));
    return identity;
}

/* ---- begin, go on ---- */

static bool is_parameter(void *weights, const char *name)
{
    return perta_weights_is_parameter(weights, name);
}

static int open_output(struct perta_estimate_job *job, int stat, struct perta_err *err)
{
    struct perta_importance plan = {0};
    struct perta_importance_out *out = &job->outs[stat];
    json_t *adapter = job->estimate->adapter ? perta_adapter_recipe(job->adapted.ck) : NULL;
    const struct perta_importance_about about = {
        (enum perta_stat)stat,  job->samples.n, job->samples.n_tokens,
        job->samples.file.hmac, adapter,        job->estimate->quantize};
    char *path = path_of(job, stat);
    int rc = path && !adapter == !job->estimate->adapter
                 ? perta_importance_plan(&plan, job->weights.ck, &about, is_parameter,
                                         &job->weights, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->estimate->out);
    if (!rc)
        rc = perta_importance_begin(out, &plan, path, &job->journal, job->estimate->force,
                                    job->behind, err);
    perta_importance_release(&plan);
    json_decref(adapter);
    free(path);
    return rc;
}

/* Returns false if the model has no such layer. */
static bool read_record(const json_t *record, uint32_t n_layers, enum perta_stage *stage,
                        uint32_t *layer)
{
    json_int_t number = json_integer_value(json_object_get(record, "layer"));
    const char *name = json_string_value(json_object_get(record, "stage"));
    *stage = json_object_get(record, "publish") ? PERTA_PUBLISH : PERTA_BEGUN;
    *layer = (uint32_t)number;
    for (int i = PERTA_FORWARD; name && i < PERTA_PUBLISH; i++)
        if (!strcmp(name, stage_names[i]))
            *stage = (enum perta_stage)i;
    return number >= 0 && number < n_layers;
}

int perta_estimate_begin(struct perta_estimate_job *job, bool bf16, enum perta_stage *stage,
                         uint32_t *layer, struct perta_err *err)
{
    char *home = path_of(job, home_of(job));
    json_t *identity = identity_of(job, bf16);
    *stage = PERTA_BEGUN;
    int rc = home ? perta_journal_open(&job->journal, home, identity, job->run->resume,
                                       job->estimate->force, err)
                  : perta_fail_sys(err, ENOMEM, "%s", job->estimate->out);
    json_decref(identity);
    if (!rc)
        rc = perta_behind_open(&job->behind, err);
    for (int stat = 0; stat < 2 && !rc; stat++)
        if (wanted(job, stat))
            rc = open_output(job, stat, err);
    const json_t *last = perta_journal_last(&job->journal);
    if (!rc && last && !read_record(last, job->weights.llm.n_layers, stage, layer))
        rc = perta_fail(err, PERTA_EINPUT, "%s: no such layer; --force starts over",
                        job->journal.path);
    job->means.loss = json_real_value(json_object_get(last, "loss"));
    job->means.probability = json_real_value(json_object_get(last, "probability"));
    job->means.spread = json_real_value(json_object_get(last, "spread"));
    if (!rc && !(job->scratch.dir = scratch_dir(job, home)))
        rc = perta_fail_sys(err, ENOMEM, "scratch");
    free(home);
    return rc;
}

static int restore_x(struct perta_estimate_job *job, uint32_t layer, struct perta_err *err)
{
    char name[16];
    return perta_store_restore(&job->x[layer], &job->scratch, perta_estimate_x_name(name, layer),
                               job->samples.n_tokens, job->weights.llm.hidden, err);
}

int perta_estimate_restore(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                           struct perta_err *err)
{
    uint32_t n_layers = job->weights.llm.n_layers;
    uint32_t end = stage == PERTA_FORWARD     ? layer + 2
                   : stage == PERTA_BACKWARD  ? layer
                   : stage == PERTA_HEAD_DONE ? n_layers
                                              : 0;
    char name[16];
    int rc = 0;
    for (uint32_t l = 0; l < end && !rc; l++)
        rc = restore_x(job, l, err);
    if (rc || stage < PERTA_HEAD_DONE)
        return rc;
    job->dx_layer = stage == PERTA_BACKWARD ? layer : n_layers;
    job->dx_saved = job->dx_layer;
    rc = restore_x(job, n_layers, err);
    return rc ? rc
              : perta_store_restore(&job->dx, &job->scratch,
                                    perta_estimate_dx_name(name, job->dx_layer),
                                    job->samples.n_tokens, job->weights.llm.hidden, err);
}

/* ---- commit ---- */

static uint64_t written(const struct perta_estimate_job *job)
{
    return job->outs[0].written_bytes + job->outs[1].written_bytes + job->scratch.file_bytes;
}

static int save_stores(struct perta_estimate_job *job, enum perta_stage stage,
                       struct perta_err *err)
{
    int rc = 0;
    for (uint32_t l = 0; l <= job->weights.llm.n_layers && !rc; l++)
        if (job->x[l].width)
            rc = perta_store_save(&job->x[l], &job->scratch, err);
    if (!rc && stage != PERTA_FORWARD)
        rc = perta_store_save(&job->dx, &job->scratch, err);
    if (!rc)
        rc = perta_folder_sync(job->scratch.dir, err);
    return rc ? rc : perta_name_sync(job->scratch.dir, err);
}

/* If dx is in a file, the journal must always name the current one, because the file is removed
 * when the next one replaces it: a commit point is due then. */
static bool is_due(const struct perta_estimate_job *job, enum perta_stage stage)
{
    return perta_journal_due(&job->journal, written(job)) ||
           (stage != PERTA_FORWARD && !job->dx.buffer);
}

int perta_estimate_commit(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                          struct perta_err *err)
{
    char name[16];
    if (job->norms || !is_due(job, stage))
        return 0;
    int rc = save_stores(job, stage, err);
    for (int stat = 0; stat < 2 && !rc; stat++)
        if (wanted(job, stat))
            rc = perta_importance_sync(&job->outs[stat], err);
    for (int stat = 0; stat < 2 && !rc; stat++)
        if (wanted(job, stat))
            rc = perta_publish_sync(&job->outs[stat].folder, err);
    json_t *record = json_pack("{s:s, s:I, s:f, s:f, s:f}", "stage", stage_names[stage], "layer",
                               (json_int_t)layer, "loss", job->means.loss, "probability",
                               job->means.probability, "spread", job->means.spread);
    if (!rc)
        rc = record ? perta_journal_commit(&job->journal, record, written(job), err)
                    : perta_fail_sys(err, ENOMEM, "journal");
    json_decref(record);
    if (rc || stage == PERTA_FORWARD)
        return rc;
    if (job->dx_saved >= 0 && job->dx_saved != job->dx_layer)
        perta_store_forget(&job->scratch, perta_estimate_dx_name(name, (uint32_t)job->dx_saved));
    job->dx_saved = job->dx_layer;
    return 0;
}

/* ---- the end ---- */

static size_t folders_of(struct perta_estimate_job *job, struct perta_publish *folders[2])
{
    size_t n = 0;
    for (int stat = 0; stat < 2; stat++)
        if (wanted(job, stat))
            folders[n++] = &job->outs[stat].folder;
    return n;
}

/* Only files with our names are removed, because the folder may be the user's. A scratch folder
 * within the output must be removed, or it would be published. */
static int remove_scratch(const struct perta_estimate_job *job, struct perta_err *err)
{
    char name[16];
    if (!job->scratch.dir)
        return 0;
    for (uint32_t l = 0; l <= job->weights.llm.n_layers; l++) {
        perta_store_forget(&job->scratch, perta_estimate_x_name(name, l));
        perta_store_forget(&job->scratch, perta_estimate_dx_name(name, l));
    }
    if (!rmdir(job->scratch.dir) || errno == ENOENT || job->estimate->scratch)
        return 0;
    return perta_fail_sys(err, errno, "%s: remove", job->scratch.dir);
}

int perta_estimate_publish(struct perta_estimate_job *job, json_t **summary, struct perta_err *err)
{
    struct perta_publish *folders[2] = {0};
    size_t n = folders_of(job, folders);
    bool again = perta_journal_is_publishing(&job->journal);
    int rc = 0;
    if (again) {
        json_decref(*summary);
        *summary = perta_journal_summary(&job->journal);
    }
    for (int stat = 0; stat < 2 && !rc && !again; stat++)
        if (wanted(job, stat))
            rc = perta_importance_finish(&job->outs[stat], err);
    if (!rc)
        rc = perta_journal_complete(&job->journal, folders, n, *summary, err);
    if (!rc)
        rc = remove_scratch(job, err);
    return rc ? rc : perta_journal_publish(&job->journal, folders, n, *summary, err);
}

/* The journal is removed first: it must not name folders that are gone. */
int perta_estimate_drop(struct perta_estimate_job *job, struct perta_err *err)
{
    struct perta_publish *folders[2] = {0};
    size_t n = folders_of(job, folders);
    int rc = perta_journal_remove(&job->journal, err);
    if (!rc)
        rc = remove_scratch(job, err);
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_publish_discard(folders[i], err);
    return rc;
}

void perta_estimate_abandon(struct perta_estimate_job *job, int rc, struct perta_err *err)
{
    struct perta_publish *folders[2] = {0};
    struct perta_err ignored = {0};
    size_t n = folders_of(job, folders);
    perta_journal_abandon(&job->journal, folders, n, rc, err);
    if (n && !folders[n - 1]->keep)
        remove_scratch(job, &ignored);
}
