#include "estimators/edit/edit.h"

#include "estimators/edit/kernels.h"
#include "io/fpenv.h"

bool perta_rule_needs_importance(const struct perta_rule *rule)
{
    return rule->method == PERTA_GRAD || rule->method == PERTA_FISHER ||
           rule->method == PERTA_POWER;
}

const struct perta_kernels *perta_kernels_of(enum perta_isa isa)
{
    static const struct perta_kernels *const all[PERTA_N_ISAS] = {
        &perta_kernels_v2, &perta_kernels_v3, &perta_kernels_v4};
    return all[isa];
}

void perta_edit_isa(enum perta_isa isa, const struct perta_rule *rule,
                    const struct perta_edit_in *in, const float *alphas, uint32_t n_alphas,
                    void *const *outs, struct perta_edit_counts *counts)
{
    PERTA_FP_SCOPE;
    const struct perta_kernels *kernels = perta_kernels_of(isa);
    bool wide = in->model.dtype == PERTA_F64;
    (wide ? kernels->edit_f64 : kernels->edit_f32)(rule, in, alphas, n_alphas, outs, counts);
}

void perta_edit(const struct perta_rule *rule, const struct perta_edit_in *in, const float *alphas,
                uint32_t n_alphas, void *const *outs, struct perta_edit_counts *counts)
{
    perta_edit_isa(perta_isa_chosen(), rule, in, alphas, n_alphas, outs, counts);
}

void perta_lora_tau_isa(enum perta_isa isa, const struct perta_lora *lora, uint64_t first_elem,
                        uint64_t n, float *tau)
{
    PERTA_FP_SCOPE;
    perta_kernels_of(isa)->lora_tau(lora, first_elem, n, tau);
}

void perta_lora_tau(const struct perta_lora *lora, uint64_t first_elem, uint64_t n, float *tau)
{
    perta_lora_tau_isa(perta_isa_chosen(), lora, first_elem, n, tau);
}
