#include "estimators/passes/norms.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A layer's; the embedding, learned positions, the head, the norms outside the layers, biases. */
#define MOST_TENSORS (PERTA_N_PARAMS + 8)

uint64_t perta_norms_bytes(uint64_t n_samples)
{
    return n_samples * (MOST_TENSORS + 2) * sizeof(double) + MOST_TENSORS * PERTA_NAME_BYTES;
}

int perta_norms_open(struct perta_norms *norms, uint64_t n_samples, struct perta_err *err)
{
    *norms = (struct perta_norms){.n_samples = n_samples};
    norms->means = calloc(n_samples, sizeof *norms->means);
    norms->names = calloc(MOST_TENSORS, sizeof *norms->names);
    norms->squares = calloc(MOST_TENSORS * n_samples, sizeof *norms->squares);
    norms->some = calloc(n_samples, sizeof *norms->some);
    return norms->means && norms->names && norms->squares && norms->some
               ? 0
               : perta_fail_sys(err, ENOMEM, "gradient norms");
}

void perta_norms_release(struct perta_norms *norms)
{
    free(norms->means);
    free(norms->names);
    free(norms->squares);
    free(norms->some);
    *norms = (struct perta_norms){0};
}

double *perta_norms_of(struct perta_norms *norms, const char *name)
{
    size_t i = 0;
    while (i < norms->n && strcmp(norms->names[i], name))
        i++;
    double *squares = norms->squares + i * norms->n_samples;
    if (i < norms->n)
        return squares;
    assert(norms->n < MOST_TENSORS && strlen(name) < PERTA_NAME_BYTES);
    strcpy(norms->names[norms->n++], name);
    memset(squares, 0, norms->n_samples * sizeof *squares);
    return squares;
}

/* The tensor whose name comes first after that of tensor i; i = norms->n: the first of all. */
static size_t after(const struct perta_norms *norms, size_t i)
{
    size_t next = norms->n;
    for (size_t k = 0; k < norms->n; k++)
        if ((i == norms->n || strcmp(norms->names[k], norms->names[i]) > 0) &&
            (next == norms->n || strcmp(norms->names[k], norms->names[next]) < 0))
            next = k;
    return next;
}

void perta_norms_complete(struct perta_norms *norms)
{
    /* In the order of names: that in which they were opened depends on batches. */
    for (size_t k = 0, i = norms->n; k < norms->n; k++) {
        i = after(norms, i);
        for (uint64_t s = 0; s < norms->n_samples; s++)
            norms->means[s] += sqrt(norms->squares[i * norms->n_samples + s]);
    }
    norms->n_tensors += norms->n;
    norms->n = 0;
}

void perta_norms_end(struct perta_norms *norms)
{
    perta_norms_complete(norms);
    for (uint64_t s = 0; s < norms->n_samples; s++)
        norms->means[s] /= (double)norms->n_tensors;
}
