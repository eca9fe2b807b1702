/* edit.h - the numbers of PerTA (arXiv 2601.22030): per-parameter weights and the edit.
 * Spec: docs/method.md. Everything here works on one run of elements, side by side.
 *
 *   tau = tuned - base, or scaling * (B A)      task vector; the latter is a LoRA's
 *   r   = |g_r| / |g_f|, w = 1 / (1 + r^p)      weight in [0, 1]; g_f = 0 gives w = 0
 *   out = round(model - (alpha * w) * tau)      one rounding to the model's dtype
 *
 * Arithmetic is float32 in exactly that order (float64 where the model is F64); where the step
 * (alpha * w) * tau is zero the model's bits stay as they are, -0 included.
 * Same bits for every instruction set. Threads: reentrant. */
#ifndef PERTA_ESTIMATORS_EDIT_EDIT_H
#define PERTA_ESTIMATORS_EDIT_EDIT_H

#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"
#include "io/format/dtype.h"
#include "io/isa.h"

enum perta_method {
    PERTA_GRAD,     /* p = 1 */
    PERTA_FISHER,   /* p = 2 */
    PERTA_POWER,    /* p given */
    PERTA_TV,       /* w = 1: plain task arithmetic */
    PERTA_CONSTANT, /* w given */
    PERTA_RANDOM,   /* w uniform in [0, 1), from seed, tensor name and element */
    PERTA_SCALE,    /* w given for each parameter: the s of stepwise unlearning */
};

/* What an importance folder holds. */
enum perta_stat {
    PERTA_STAT_MEAN,   /* mean gradient, signed */
    PERTA_STAT_MEANSQ, /* mean squared gradient s; r^p is then q, sqrt(q), q^(P/2), q = s_r/s_f */
};

struct perta_rule {
    enum perta_method method;
    enum perta_stat stat; /* of both importances */
    double power;         /* P of PERTA_POWER, > 0 */
    double weight;        /* of PERTA_CONSTANT */
    uint64_t seed;        /* of PERTA_RANDOM */
    bool keep_nonfinite;  /* leave such parameters as they are; else they are errors */
};

/* Does the method read importances? */
PERTA_API bool perta_rule_needs_importance(const struct perta_rule *rule);

/* A typed run of elements. */
struct perta_view {
    enum perta_dtype dtype; /* F16, BF16, F32 or F64 */
    const void *data;       /* NULL where the method does not need it; any alignment */
};

struct perta_edit_in {
    struct perta_view model, tuned, base, forget, retain; /* no base: tuned is tau itself */
    uint64_t n;                                           /* elements, the same in all */
    uint64_t first_elem;     /* position of the first in its tensor, for PERTA_RANDOM */
    uint64_t name_hash;      /* XXH3-64 of the tensor's name, seed 0, for PERTA_RANDOM */
    struct perta_view scale; /* of PERTA_SCALE: w, at least 0 */
};

enum perta_operand { /* where a bad number stood */
                     PERTA_IN_MODEL,
                     PERTA_IN_TUNED,
                     PERTA_IN_BASE,
                     PERTA_IN_FORGET,
                     PERTA_IN_RETAIN,
                     PERTA_IN_SCALE,
                     PERTA_IN_RESULT, /* all inputs finite, the result not, after rounding */
                     PERTA_N_OPERANDS,
};

/* Weights are counted in so many equal parts of [0, 1], each without its upper end but the last. */
#define PERTA_WEIGHT_BINS 10

struct perta_edit_counts {
    uint64_t n_changed;      /* bits of the result differ from the model's */
    uint64_t n_rounded_away; /* step not zero, but rounding gave the model's value back */
    uint64_t n_nonfinite;    /* parameters with a NaN or Inf (or a negative mean square) */
    uint64_t n_zero_forget;  /* importances that are 0, of methods that read them */
    uint64_t n_zero_retain;
    double sum_weight; /* of w over the elements that are finite; deterministic order */
    uint64_t weights[PERTA_WEIGHT_BINS]; /* how many of these lie in each part */
    uint64_t bad_elem; /* with n_nonfinite > 0: first such element, from the run's start */
    enum perta_operand bad_operand;
};

/* Edit n elements with each of alphas (n_alphas): outs[i], of the model's dtype, n elements, any
 * alignment, may not overlap an input. counts (n_alphas) is set, not added to. sum_weight is
 * summed in blocks of 1024 elements from the run's start. Without keep_nonfinite a bad element
 * leaves outs unspecified: look at n_nonfinite. */
PERTA_API void perta_edit(const struct perta_rule *rule, const struct perta_edit_in *in,
                          const float *alphas, uint32_t n_alphas, void *const *outs,
                          struct perta_edit_counts *counts);

/* The same with an instruction set chosen by the caller (must not exceed perta_isa_best()). */
PERTA_API void perta_edit_isa(enum perta_isa isa, const struct perta_rule *rule,
                              const struct perta_edit_in *in, const float *alphas,
                              uint32_t n_alphas, void *const *outs,
                              struct perta_edit_counts *counts);

/* The scalar reference: one element at a time, written straight from the formula. */
PERTA_API void perta_edit_reference(const struct perta_rule *rule, const struct perta_edit_in *in,
                                    const float *alphas, uint32_t n_alphas, void *const *outs,
                                    struct perta_edit_counts *counts);

/* Consecutive rows of a LoRA's task vector. Each element is scaling * sum over k of
 * rows[k] * columns[k], from k = 0 up, starting at 0: float32, every operation rounded. */
struct perta_lora {
    const float *rows;    /* (n_rows, r): of B; a row for each row of the tensor, from first_row */
    const float *columns; /* (r, width): A */
    uint64_t r, width, first_row;
    float scaling;
};

/* tau (n) = elements first_elem.. of a tensor (.., width), whose rows must all be there. */
PERTA_API void perta_lora_tau(const struct perta_lora *lora, uint64_t first_elem, uint64_t n,
                              float *tau);
PERTA_API void perta_lora_tau_isa(enum perta_isa isa, const struct perta_lora *lora,
                                  uint64_t first_elem, uint64_t n, float *tau);
PERTA_API void perta_lora_tau_reference(const struct perta_lora *lora, uint64_t first_elem,
                                        uint64_t n, float *tau);

#endif
