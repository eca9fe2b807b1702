#include "estimators/model/factors.h"

#include <errno.h>
#include <stdlib.h>

#define EXPERT_PARAMS (PERTA_EXPERT_DOWN_BIAS - PERTA_EXPERT_GATE + 1)

/* The place of a weight in numbers. */
static size_t place_of(const struct perta_llm *llm, struct perta_site site, enum perta_param param)
{
    size_t of_layers = (size_t)llm->n_layers * PERTA_N_PARAMS;
    size_t expert = (size_t)site.layer * llm->n_experts + site.expert - 1;
    return perta_is_of_expert(param)
               ? of_layers + expert * EXPERT_PARAMS + (size_t)(param - PERTA_EXPERT_GATE)
               : (size_t)site.layer * PERTA_N_PARAMS + param;
}

int perta_factors_open(struct perta_factors *f, const struct perta_llm *llm, struct perta_err *err)
{
    size_t most = (size_t)llm->n_layers * (PERTA_N_PARAMS + (size_t)llm->n_experts * EXPERT_PARAMS);
    *f = (struct perta_factors){
        .llm = llm, .of = calloc(most, sizeof *f->of), .numbers = calloc(most, sizeof *f->numbers)};
    return f->of && f->numbers ? 0 : perta_fail_sys(err, ENOMEM, "adapter");
}

void perta_factors_add(struct perta_factors *f, struct perta_site site,
                       const struct perta_param_row *row, uint64_t r, float scaling)
{
    const struct perta_array none = {0};
    struct perta_factor *factor = &f->of[f->n++];
    size_t at = f->n_floats;
    *factor = (struct perta_factor){.site = site, .param = row->param, .r = r, .scaling = scaling};
    perta_llm_shape(f->llm, row, &factor->out, &factor->in);
    factor->at = at;
    perta_array_take(none, &at, factor->r * factor->in);
    factor->at_b = at;
    perta_array_take(none, &at, factor->out * factor->r);
    f->n_floats = at;
    f->r_max = factor->r > f->r_max ? factor->r : f->r_max;
    f->numbers[place_of(f->llm, site, row->param)] = (uint32_t)f->n;
}

void perta_factors_release(struct perta_factors *f)
{
    free(f->of);
    free(f->numbers);
    *f = (struct perta_factors){0};
}

const struct perta_factor *perta_factors_find(const struct perta_factors *f, struct perta_site site,
                                              enum perta_param param)
{
    uint32_t number = f && f->numbers ? f->numbers[place_of(f->llm, site, param)] : 0;
    return number ? &f->of[number - 1] : NULL;
}

struct perta_low_rank perta_factor_in(const struct perta_factor *f, struct perta_array array)
{
    return (struct perta_low_rank){perta_array_at(array, f->at),
                                   perta_array_at(array, f->at_b),
                                   f->out,
                                   f->in,
                                   f->r,
                                   f->scaling};
}
