/* kernels.h - loops over a row of floats, compiled once for each instruction set (io/isa.h); all
 * give the same bits. */
#ifndef PERTA_ESTIMATORS_COMPUTE_KERNELS_H
#define PERTA_ESTIMATORS_COMPUTE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/activation.h"
#include "io/format/dtype.h"

struct perta_row_kernels {
    /* Convert from (n; BF16, F16 or F32; any alignment) to to (n). to_bf16 rounds to nearest. */
    void (*to_f32)(float *to, const void *from, enum perta_dtype dtype, size_t n);
    void (*to_bf16)(uint16_t *to, const void *from, enum perta_dtype dtype, size_t n);
    /* Sum of a * b, in float64. */
    double (*dot)(const float *a, const float *b, size_t n);
    /* Sum of (a * b) * c, in float64; a * b in float32. */
    double (*dot_of_product)(const float *a, const float *b, const float *c, size_t n);
    /* Sum of x, and of (x - mean)^2, in float64. */
    double (*sum)(const float *x, size_t n);
    double (*sum_deviations)(const float *x, double mean, size_t n);
    /* sums (2) = the sums of w * dy and of (w * dy) * (x - mean), in float64; w * dy and x - mean in
     * float32. */
    void (*layernorm_sums)(double sums[2], const float *w, const float *dy, const float *x,
                           float mean, size_t n);
    /* sums (n) += dy * ((x - mean) * rstd), in float64. */
    void (*add_products)(double *sums, const float *dy, const float *x, float mean, float rstd,
                         size_t n);
    /* sums (n) += x, sums (n) += x^2, in float64. */
    void (*add)(double *sums, const float *x, size_t n);
    void (*add_squares)(double *sums, const float *x, size_t n);
    /* means (n) = sums / of, rounded to float32. Not 0 if one of them is not finite. */
    unsigned (*divide)(float *means, const double *sums, double of, size_t n);
    /* The maximum of x (n) and least. */
    float (*largest)(const float *x, size_t n, float least);
    /* y = exp(x - most); y may be x. Returns their sum, in float64. */
    double (*exponentials)(float *y, const float *x, float most, size_t n);
    /* The same sum; the exponentials are not stored. */
    double (*sum_exponentials)(const float *x, float most, size_t n);
    /* moments (2) += the sums of exp(d) d and exp(d) d^2, in float64; d = x - most. */
    void (*add_moments)(double moments[2], const float *x, float most, size_t n);
    /* dp = p * (dp - mean). */
    void (*softmax_backward)(float *dp, const float *p, float mean, size_t n);
    /* x = cap * tanh(x / cap). */
    void (*softcap)(float *x, float cap, size_t n);
    /* d *= 1 - (y / cap)^2; y: what softcap gave. */
    void (*softcap_backward)(float *d, const float *y, float cap, size_t n);
    /* x = scale * exp(x - most). */
    void (*scaled_exponentials)(float *x, float most, float scale, size_t n);
};

extern const struct perta_row_kernels perta_row_kernels_v2, perta_row_kernels_v3,
    perta_row_kernels_v4;

/* Those of the instruction set in use. */
const struct perta_row_kernels *perta_row_kernels(void);

/* Those of an activation, for n elements. dgate and dx may be dh; other arrays do not overlap. act
 * has the numbers of PERTA_CLAMPED_SWIGLU, which has no each. */
struct perta_activation_kernels {
    void (*glu)(const struct perta_activation *act, float *h, const float *gate, const float *up,
                size_t n);
    void (*glu_backward)(const struct perta_activation *act, float *dgate, float *dup,
                         const float *dh, const float *gate, const float *up, size_t n);
    void (*each)(float *h, const float *x, size_t n);
    void (*each_backward)(float *dx, const float *dh, const float *x, size_t n);
};

/* By kind. */
extern const struct perta_activation_kernels perta_activation_kernels_v2[],
    perta_activation_kernels_v3[], perta_activation_kernels_v4[];

/* Those of the instruction set in use. */
const struct perta_activation_kernels *perta_activation_kernels(enum perta_activation_kind kind);

#endif
