#include "estimators/passes/pick.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/kernels.h"
#include "io/text.h"

void perta_samples_shuffle(uint32_t *order, uint64_t n, uint64_t seed, uint64_t epoch)
{
    uint64_t state = perta_random_bits(seed, 1 + epoch);
    for (uint64_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    for (uint64_t i = n; i-- > 1;) {
        uint64_t k = perta_random_bits(state, n - 1 - i) % (i + 1);
        uint32_t one = order[i];
        order[i] = order[k];
        order[k] = one;
    }
}

void perta_samples_append(struct perta_samples *to, const struct perta_samples *from, uint64_t i)
{
    uint64_t first = from->starts[i], n = from->starts[i + 1] - first, at = to->n_tokens;
    memmove(to->ids + at, from->ids + first, n * sizeof *to->ids);
    memmove(to->targets + at, from->targets + first, n * sizeof *to->targets);
    memmove(to->places + at, from->places + first, n * sizeof *to->places);
    to->n_labels[to->n] = from->n_labels[i];
    to->lines[to->n] = from->lines[i];
    to->kinds[to->n] = from->kinds[i];
    to->n_tokens += n;
    to->longest = n > to->longest ? n : to->longest;
    to->starts[++to->n] = to->n_tokens;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Places first .. end of a shuffled epoch. */
struct span {
    uint64_t epoch, first, end;
};

static struct span span_of(const struct perta_pick *pick, uint64_t n)
{
    uint64_t batches = n / pick->size + (n % pick->size > 0), b = pick->turn % batches;
    if (pick->what == PERTA_PICK_BATCH)
        return (struct span){pick->turn / batches, b * n / batches, (b + 1) * n / batches};
    return pick->what == PERTA_PICK_SOME ? (struct span){pick->turn, 0, pick->size}
                                         : (struct span){pick->turn, pick->size, n};
}

int perta_samples_pick(struct perta_samples *s, const struct perta_pick *pick, const char *path,
                       struct perta_err *err)
{
    uint64_t n = s->n;
    if (pick->what == PERTA_PICK_ALL)
        return 0;
    if (pick->what != PERTA_PICK_BATCH && pick->size >= n)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: %llu of its samples are to be taken and the others left, but it has "
                          "%llu",
                          path, (unsigned long long)pick->size, (unsigned long long)n);
    const struct span span = span_of(pick, n);
    uint32_t *order = calloc(n, sizeof *order);
    if (!order)
        return perta_fail_sys(err, ENOMEM, "samples");
    perta_samples_shuffle(order, n, pick->seed, span.epoch);
    qsort(order + span.first, span.end - span.first, sizeof *order, compare);
    s->n = s->n_tokens = s->longest = 0;
    /* starts[i + 1] of a sample that follows is still the file's: appending writes no further */
    for (uint64_t i = span.first; i < span.end; i++)
        perta_samples_append(s, s, order[i]);
    free(order);
    return 0;
}

void perta_pick_identity(const struct perta_pick *pick, json_t **identity)
{
    static const char *const names[] = {NULL, "batch", "some", "rest"};
    if (pick->what == PERTA_PICK_BATCH)
        perta_json_set(identity, names[pick->what],
                       json_pack("[I, I]", (json_int_t)pick->size, (json_int_t)pick->turn));
    else if (pick->what != PERTA_PICK_ALL)
        perta_json_set(identity, names[pick->what],
                       json_pack("[I, I, I]", (json_int_t)pick->size, (json_int_t)pick->seed,
                                 (json_int_t)pick->turn));
}
