/* The forget set and the retain set. */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "estimators/model/samples.h"
#include "estimators/steps/steps_job.h"
#include "io/hash.h"

/* A pipe or device can be read only once: at the next step, reading it would block or find
 * nothing. */
static int check_file(const char *path, struct perta_err *err)
{
    struct stat st;
    if (stat(path, &st) || S_ISREG(st.st_mode) || S_ISDIR(st.st_mode))
        return 0; /* the error comes when it is read */
    return perta_fail(err, PERTA_EINPUT,
                      "%s: not a regular file, but every step reads it again; write the data to "
                      "a file first",
                      path);
}

/* ---- samples that are in both sets ---- */

struct key {
    uint64_t ids, targets; /* hashes */
    uint64_t line;
};

struct keys {
    uint64_t n;
    struct key *all; /* (n), in order */
};

static int compare(const void *pa, const void *pb)
{
    const struct key *a = pa, *b = pb;
    if (a->ids != b->ids)
        return a->ids < b->ids ? -1 : 1;
    return a->targets == b->targets ? 0 : a->targets < b->targets ? -1 : 1;
}

/* The caller frees keys->all. */
static int keys_of(const struct perta_samples *s, struct keys *keys, struct perta_err *err)
{
    keys->n = s->n;
    keys->all = malloc((s->n + 1) * sizeof *keys->all);
    if (!keys->all)
        return perta_fail_sys(err, ENOMEM, "samples");
    for (uint64_t i = 0; i < s->n; i++) {
        uint64_t first = s->starts[i], n = s->starts[i + 1] - first;
        keys->all[i] =
            (struct key){.ids = perta_hash64(s->ids + first, n * sizeof *s->ids),
                         .targets = perta_hash64(s->targets + first, n * sizeof *s->targets),
                         .line = s->lines[i]};
    }
    qsort(keys->all, s->n, sizeof *keys->all, compare);
    return 0;
}

static int check_apart(const struct perta_steps *s, const struct keys keys[2],
                       struct perta_err *err)
{
    for (uint64_t i = 0; i < keys[PERTA_RETAIN].n; i++) {
        const struct key *retain = &keys[PERTA_RETAIN].all[i];
        const struct key *forget =
            bsearch(retain, keys[PERTA_FORGET].all, keys[PERTA_FORGET].n, sizeof *forget, compare);
        if (forget)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: line %llu is the same sample as line %llu of %s; it cannot be "
                              "both forgotten and retained",
                              s->data_retain, (unsigned long long)retain->line,
                              (unsigned long long)forget->line, s->data_forget);
    }
    return 0;
}

/* ---- both files ---- */

static int read_set(struct perta_steps_job *job, int set, struct keys *keys, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    const char *path = set == PERTA_FORGET ? s->data_forget : s->data_retain;
    const struct perta_llm *llm = &job->weights.llm;
    const struct perta_samples_wanted wanted = {.vocab = llm->vocab,
                                                .max_tokens = s->max_tokens,
                                                .positions = perta_llm_longest(llm),
                                                .is_short = perta_llm_short(llm),
                                                .beyond = perta_llm_beyond(llm),
                                                .position_ids = llm->family->position_ids,
                                                .key_path = s->data_key};
    struct perta_samples samples;
    int rc = perta_samples_read(path, &wanted, &samples, err);
    if (rc)
        return rc;
    job->data[set] = samples.file;
    if (set == PERTA_FORGET)
        job->n_forget = samples.n;
    if (set == PERTA_RETAIN)
        job->batched = s->retain_batch && s->retain_batch < samples.n;
    if (json_array_extend(job->notes, samples.notes))
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        rc = keys_of(&samples, keys, err);
    perta_samples_release(&samples);
    return rc;
}

int perta_steps_read_data(struct perta_steps_job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    struct keys keys[2] = {0};
    int rc = (job->notes = json_array()) ? 0 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    if (!rc)
        rc = check_file(s->data_forget, err);
    if (!rc)
        rc = check_file(s->data_retain, err);
    for (int set = 0; set < 2 && !rc; set++)
        rc = read_set(job, set, &keys[set], err);
    if (!rc)
        rc = check_apart(s, keys, err);
    free(keys[PERTA_FORGET].all);
    free(keys[PERTA_RETAIN].all);
    return rc;
}
