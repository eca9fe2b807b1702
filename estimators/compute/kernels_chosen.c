#include "estimators/compute/kernels.h"

#include "io/isa.h"

const struct perta_row_kernels *perta_row_kernels(void)
{
    static const struct perta_row_kernels *const all[PERTA_N_ISAS] = {
        &perta_row_kernels_v2, &perta_row_kernels_v3, &perta_row_kernels_v4};
    return all[perta_isa_chosen()];
}

const struct perta_activation_kernels *perta_activation_kernels(enum perta_activation_kind kind)
{
    static const struct perta_activation_kernels *const all[PERTA_N_ISAS] = {
        perta_activation_kernels_v2, perta_activation_kernels_v3, perta_activation_kernels_v4};
    return &all[perta_isa_chosen()][kind];
}
