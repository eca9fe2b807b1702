#include "estimators/passes/pick.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/kernels.h"

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

int perta_samples_keep_batch(struct perta_samples *s, uint64_t size, uint64_t seed, uint64_t batch,
                             struct perta_err *err)
{
    uint64_t n = s->n, batches = n / size + (n % size > 0);
    uint64_t first = batch % batches * n / batches, end = (batch % batches + 1) * n / batches;
    uint32_t *order = calloc(n, sizeof *order);
    if (!order)
        return perta_fail_sys(err, ENOMEM, "samples");
    perta_samples_shuffle(order, n, seed, batch / batches);
    qsort(order + first, end - first, sizeof *order, compare);
    s->n = s->n_tokens = s->longest = 0;
    /* starts[i + 1] of a sample that follows is still the file's: appending writes no further */
    for (uint64_t i = first; i < end; i++)
        perta_samples_append(s, s, order[i]);
    free(order);
    return 0;
}
