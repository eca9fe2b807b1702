#include "estimators/edit/running.h"

#include <math.h>
#include <string.h>

#include "estimators/edit/kernels.h"
#include "io/fpenv.h"

void perta_running_zero(struct perta_running *running)
{
    float *const arrays[] = {running->sum, running->carry, running->sq_sum, running->sq_carry};
    for (int i = 0; i < 4; i++)
        if (arrays[i])
            memset(arrays[i], 0, running->n * sizeof(float));
}

uint64_t perta_running_add_isa(enum perta_isa isa, struct perta_running *running,
                               const struct perta_view *gradient)
{
    PERTA_FP_SCOPE;
    return perta_kernels_of(isa)->running_add(running, gradient);
}

uint64_t perta_running_add(struct perta_running *running, const struct perta_view *gradient)
{
    return perta_running_add_isa(perta_isa_chosen(), running, gradient);
}

static uint64_t finish(const float *sum, const float *carry, uint64_t n, uint64_t n_samples,
                       char *out)
{
    uint64_t bad = UINT64_MAX;
    for (uint64_t i = n; i-- > 0;) {
        float mean = (float)(((double)sum[i] + (double)carry[i]) / (double)n_samples);
        memcpy(out + i * sizeof mean, &mean, sizeof mean);
        bad = isfinite(mean) ? bad : i;
    }
    return bad;
}

uint64_t perta_running_finish(const struct perta_running *running, uint64_t n_samples, void *mean,
                              void *meansq)
{
    PERTA_FP_SCOPE;
    uint64_t bad = UINT64_MAX, bad_sq = UINT64_MAX;
    if (mean)
        bad = finish(running->sum, running->carry, running->n, n_samples, mean);
    if (meansq)
        bad_sq = finish(running->sq_sum, running->sq_carry, running->n, n_samples, meansq);
    return bad < bad_sq ? bad : bad_sq;
}
