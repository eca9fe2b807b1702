#include "estimators/edit/box.h"
#include "estimators/edit/unlearn_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/format/quantised.h"
#include "io/format/tied.h"
#include "io/format/which.h"
#include "io/text.h"

const char *const perta_roles[PERTA_N_ROLES] = {"--model",  "--tuned",  "--base",
                                                "--forget", "--retain", "--scale"};

static bool has_role(const struct perta_unlearn_job *job, int role)
{
    if (role == PERTA_ROLE_SCALE)
        return job->rule.method == PERTA_SCALE;
    if (role == PERTA_ROLE_TUNED || role == PERTA_ROLE_BASE)
        return !job->unlearn->box;
    return role < PERTA_ROLE_FORGET || perta_rule_needs_importance(&job->rule);
}

/* ---- the inputs ---- */

/* If --model or the folder of a role ties embeddings, and the folder stores the matrix under both
 * names, the two must be byte-identical. */
static int check_tied(const struct perta_unlearn_job *job, int role, struct perta_err *err)
{
    const struct perta_checkpoint *ck = job->in[role].ck;
    const struct perta_ref *head, *embedding;
    bool same = true;
    if (perta_is_tied(ck))
        return perta_tied_check(ck, err);
    if (!perta_is_tied(job->in[PERTA_ROLE_MODEL].ck) || !perta_tied_pair(ck, &embedding, &head))
        return 0;
    int rc = perta_tied_compare(ck, embedding, ck, head, &same, err);
    return rc || same
               ? rc
               : perta_fail(err, PERTA_EINPUT,
                            "%s %s: tensors %s and %s differ, but --model %s has one matrix for "
                            "both (\"tie_word_embeddings\" in its config.json); give it a head of "
                            "its own (store %s, and set that to false)",
                            perta_roles[role], ck->path, embedding->tensor->name,
                            head->tensor->name, job->in[PERTA_ROLE_MODEL].ck->path,
                            head->tensor->name);
}

/* The names in an importance are --model's, or were before a training wrapper changed them. */
static int align(const struct perta_unlearn_job *job, int role, json_t *notes,
                 struct perta_err *err)
{
    struct perta_checkpoint *ck = job->in[role].ck;
    const char *add, *wrapper;
    char prefix[PERTA_PREFIX_ROOM];
    int rc = perta_names_align(ck, job->in[PERTA_ROLE_MODEL].ck, prefix, &add, &wrapper, err);
    if (!rc && wrapper)
        perta_note(
            notes,
            "%s: its names are those of --model with parts added by training wrappers (%.*s)",
            perta_roles[role], (int)strlen(wrapper) - 1, wrapper);
    if (!rc && (*prefix || *add))
        perta_note(notes, "%s: its names are those of --model except for %s%s%s%s",
                   perta_roles[role], *prefix ? "a prefix " : "", prefix,
                   *prefix && *add ? " in place of "
                   : *add          ? "a missing "
                                   : "",
                   add);
    return rc;
}

static int check_input(const struct perta_unlearn_job *job, int role, json_t *notes,
                       struct perta_err *err)
{
    int rc = role <= PERTA_ROLE_BASE ? perta_quantised_refuse(job->in[role].ck, err) : 0;
    if (!rc && (role == PERTA_ROLE_FORGET || role == PERTA_ROLE_RETAIN))
        rc = align(job, role, notes, err);
    return rc || role == PERTA_ROLE_SCALE ? rc : check_tied(job, role, err);
}

/* Open a box in place of a tuned checkpoint. */
static int open_box(struct perta_unlearn_job *job, struct perta_err *err)
{
    struct perta_input *in = &job->in[PERTA_ROLE_TUNED];
    if (!job->unlearn->box)
        return 0;
    int rc = perta_input_open(in, "box", job->unlearn->box, err);
    return rc ? rc : perta_box_sizes(in->ck, job->unlearn->box_size, &job->box_sizes, err);
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
        int rc =
            i == PERTA_ROLE_TUNED && perta_checkpoint_is_adapter(paths[i])
                ? perta_adapter_open_input(&job->in[i], perta_roles[i], paths[i],
                                           job->in[PERTA_ROLE_MODEL].ck, &job->adapter, notes, err)
                : perta_input_open(&job->in[i], perta_roles[i], paths[i], err);
        if (!rc && i < PERTA_ROLE_FORGET && perta_which_model(job->in[i].ck, err))
            rc = perta_err_context(err, "%s", perta_roles[i]);
        if (!rc && !job->in[i].ck->is_adapter)
            rc = check_input(job, i, notes, err);
        if (rc)
            return rc;
    }
    return open_box(job, err);
}

/* ---- one tensor ---- */

/* Set the operand of that role to ref, which may be NULL. */
static int set_operand(const struct perta_unlearn_job *job, struct perta_unlearn_row *row, int role,
                       const struct perta_ref *ref, struct perta_err *err)
{
    const struct perta_tensor *model = row->in[PERTA_ROLE_MODEL]->tensor;
    row->in[role] = ref;
    if (!ref)
        return 0;
    bool is_box = role == PERTA_ROLE_TUNED && job->box_sizes;
    if (is_box ? ref->tensor->dtype != PERTA_I8 : !perta_dtype_is_editable(ref->tensor->dtype))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; %s needed",
                          job->in[role].ck->path, model->name, perta_dtype_name(ref->tensor->dtype),
                          is_box ? "I8" : "BF16, F16, F32 or F64");
    return perta_shapes_agree(perta_roles[PERTA_ROLE_MODEL], model, perta_roles[role], ref->tensor,
                              err);
}

static int find_operand(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                        int role, bool tied, struct perta_err *err)
{
    const char *name = row->in[PERTA_ROLE_MODEL]->tensor->name;
    return set_operand(job, row, role, perta_tied_find(job->in[role].ck, name, tied), err);
}

static int find_needed(const struct perta_unlearn_job *job, struct perta_unlearn_row *row, int role,
                       bool tied, struct perta_err *err)
{
    int rc = find_operand(job, row, role, tied, err);
    if (rc || row->in[role])
        return rc;
    const char *name = row->in[PERTA_ROLE_MODEL]->tensor->name,
               *other = perta_tied_name(job->in[role].ck, name);
    if (other && perta_checkpoint_find(job->in[role].ck, other))
        return perta_fail(
            err, PERTA_EINPUT,
            "%s %s: no tensor %s, but --model has it as well as %s; are the two tied in "
            "one and not in the other (\"tie_word_embeddings\" in config.json)?",
            perta_roles[role], job->in[role].ck->path, name, other);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: no tensor %s, but --model has it; is it a different architecture? "
                      "--exclude leaves tensors out of the edit",
                      job->in[role].ck->path, name);
}

/* PEFT's copy of the weight that A and B are added to must be what --base holds. This is checked
 * only if both have the same dtype: a model loaded in another dtype was rounded. */
static int check_copy(const struct perta_unlearn_job *job, const struct perta_change *change,
                      const struct perta_ref *base, struct perta_err *err)
{
    const struct perta_checkpoint *tuned = job->in[PERTA_ROLE_TUNED].ck,
                                  *ck = job->in[PERTA_ROLE_BASE].ck;
    bool same = true;
    int rc = change->base_layer && change->base_layer->tensor->dtype == base->tensor->dtype
                 ? perta_tied_compare(tuned, change->base_layer, ck, base, &same, err)
                 : 0;
    return rc || same
               ? rc
               : perta_fail(
                     err, PERTA_EINPUT,
                     "%s: tensor %s, the copy of the weight that the LoRA is added to, differs "
                     "from %s in --base %s; was the adapter tuned from that base? If the copy "
                     "is right, merge the adapter into its base",
                     tuned->shards[0].path, change->base_layer->tensor->name, base->tensor->name,
                     ck->path);
}

/* Fill a row when --tuned is an adapter. --base is needed only for tensors that the adapter stores
 * whole. For the others it is optional: it is checked, but not read. */
static int fill_change(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                       const struct perta_change *change, bool tied, struct perta_err *err)
{
    bool has_base = job->in[PERTA_ROLE_BASE].ck;
    if (change->whole && !has_base)
        return perta_fail(
            err, PERTA_EUSAGE,
            "--base DIR is needed: the adapter %s stores %s whole, not as the change that "
            "tuning made",
            job->in[PERTA_ROLE_TUNED].ck->path, change->whole->tensor->name);
    int rc = set_operand(job, row, PERTA_ROLE_TUNED, change->whole, err);
    if (!rc && has_base)
        rc = find_needed(job, row, PERTA_ROLE_BASE, tied, err);
    if (!rc && has_base)
        rc = check_copy(job, change, row->in[PERTA_ROLE_BASE], err);
    if (!change->whole) {
        row->in[PERTA_ROLE_BASE] = NULL;
        row->lora = change;
    }
    return rc;
}

static int fill_task_vector(const struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                            bool tied, struct perta_err *err)
{
    int rc = find_needed(job, row, PERTA_ROLE_TUNED, tied, err);
    return rc ? rc : find_needed(job, row, PERTA_ROLE_BASE, tied, err);
}

/* A tensor that the box lacks stays unchanged. */
static int fill_box(const struct perta_unlearn_job *job, struct perta_unlearn_row *row, bool tied,
                    struct perta_err *err)
{
    int rc = find_operand(job, row, PERTA_ROLE_TUNED, tied, err);
    const struct perta_ref *ref = row->in[PERTA_ROLE_TUNED];
    if (ref)
        row->box = job->box_sizes[ref - job->in[PERTA_ROLE_TUNED].ck->by_name];
    return rc;
}

static void keep(struct perta_unlearn_row *row)
{
    for (int role = PERTA_ROLE_TUNED; role < PERTA_N_ROLES; role++)
        row->in[role] = NULL;
    row->lora = NULL;
}

static void count(struct perta_tally *tally, const struct perta_unlearn_row *row)
{
    tally->n_tensors++;
    tally->n_params += row->in[PERTA_ROLE_MODEL]->tensor->n_elems;
}

/* Find the importances, or apply --missing to a tensor that has none. Sets *kept if the tensor
 * stays unchanged. */
static int fill_importance(struct perta_unlearn_job *job, struct perta_unlearn_row *row, bool tied,
                           bool *kept, struct perta_err *err)
{
    int lacks = 0;
    for (int role = PERTA_ROLE_FORGET; role < PERTA_N_ROLES; role++) {
        int rc = has_role(job, role) ? find_operand(job, row, role, tied, err) : 0;
        if (rc)
            return rc;
        lacks = !lacks && has_role(job, role) && !row->in[role] ? role : lacks;
    }
    *kept = lacks && job->unlearn->missing == PERTA_MISSING_KEEP;
    count(&job->wanted, row);
    if (!lacks)
        return 0;
    if (job->unlearn->missing == PERTA_MISSING_ERROR)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: no importance for tensor %s; --missing keep leaves such tensors "
                          "unchanged, --missing tv subtracts their whole task "
                          "vector",
                          job->in[lacks].ck->path, row->in[PERTA_ROLE_MODEL]->tensor->name);
    count(&job->missing, row);
    row->in[PERTA_ROLE_FORGET] = row->in[PERTA_ROLE_RETAIN] = NULL;
    row->method = PERTA_TV;
    return 0;
}

static int fill_operands(struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                         const char **action, bool tied, struct perta_err *err)
{
    const char *name = row->in[PERTA_ROLE_MODEL]->tensor->name;
    const struct perta_change *change =
        job->adapter ? perta_adapter_find(job->adapter, name) : NULL;
    bool kept = false;
    if (job->adapter && !change) {
        *action = "kept: not in the adapter";
        return 0;
    }
    int rc = change           ? fill_change(job, row, change, tied, err)
             : job->box_sizes ? fill_box(job, row, tied, err)
                              : fill_task_vector(job, row, tied, err);
    if (!rc && job->box_sizes && !row->in[PERTA_ROLE_TUNED]) {
        *action = "kept: not in the box";
        return 0;
    }
    row->method = job->rule.method;
    if (!rc)
        rc = fill_importance(job, row, tied, &kept, err);
    if (!rc && kept)
        keep(row);
    row->edited = !rc && !kept;
    *action = kept ? "kept: no importance" : "edited";
    return rc;
}

/* ---- all of them ---- */

/* For a matrix with two names, the globs must select both or neither. */
static int check_globs(const struct perta_unlearn_job *job, bool tied, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    const struct perta_ref *a, *b;
    if (!tied || !perta_tied_pair(model, &a, &b))
        return 0;
    const char *embedding = a->tensor->name, *head = b->tensor->name;
    bool chosen = perta_globs_match(&job->unlearn->globs, head);
    if (perta_globs_match(&job->unlearn->globs, embedding) == chosen)
        return 0;
    return perta_fail(
        err, PERTA_EUSAGE,
        "%s: --include and --exclude select %s but not %s, which config.json ties to it",
        model->path, chosen ? head : embedding, chosen ? embedding : head);
}

/* Tied tensors share this hash, so that --method random gives both the same weights. */
static uint64_t name_hash(const struct perta_checkpoint *model, const char *name, bool tied)
{
    const char *other = tied ? perta_tied_name(model, name) : NULL;
    const char *key = other && !perta_tied_is_embedding(name) ? other : name;
    return perta_hash64(key, strlen(key));
}

static int fill_row(struct perta_unlearn_job *job, struct perta_unlearn_row *row,
                    const struct perta_tensor *tensor, const char **action, bool tied,
                    struct perta_err *err)
{
    row->in[PERTA_ROLE_MODEL] = perta_checkpoint_find(job->in[PERTA_ROLE_MODEL].ck, tensor->name);
    if (perta_is_buffer(tensor))
        *action = "passed through: a buffer";
    else if (!perta_dtype_is_editable(tensor->dtype))
        *action = "passed through: not BF16, F16, F32 or F64";
    else if (!perta_globs_match(&job->unlearn->globs, tensor->name))
        *action = "kept: excluded";
    else
        return fill_operands(job, row, action, tied, err);
    return 0;
}

static int check_missing(const struct perta_unlearn_job *job, struct perta_err *err)
{
    if (!job->missing.n_tensors || job->missing.n_tensors < job->wanted.n_tensors)
        return 0;
    return perta_fail(
        err, PERTA_EINPUT,
        "--forget %s, --retain %s: none of the %llu tensors to edit has importance in "
        "both; do they belong to a different model? --method tv needs none",
        job->unlearn->forget, job->unlearn->retain, (unsigned long long)job->wanted.n_tensors);
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
    int rc = check_globs(job, tied, err);
    for (uint32_t s = 0; s < model->n_shards && !rc; s++)
        for (uint64_t t = 0; t < model->shards[s].header->n_tensors && !rc; t++, index++) {
            const struct perta_tensor *tensor = &model->shards[s].header->tensors[t];
            struct perta_unlearn_row *row = &job->rows[index];
            row->name_hash = name_hash(model, tensor->name, tied);
            rc = fill_row(job, row, tensor, &job->actions[index], tied, err);
            n_edited += row->edited;
        }
    if (rc)
        return rc;
    if (!n_edited && (job->unlearn->globs.n_include || job->unlearn->globs.n_exclude))
        return perta_fail(err, PERTA_EUSAGE, "%s: --include and --exclude leave no tensor to edit",
                          model->path);
    return has_role(job, PERTA_ROLE_FORGET) ? check_missing(job, err) : 0;
}

/* True for folders whose tensors go by the model's names. An adapter has names of its own, and has
 * been checked already. */
static bool has_tensors(const struct perta_unlearn_job *job, int role)
{
    return job->in[role].ck && !job->in[role].ck->is_adapter;
}

static const char *why_extra(int role, const char *name)
{
    if (!strstr(name, "lora_"))
        return "is it a different architecture?";
    return role == PERTA_ROLE_TUNED || role == PERTA_ROLE_BASE
               ? "is it a LoRA without PEFT's adapter_config.json? Merge it into its base, or "
                 "save it with PEFT"
               : "this is the importance of a LoRA's own parameters; that of the model's is needed";
}

/* A tensor that the model lacks means a different architecture, except for buffers and for the
 * other name of a tied embedding. */
static int check_extra(const struct perta_unlearn_job *job, struct perta_err *err)
{
    const struct perta_checkpoint *model = job->in[PERTA_ROLE_MODEL].ck;
    bool tied = perta_is_tied(model);
    for (int role = PERTA_ROLE_TUNED; role <= PERTA_ROLE_RETAIN; role++)
        for (uint64_t i = 0; has_tensors(job, role) && i < job->in[role].ck->n_tensors; i++) {
            const struct perta_tensor *tensor = job->in[role].ck->by_name[i].tensor;
            if (!perta_is_buffer(tensor) && !perta_tied_find(model, tensor->name, tied))
                return perta_fail(err, PERTA_EINPUT,
                                  "%s %s: has tensor %s, which is not in --model %s; %s",
                                  perta_roles[role], job->in[role].ck->path, tensor->name,
                                  model->path, why_extra(role, tensor->name));
        }
    return 0;
}

/* Refuse an importance that is one of the models: without metadata, weights would be taken as mean
 * gradients. */
static int check_not_weights(const struct perta_unlearn_job *job, int role, struct perta_err *err)
{
    const struct perta_shard *a = job->in[role].ck->shards;
    for (int other = PERTA_ROLE_MODEL; other <= PERTA_ROLE_BASE; other++)
        for (uint32_t i = 0; job->in[other].ck && i < job->in[other].ck->n_shards; i++) {
            const struct perta_shard *b = &job->in[other].ck->shards[i];
            if (job->in[role].ck->n_shards && a->dev == b->dev && a->ino == b->ino)
                return perta_fail(
                    err, PERTA_EINPUT,
                    "%s: this file is also part of %s, but an importance is needed; perta "
                    "estimate and perta accumulate make one",
                    a->path, perta_roles[other]);
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
        if (!rc)
            rc = check_not_weights(job, PERTA_ROLE_FORGET + i, err);
        if (rc)
            return perta_err_context(err, "%s", perta_roles[PERTA_ROLE_FORGET + i]);
    }
    if (stats[0] != stats[1])
        return perta_fail(
            err, PERTA_EUSAGE,
            "--forget holds %s and --retain %s gradients; both must hold the same kind",
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
    const char *const inputs[] = {
        u->model, u->box ? u->box : u->tuned, u->base, u->forget, u->retain, u->scale};
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
        rc = perta_publish_check((const char *const *)outputs, n, inputs, PERTA_N_ROLES, u->force,
                                 err);
    for (size_t i = 0; i < n; i++)
        free(outputs[i]);
    return rc;
}

char *perta_unlearn_last_folder(const struct perta_unlearn_job *job)
{
    const struct perta_unlearn *u = job->unlearn;
    return perta_unlearn_folder(job, u->out ? u->out : u->patch, u->n_alphas - 1);
}

int perta_unlearn_plan(struct perta_unlearn_job *job, const struct perta_run *run, json_t *notes,
                       struct perta_err *err)
{
    int rc = open_inputs(job, notes, err);
    if (!rc)
        rc = find_stat(job, notes, err);
    if (!rc)
        rc = check_extra(job, err);
    if (!rc)
        rc = fill_rows(job, err);
    char *last_folder = perta_unlearn_last_folder(job);
    if (!rc && !(last_folder && perta_resume_found(run, last_folder)))
        rc = check_outputs(job, err);
    free(last_folder);
    return rc;
}
