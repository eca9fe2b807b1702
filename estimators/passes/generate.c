#include "estimators/passes/generate.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "io/text.h"

#define JSON_BYTES 80 /* of a token in the summary and its text, about */

/* ---- prompts ---- */

/* Tokens of a sample before its first label. */
static uint32_t prompt_of(const struct perta_samples *s, uint64_t sample)
{
    uint64_t t = s->starts[sample];
    while (s->targets[t] == PERTA_IGNORED)
        t++;
    return (uint32_t)(t + 1 - s->starts[sample]);
}

/* Do the prompt and the longest answer have the frequencies of rotary positions with which the
 * prompt was computed, and are there learned positions for them? */
static int check_longest(const struct perta_generation *g, const struct perta_estimate_job *job,
                         uint64_t sample, const struct perta_place *last, struct perta_err *err)
{
    const struct perta_llm *llm = &job->weights.llm;
    uint64_t end = (uint64_t)last->position + g->most, longest = perta_llm_longest(llm);
    uint64_t short_end = perta_llm_short(llm);
    bool same = last->is_long ? last->position >= short_end : end <= short_end;
    if (same && end <= longest)
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      llm->n_positions
                          ? "%s: line %llu: an answer, the given or a generated one, may reach "
                            "position %llu, counted from 0, from which on the model has no learned "
                            "positions"
                          : "%s: line %llu: an answer, the given or a generated one, may reach "
                            "position %llu, counted from 0, from which on the frequencies of this "
                            "model's rotary positions change with the length; that is not "
                            "supported while an answer is generated",
                      job->estimate->data, (unsigned long long)job->samples.lines[sample],
                      (unsigned long long)(longest < short_end ? longest : short_end));
}

/* Does every token see all that are before it? */
static int check_places(const struct perta_estimate_job *job, uint64_t sample,
                        struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    const struct perta_place *places = s->places + s->starts[sample];
    for (uint32_t i = 0; i < s->starts[sample + 1] - s->starts[sample]; i++)
        if (places[i].first || places[i].end != i + 1 || places[i].at != places[0].at + i)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: line %llu: an answer is generated only to a line that is one "
                              "sequence: without position_ids that start again, or tokens between "
                              "others that attention_mask hides",
                              job->estimate->data, (unsigned long long)s->lines[sample]);
    return 0;
}

static int find_prompts(struct perta_generation *g, const struct perta_estimate_job *job,
                        struct perta_cached *cached, struct perta_err *err)
{
    const struct perta_samples *s = &job->samples;
    int rc = 0;
    for (uint64_t i = 0; i < s->n && !rc; i++) {
        if (s->kinds[i] != PERTA_SAMPLE)
            continue;
        rc = check_places(job, i, err);
        uint32_t n = prompt_of(s, i);
        uint64_t last = s->starts[i] + n - 1;
        if (!rc)
            rc = check_longest(g, job, i, s->places + last, err);
        cached[g->n] = (struct perta_cached){
            .first = s->starts[i], .n = n, .most = n + (uint32_t)(g->most - 1)};
        g->answers[g->n++] = (struct perta_answer){
            .sample = i, .position = s->places[last].position + 1, .at = s->places[last].at + 1};
    }
    return rc;
}

/* ---- memory ---- */

/* Room for n tokens, one for each answer. */
static int make_samples(struct perta_generation *g, uint64_t n, struct perta_err *err)
{
    struct perta_samples *s = &g->samples;
    s->starts = calloc(n + 1, sizeof *s->starts);
    s->ids = calloc(n, sizeof *s->ids);
    s->targets = calloc(n, sizeof *s->targets);
    s->places = calloc(n, sizeof *s->places);
    s->n_labels = calloc(n, sizeof *s->n_labels);
    s->lines = calloc(n, sizeof *s->lines);
    s->kinds = calloc(n, sizeof *s->kinds);
    s->room = n;
    g->starts = calloc(n + 1, sizeof *g->starts);
    g->answer = calloc(n, sizeof *g->answer);
    return s->starts && s->ids && s->targets && s->places && s->n_labels && s->lines && s->kinds &&
                   g->starts && g->answer
               ? 0
               : perta_fail_sys(err, ENOMEM, "answers");
}

/* Bytes that are taken after the job's plan: buffers, the head of n tokens, tokens, the summary. */
static uint64_t later_bytes(const struct perta_generation *g, const struct perta_llm *llm)
{
    const struct perta_samples all = {.n = g->n, .n_tokens = g->n, .room = g->n};
    const struct perta_cpu_needs needs = {.widest = perta_llm_widest(llm)};
    uint64_t bytes = g->n * g->most * (sizeof *g->tokens + JSON_BYTES);
    if (g->most == 1)
        return bytes;
    return bytes + perta_cpu_buffer_bytes(&needs, perta_cache_room_bytes(&g->cache)) +
           perta_cpu_buffer_bytes(&needs, perta_head_device_bytes(&all, llm, false)) +
           perta_head_bytes(&all, false) + perta_cache_heap_bytes(&g->cache) +
           perta_samples_bytes(&all) +
           g->n * (sizeof *g->answers + sizeof *g->answer + sizeof *g->starts);
}

int perta_generation_begin(struct perta_generation *g, struct perta_estimate_job *job,
                           uint64_t most, struct perta_err *err)
{
    uint64_t n = job->samples.n; /* at least the number of prompts */
    const struct perta_llm *llm = &job->weights.llm;
    g->most = most;
    int rc = perta_ends_read(job->weights.ck, llm->vocab, &g->ends, &job->samples.notes, err);
    if (rc)
        return rc;
    g->answers = calloc(n, sizeof *g->answers);
    struct perta_cached *cached = calloc(n, sizeof *cached);
    rc = g->answers && cached ? find_prompts(g, job, cached, err)
                              : perta_fail_sys(err, ENOMEM, "answers");
    if (rc || most == 1) {
        free(cached);
    } else {
        rc = perta_cache_plan(&g->cache, llm, cached, g->n, err);
        job->cache = &g->cache;
    }
    if (!rc)
        rc = make_samples(g, g->n, err);
    job->later_bytes += rc ? 0 : later_bytes(g, llm);
    return rc;
}

/* The head's store is used in every pass, so it is given memory before those of the cache. */
int perta_generation_open(struct perta_generation *g, struct perta_estimate_job *job,
                          struct perta_err *err)
{
    struct perta_scratch *scratch = &job->scratch;
    size_t H = job->weights.llm.hidden;
    g->tokens = calloc(g->n * g->most, sizeof *g->tokens);
    if (!g->tokens)
        return perta_fail_sys(err, ENOMEM, "answers");
    if (!job->cache)
        return 0;
    job->total_bytes *= g->most;
    int rc = perta_store_open(&g->x, scratch, NULL, g->n, H, err);
    if (rc)
        return rc;
    uint64_t normed = job->be->ops->buffer_bytes(job->be, g->n * H * sizeof(float));
    uint64_t kept = normed < scratch->free_bytes ? normed : 0;
    scratch->free_bytes -= kept;
    rc = perta_cache_open(&g->cache, scratch, err);
    scratch->free_bytes += kept;
    return rc;
}

static void swap(struct perta_generation *g, struct perta_estimate_job *job)
{
    struct perta_samples samples = g->samples;
    struct perta_cut cut = g->cut;
    struct perta_head head = g->head;
    size_t *starts = g->starts;
    g->samples = job->samples;
    g->cut = job->cut;
    g->head = job->head;
    g->starts = job->starts;
    job->samples = samples;
    job->cut = cut;
    job->head = head;
    job->starts = starts;
}

void perta_generation_close(struct perta_generation *g, struct perta_estimate_job *job)
{
    struct perta_err ignored = {0};
    if (job->be) /* after an error, operations may still read what is freed below */
        perta_backend_wait(job->be, &ignored);
    perta_store_close(&g->x, &job->scratch);
    perta_cache_close(&g->cache, &job->scratch);
    perta_samples_release(&g->samples);
    perta_ends_release(&g->ends);
    free(g->starts);
    free(g->answer);
    free(g->answers);
    free(g->tokens);
    job->cache = NULL;
}

/* ---- a token of each answer ---- */

/* Add a token to an answer, or end it. */
static void take(struct perta_generation *g, uint64_t i, int32_t token)
{
    struct perta_answer *a = &g->answers[i];
    a->ended = perta_ends_has(&g->ends, token);
    if (!a->ended)
        g->tokens[i * g->most + a->n++] = token;
}

/* Set the samples of the next pass: the last token of each answer that goes on. */
static void gather(struct perta_generation *g, const struct perta_samples *data)
{
    struct perta_samples *s = &g->samples;
    s->n = 0;
    for (uint32_t i = 0; i < g->n; i++) {
        const struct perta_answer *a = &g->answers[i];
        if (a->ended || a->n == g->most)
            continue;
        g->answer[s->n] = i;
        s->ids[s->n] = g->tokens[i * g->most + a->n - 1];
        s->places[s->n] =
            (struct perta_place){.position = a->position + a->n - 1,
                                 .at = a->at + a->n - 1,
                                 .is_long = data->places[data->starts[a->sample]].is_long};
        s->lines[s->n] = data->lines[a->sample];
        s->n_labels[s->n] = 1; /* any target is a label, so that the head looks at the token */
        s->n++;
        s->starts[s->n] = g->starts[s->n] = s->n;
    }
    s->n_tokens = s->n;
    s->longest = 1;
    g->cache.continues = g->answer;
}

/* The most probable token after each token of the pass; the first of equal ones. */
static int take_best(struct perta_generation *g, const struct perta_estimate_job *job,
                     struct perta_err *err)
{
    double loss;
    int rc = 0;
    for (uint64_t i = 0; i < job->samples.n && !rc; i++) {
        rc = perta_estimate_loss(job, i, &loss, err);
        if (!rc)
            take(g, g->answer[i], job->head.best[i]);
    }
    return rc;
}

/* With the tokens that are added in place of the job's. A product's bits depend on its number of
 * rows, so groups are cut as the data alone say; and they must fit the job's batches. */
static int pass(struct perta_generation *g, struct perta_estimate_job *job, struct perta_err *err)
{
    size_t longest = g->cut.longest < PERTA_TILE_ROWS ? g->cut.longest : PERTA_TILE_ROWS;
    int rc = perta_cut_make(job->starts, job->samples.n, longest, &job->cut, err);
    if (!rc)
        rc = perta_estimate_open_head(job, NULL, err);
    if (!rc)
        rc = perta_estimate_forward_all(job, &g->x, err);
    if (!rc)
        rc = take_best(g, job, err);
    if (!rc)
        perta_cache_added(&g->cache, job->samples.n);
    perta_head_close(&job->head, &job->scratch);
    perta_cut_release(&job->cut);
    job->head = (struct perta_head){0};
    return rc;
}

int perta_generation_run(struct perta_generation *g, struct perta_estimate_job *job,
                         struct perta_err *err)
{
    struct perta_head_means means = job->means;
    bool measured = job->measured;
    int rc = 0;
    for (uint64_t i = 0; i < g->n; i++)
        take(g, i, job->head.best[job->head.starts[g->answers[i].sample]]);
    for (g->n_passes = 1; g->n_passes < g->most && !rc; g->n_passes++) {
        gather(g, &job->samples);
        if (!g->samples.n)
            break;
        swap(g, job);
        job->adds = true;
        job->measured = false;
        rc = pass(g, job, err);
        job->adds = false;
        job->measured = measured;
        swap(g, job);
    }
    job->means = means;
    return rc;
}

/* ---- the summary ---- */

static json_t *ids_of(const struct perta_generation *g, uint64_t i)
{
    json_t *ids = json_array();
    for (uint32_t k = 0; k < g->answers[i].n; k++)
        perta_json_append(&ids, json_integer(g->tokens[i * g->most + k]));
    return ids;
}

void perta_generation_report(const struct perta_generation *g, json_t **summary)
{
    const json_t *lines = json_object_get(*summary, "per_sample");
    json_t *list = json_array(), *ends = json_array();
    uint64_t n_tokens = 0;
    for (uint64_t i = 0; i < g->n; i++) {
        json_t *item = json_incref(json_array_get(lines, i));
        perta_json_set(&item, "generated_ids", ids_of(g, i));
        perta_json_set(&item, "generated_end", json_boolean(g->answers[i].ended));
        perta_json_append(&list, item);
        n_tokens += g->answers[i].n;
    }
    perta_json_set(summary, "per_sample", list);
    for (size_t i = 0; i < g->ends.n; i++)
        perta_json_append(&ends, json_integer(g->ends.ids[i]));
    perta_json_set(summary, "end_ids", ends);
    perta_json_set(summary, "generated_tokens", json_integer((json_int_t)n_tokens));
    perta_json_set(summary, "generating_passes", json_integer((json_int_t)g->n_passes));
}
