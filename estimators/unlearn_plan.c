#include "estimators/unlearn_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

const char *const perta_roles[PERTA_N_ROLES] = {"--model", "--tuned", "--base", "--forget",
                                                "--retain", "--scale"};

static bool has_role(const struct perta_unlearn_job *job, int role)
{
    if (role == PERTA_ROLE_SCALE)
        return job->rule.method == PERTA_SCALE;
    return role < PERTA_ROLE_FORGET || perta_rule_needs_importance(&job->rule);
}

/* In place of a tuned checkpoint. */
static int open_adapter(struct perta_unlearn_job *job, json_t *notes, struct perta_err *err)
{
    struct perta_input *in = &job->in[PERTA_ROLE_TUNED];
    *in = (struct perta_input){.role = perta_roles[PERTA_ROLE_TUNED]};
    int rc = perta_checkpoint_open_adapter(job->unlearn->tuned, &in->ck, err);
    if (!rc)
        rc = perta_adapter_open(in->ck, job->in[PERTA_ROLE_MODEL].ck, &job->adapter, notes,
                                err);
    return rc ? perta_err_context(err, "%s", in->role) : 0;
}

static int open_inputs(struct perta_unlearn_job *job, json_t *notes, struct perta_err *err)
{
    const struct perta_unlearn *u = job->unlearn;
    const char *const paths[] = {u->model, u->tuned, u->base, u->forget, u->retain, u->scale};
    for (int i = 0; i < PERTA_N_ROLES; i++) {
        if (!has_role(job, i) || (i == PERTA_ROLE_BASE && job->adapter && !paths[i]))
            continue;
        if (!paths[i])
            return perta_fail(err, PERTA_EUSAGE, "%s is needed, unless --tuned is a LoRA adapter",
                              perta_roles[i]);
        int rc = i == PERTA_ROLE_TUNED && perta_checkpoint_is_adapter(paths[i])
                     ? open_adapter(job, notes, err)
                     : perta_input_open(&job->in[i], perta_roles[i], paths[i], err);
        if (rc)
            return rc;
    }
    return 0;
}

/* ref: the operand of that role, or NULL. */
static int set_operand(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                       int role, const struct perta_ref *ref, struct perta_err *err)
{
    const struct perta_tensor *model = row->in[PERTA_ROLE_MODEL]->tensor;
    row->in[role] = ref;
    if (!ref)
        return 0;
    if (!perta_dtype_is_editable(ref->tensor->dtype))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s is %s; BF16, F16, F32 or F64 needed",
                          job->in[role].ck->path, model->name,
                          perta_dtype_name(ref->tensor->dtype));
    return perta_shapes_agree(perta_roles[PERTA_ROLE_MODEL], model, perta_roles[role],
                              ref->tensor, err);
}

static int find_operand(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                        int role, bool tied, struct perta_err *err)
{
    const char *name = row->in[PERTA_ROLE_MODEL]->tensor->name;
    return set_operand(job, row, role, perta_tied_find(job->in[role].ck, name, tied), err);
}

static int find_needed(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                       int role, bool tied, struct perta_err *err)
{
    int rc = find_operand(job, row, role, tied, err);
    if (rc || row->in[role])
        return rc;
    return perta_fail(err, PERTA_EINPUT,
                      "%s: no tensor %s, which --model has; is it another architecture? "
                      "--exclude leaves tensors out",
                      job->in[role].ck->path, row->in[PERTA_ROLE_MODEL]->tensor->name);
}

/* Where --tuned is an adapter. --base is needed for what it holds whole; elsewhere it need not
 * be there, and is checked, but not read. */
static int fill_change(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                       const struct perta_change *change, bool tied, struct perta_err *err)
{
    bool has_base = job->in[PERTA_ROLE_BASE].ck;
    if (change->whole && !has_base)
        return perta_fail(err, PERTA_EUSAGE,
                          "--base DIR is needed: the adapter %s holds %s whole, not what tuning "
                          "changed in it",
                          job->in[PERTA_ROLE_TUNED].ck->path, change->whole->tensor->name);
    int rc = set_operand(job, row, PERTA_ROLE_TUNED, change->whole, err);
    if (!rc && has_base)
        rc = find_needed(job, row, PERTA_ROLE_BASE, tied, err);
    if (!change->whole) {
        row->in[PERTA_ROLE_BASE] = NULL;
        row->lora = change;
    }
    return rc;
}

static int fill_task_vector(const struct perta_unlearn_job *job,
                            struct perta_unlearn_row *row, bool tied, struct perta_err *err)
{
    int rc = find_needed(job, row, PERTA_ROLE_TUNED, tied, err);
    return rc ? rc : find_needed(job, row, PERTA_ROLE_BASE, tied, err);
}

static void keep(struct perta_unlearn_row *row)
{
    for (int role = PERTA_ROLE_TUNED; role < PERTA_N_ROLES; role++)
        row->in[role] = NULL;
    row->lora = NULL;
}

static int fill_operands(struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                         const char **action, bool tied, struct perta_err *err)
{
    const char *name = row->in[PERTA_ROLE_MODEL]->tensor->name;
    const struct perta_change *change =
        job->adapter ? perta_adapter_find(job->adapter, name, tied) : NULL;
    if (job->adapter && !change) {
        *action = "kept: not in the adapter";
        return 0;
    }
    int rc = change ? fill_change(job, row, change, tied, err)
                    : fill_task_vector(job, row, tied, err);
    if (rc)
        return rc;
    row->method = job->rule.method;
    for (int role = PERTA_ROLE_FORGET; role < PERTA_N_ROLES; role++) {
        if (!has_role(job, role))
            continue;
        rc = find_operand(job, row, role, tied, err);
        if (rc)
            return rc;
        if (row->in[role])
            continue;
        if (job->unlearn->missing == PERTA_MISSING_ERROR)
            return perta_fail(
                err, PERTA_EINPUT,
                "%s: no importance for tensor %s; --missing keep leaves such "
                "tensors as they are, --missing tv subtracts their whole task "
                "vector",
                job->in[role].ck->path, name);
        row->in[PERTA_ROLE_FORGET] = row->in[PERTA_ROLE_RETAIN] = NULL;
        if (job->unlearn->missing == PERTA_MISSING_KEEP) {
            *action = "kept: no importance";
            keep(row);
            return 0;
        }
        row->method = PERTA_TV;
        break;
    }
    *action = "edited";
    row->edited = true;
    return 0;
}

static int fill_rows(struct perta_unlearn_job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    bool tied = perta_is_tied(model);
    job->rows = calloc(model->n_tensors + 1, sizeof *job->rows);
    job->actions = calloc(model->n_tensors + 1, sizeof *job->actions);
    if (!job->rows || !job->actions)
        return perta_fail_sys(err, ENOMEM, "plan");
    uint64_t index = 0, n_edited = 0;
    for (uint32_t s = 0; s < model->n_shards; s++)
        for (uint64_t t = 0; t < model->shards[s].header->n_tensors; t++, index++) {
            const struct perta_tensor *tensor = &model->shards[s].header->tensors[t];
            struct perta_unlearn_row *row = &job->rows[index];
            row->in[PERTA_ROLE_MODEL] = perta_checkpoint_find(model, tensor->name);
            row->name_hash = perta_hash64(tensor->name, strlen(tensor->name));
            int rc = 0;
            if (!perta_dtype_is_editable(tensor->dtype))
                job->actions[index] = "passed through: not BF16, F16, F32 or F64";
            else if (!perta_globs_match(&job->unlearn->globs, tensor->name))
                job->actions[index] = "kept: excluded";
            else
                rc = fill_operands(job, row, &job->actions[index], tied, err);
            if (rc)
                return rc;
            n_edited += row->edited;
        }
    if (!n_edited && (job->unlearn->globs.n_include || job->unlearn->globs.n_exclude))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: --include and --exclude leave no tensor to edit",
                          model->path);
    return 0;
}

/* Under the model's names; those of an adapter are its own, and were looked up. */
static bool has_tensors(const struct perta_unlearn_job *job, int role)
{
    return job->in[role].ck && !job->in[role].ck->is_adapter;
}

/* A tensor that the model lacks means another architecture, but for the other name of tied
 * embeddings. */
static int check_extra(const struct perta_unlearn_job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    bool tied = perta_is_tied(model);
    for (int role = PERTA_ROLE_TUNED; role <= PERTA_ROLE_BASE; role++)
        for (uint64_t i = 0; has_tensors(job, role) && i < job->in[role].ck->n_tensors; i++) {
            const char *name = job->in[role].ck->by_name[i].tensor->name;
            if (!perta_tied_find(model, name, tied))
                return perta_fail(
                    err, PERTA_EINPUT,
                    "%s: has tensor %s, which --model %s lacks; is it another "
                    "architecture?",
                    job->in[role].ck->path, name, model->path);
        }
    return 0;
}

static int find_stat(struct perta_unlearn_job *job, json_t *notes, struct perta_err *err)
{
    enum perta_stat stats[2] = {PERTA_STAT_MEAN, PERTA_STAT_MEAN};
    if (!has_role(job, PERTA_ROLE_FORGET))
        return 0;
    for (int i = 0; i < 2; i++) {
        int rc = perta_stat_of(job->in[PERTA_ROLE_FORGET + i].ck, &stats[i], notes, err);
        if (rc)
            return rc;
    }
    if (stats[0] != stats[1])
        return perta_fail(
            err, PERTA_EUSAGE,
            "--forget holds %s, --retain %s gradients; both must hold the same",
            perta_stat_name(stats[0]), perta_stat_name(stats[1]));
    job->rule.stat = stats[0];
    return 0;
}

char *perta_unlearn_folder(const struct perta_unlearn_job *job, const char *dir, unsigned a)
{
    if (!dir || job->unlearn->n_alphas == 1)
        return dir ? strdup(dir) : NULL;
    char name[64];
    snprintf(name, sizeof name, "alpha-%s", job->unlearn->alphas[a].text);
    return perta_path_join(dir, name);
}

static int check_outputs(const struct perta_unlearn_job *job, struct perta_err *err)
{
    const struct perta_unlearn *u = job->unlearn;
    const char *const inputs[] = {u->model, u->tuned, u->base, u->forget, u->retain, u->scale};
    char *outputs[2 * PERTA_ALPHAS_MAX] = {0};
    size_t n = 0;
    for (unsigned a = 0; a < u->n_alphas; a++) {
        outputs[n++] = perta_unlearn_folder(job, u->patch, a);
        if (u->out)
            outputs[n++] = perta_unlearn_folder(job, u->out, a);
    }
    int rc = 0;
    for (size_t i = 0; i < n; i++)
        if (!outputs[i])
            rc = perta_fail_sys(err, ENOMEM, "%s", u->patch);
    if (!rc)
        rc = perta_publish_check((const char *const *)outputs, n, inputs, PERTA_N_ROLES,
                                 u->force, err);
    for (size_t i = 0; i < n; i++)
        free(outputs[i]);
    return rc;
}

char *perta_unlearn_home(const struct perta_unlearn_job *job)
{
    const struct perta_unlearn *u = job->unlearn;
    return perta_unlearn_folder(job, u->out ? u->out : u->patch, u->n_alphas - 1);
}

int perta_unlearn_plan(struct perta_unlearn_job *job, const struct perta_run *run,
                       json_t *notes, struct perta_err *err)
{
    int rc = open_inputs(job, notes, err);
    if (!rc)
        rc = find_stat(job, notes, err);
    if (!rc)
        rc = check_extra(job, err);
    if (!rc)
        rc = fill_rows(job, err);
    char *home = perta_unlearn_home(job);
    if (!rc && !(home && perta_resume_found(run, home)))
        rc = check_outputs(job, err);
    free(home);
    return rc;
}
