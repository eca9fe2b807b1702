/* Notes for the user about a plan and about the results of a run. Spec: docs/method.md,
 * "Numbers" */
#include <string.h>

#include "estimators/edit/unlearn_job.h"
#include "io/text.h"

typedef unsigned long long ull;

/* ---- about the plan ---- */

/* The entry of reasons for that action, added if it is missing. NULL when out of memory. */
static json_t *reason_of(json_t *reasons, const char *action)
{
    size_t i;
    json_t *reason;
    json_array_foreach (reasons, i, reason)
        if (!strcmp(json_string_value(json_object_get(reason, "why")), action))
            return reason;
    reason = json_pack("{s:s, s:i, s:i}", "why", action, "tensors", 0, "parameters", 0);
    return json_array_append_new(reasons, reason) ? NULL : reason;
}

static bool add_to(json_t *object, const char *key, uint64_t n)
{
    json_t *count = json_object_get(object, key);
    return !json_integer_set(count, json_integer_value(count) + (json_int_t)n);
}

json_t *perta_unlearn_unedited(const struct perta_unlearn_job *job)
{
    json_t *reasons = json_array();
    uint64_t n = 0, of = 0;
    bool good = reasons;
    for (uint64_t i = 0; i < job->in[PERTA_ROLE_MODEL].ck->n_tensors && good; i++) {
        uint64_t n_params = job->rows[i].in[PERTA_ROLE_MODEL]->tensor->n_elems;
        of += n_params;
        if (job->rows[i].edited)
            continue;
        json_t *reason = reason_of(reasons, job->actions[i]);
        good = reason && add_to(reason, "tensors", 1) && add_to(reason, "parameters", n_params);
        n += n_params;
    }
    if (!good) {
        json_decref(reasons);
        return NULL;
    }
    return json_pack("{s:I, s:I, s:o}", "parameters", (json_int_t)n, "of", (json_int_t)of,
                     "reasons", reasons);
}

void perta_unlearn_note_missing(const struct perta_unlearn_job *job, json_t *notes)
{
    if (!job->missing.n_tensors || !job->in[PERTA_ROLE_FORGET].ck)
        return;
    bool keep = job->unlearn->missing == PERTA_MISSING_KEEP;
    perta_note(notes,
               "--missing %s: %llu of the %llu tensors to edit (%llu of %llu parameters) have no "
               "importance in both --forget and --retain: %s",
               keep ? "keep" : "tv", (ull)job->missing.n_tensors, (ull)job->wanted.n_tensors,
               (ull)job->missing.n_params, (ull)job->wanted.n_params,
               keep ? "they stay unchanged" : "their whole task vector is subtracted");
}

void perta_unlearn_note_unread(const struct perta_unlearn *unlearn, json_t *notes)
{
    const char *given = unlearn->forget && unlearn->retain ? "--forget and --retain are"
                        : unlearn->forget                  ? "--forget is"
                        : unlearn->retain                  ? "--retain is"
                                                           : NULL;
    if (given && !perta_rule_needs_importance(&unlearn->rule))
        perta_note(notes, "--method %s uses no importance: %s not read",
                   perta_method_name(unlearn->rule.method), given);
}

void perta_unlearn_note_alphas(const struct perta_unlearn *unlearn, json_t *notes)
{
    for (unsigned a = 0; a < unlearn->n_alphas; a++) {
        const struct perta_alpha *alpha = &unlearn->alphas[a];
        if (alpha->value == 0)
            perta_note(notes, "alpha %s: nothing changes", alpha->text);
        else if (alpha->value < 0)
            perta_note(notes,
                       "alpha %s is negative: the task vector is added, so the model "
                       "learns what the tuned one was tuned on",
                       alpha->text);
    }
}

/* ---- about the run ---- */

static const json_t *shards_of(const json_t *inputs, const char *role)
{
    return json_object_get(json_object_get(inputs, role), "shards");
}

/* Compares shard by shard. False if a shard has no digest. */
static bool are_same(const json_t *a, const json_t *b)
{
    static const char key[] = "xxh3_128";
    size_t n = json_array_size(a);
    bool same = n && n == json_array_size(b);
    for (size_t i = 0; same && i < n; i++) {
        const json_t *digest = json_object_get(json_array_get(a, i), key);
        same = json_is_string(digest) &&
               json_equal(digest, json_object_get(json_array_get(b, i), key));
    }
    return same;
}

void perta_unlearn_note_same(const json_t *inputs, json_t *notes)
{
    static const char *const pairs[][3] = {
        {"tuned", "base", "the task vector is zero, so nothing changes"},
        {"forget", "retain",
         "every parameter whose importance is not 0 has a weight of 1/2, whatever the method"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (are_same(shards_of(inputs, pairs[i][0]), shards_of(inputs, pairs[i][1])))
            perta_note(notes, "--%s and --%s are byte-identical: %s", pairs[i][0], pairs[i][1],
                       pairs[i][2]);
}

/* Did alpha number a change nothing, not counting changes that rounding took away? */
static bool changes_nothing(const struct perta_unlearn_job *job, unsigned a)
{
    const struct perta_patch_out *out = &job->outs[a];
    uint64_t n = 0;
    for (uint64_t i = 0; i < out->n_tensors; i++)
        n += out->tensors[i].n_changed + out->tensors[i].n_rounded_away +
             out->tensors[i].n_nonfinite;
    return !n;
}

/* Are all weights of the edited tensors zero? */
static bool weighs_nothing(const struct perta_unlearn_job *job)
{
    uint64_t n = 0, n_zero = 0;
    if (job->rule.method == PERTA_CONSTANT)
        return (float)job->rule.weight == 0;
    for (uint64_t i = 0; i < job->outs[0].n_tensors; i++) {
        n += job->rows[i].edited ? job->outs[0].tensors[i].n_params : 0;
        n_zero += job->outs[0].tensors[i].n_zero_forget;
    }
    return n && n == n_zero;
}

void perta_unlearn_note_nothing(const struct perta_unlearn_job *job, const json_t *inputs,
                                json_t *notes)
{
    bool said = are_same(shards_of(inputs, "tuned"), shards_of(inputs, "base"));
    for (unsigned a = 0; a < job->n_outs && !said && job->rule.method != PERTA_SCALE; a++) {
        if (job->unlearn->alphas[a].value == 0 || !changes_nothing(job, a))
            continue;
        said = true;
        perta_note(notes, "nothing changes: %s%s",
                   weighs_nothing(job) ? "the weight of every edited parameter is 0"
                   : job->adapter
                       ? "the adapter's task vector is zero (lora_A, lora_B or lora_alpha is zero)"
                       : "--tuned and --base hold the same values",
                   perta_rule_needs_importance(&job->rule) && !weighs_nothing(job)
                       ? " wherever the weight is not zero"
                       : "");
    }
}

/* Zeros in the edited tensors of one role. */
struct zeros {
    uint64_t n_tensors;     /* tensors that hold only zeros */
    const char *first;      /* name of the first of them */
    uint64_t n_f16, of_f16; /* zeros, and all values, in tensors stored as F16 */
};

static struct zeros count(const struct perta_unlearn_job *job, int role)
{
    struct zeros z = {0};
    for (uint64_t i = 0; i < job->outs[0].n_tensors; i++) {
        const struct perta_tensor_counts *c = &job->outs[0].tensors[i];
        const struct perta_ref *ref = job->rows[i].in[role];
        uint64_t n = role == PERTA_ROLE_FORGET ? c->n_zero_forget : c->n_zero_retain;
        if (!job->rows[i].edited || !ref || !c->n_params)
            continue;
        if (n == c->n_params && !z.n_tensors++)
            z.first = c->name;
        if (ref->tensor->dtype == PERTA_F16) {
            z.n_f16 += n;
            z.of_f16 += c->n_params;
        }
    }
    return z;
}

void perta_unlearn_note_zeros(const struct perta_unlearn_job *job, json_t *notes)
{
    static const char *const then[] = {"stay unchanged (w = 0)",
                                       "are edited in full wherever the forget set touches them "
                                       "(w = 1)"};
    for (int role = PERTA_ROLE_FORGET; role <= PERTA_ROLE_RETAIN; role++) {
        struct zeros z = count(job, role);
        if (z.n_tensors)
            perta_note(notes, "%s: %llu tensors hold only zeros, the first of them %s: they %s",
                       perta_roles[role], (ull)z.n_tensors, z.first,
                       then[role - PERTA_ROLE_FORGET]);
        if (z.n_f16)
            perta_note(notes,
                       "%s: %llu of %llu values in F16 are 0; F16 holds nothing below "
                       "3e-8, so they may have underflowed; F32 or BF16 would hold smaller values",
                       perta_roles[role], (ull)z.n_f16, (ull)z.of_f16);
    }
}
