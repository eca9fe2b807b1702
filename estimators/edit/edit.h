/* edit.h - the numbers of PerTA (arXiv 2601.22030): a weight for each parameter, and the edit.
 * Spec: docs/method.md. Every function here works on one run of elements of all inputs at once.
 *
 *   tau = tuned - base, or scaling * (B A)      task vector; the second form is a LoRA's
 *   r   = |g_r| / |g_f|, w = 1 / (1 + r^p)      weight in [0, 1]; g_f = 0 gives w = 0
 *   out = round(model - (alpha * w) * tau)      one rounding to the model's dtype
 *
 * Arithmetic is float32 in exactly that order (float64 where the model is F64). Where the step
 * (alpha * w) * tau is zero, the model's bits are copied unchanged, -0 included.
 * The result has the same bits on every instruction set. Threads: reentrant. */
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
    PERTA_POWER,    /* p is rule.power */
    PERTA_TV,       /* w = 1: plain task arithmetic */
    PERTA_CONSTANT, /* w = rule.weight */
    PERTA_RANDOM,   /* w uniform in [0, 1), from seed, tensor name and element */
    PERTA_SCALE,    /* w is read from a tensor of scales (docs/steps.md) */
};

/* What an importance folder holds. */
enum perta_stat {
    PERTA_STAT_MEAN,   /* mean gradient, signed */
    PERTA_STAT_MEANSQ, /* mean squared gradient s; for q = s_r / s_f, r^p = sqrt(q), q, q^(P/2) */
};

struct perta_rule {
    enum perta_method method;
    enum perta_stat stat; /* what both importances hold */
    double power;         /* P for PERTA_POWER, > 0 */
    double weight;        /* for PERTA_CONSTANT */
    uint64_t seed;        /* for PERTA_RANDOM */
    bool keep_nonfinite; /* keep parameters with a NaN or Inf unchanged; if false they are errors */
};

/* True if the method reads importances. */
PERTA_API bool perta_rule_needs_importance(const struct perta_rule *rule);

/* A run of elements of one dtype. */
struct perta_view {
    enum perta_dtype dtype; /* F16, BF16, F32 or F64 */
    const void *data;       /* NULL where the method does not need it; any alignment */
};

struct perta_edit_in {
    struct perta_view model, tuned, base, forget, retain; /* no base.data: tuned is tau */
    uint64_t n;                                           /* elements in each view */
    uint64_t first_elem;     /* index of the first element in its tensor; used by PERTA_RANDOM */
    uint64_t name_hash;      /* XXH3-64 of the tensor's name, seed 0; used by PERTA_RANDOM */
    struct perta_view scale; /* read by PERTA_SCALE: the weights, each at least 0 */
};

enum perta_operand { /* which operand held a bad number */
                     PERTA_IN_MODEL,
                     PERTA_IN_TUNED,
                     PERTA_IN_BASE,
                     PERTA_IN_FORGET,
                     PERTA_IN_RETAIN,
                     PERTA_IN_SCALE,
                     PERTA_IN_RESULT, /* every input is finite, the rounded result is not */
                     PERTA_N_OPERANDS,
};

/* The histogram of weights divides [0, 1] into this many equal bins. A bin does not contain its
 * upper end, except the last. */
#define PERTA_WEIGHT_BINS 10

struct perta_edit_counts {
    uint64_t n_changed;      /* elements whose bits differ from the model's */
    uint64_t n_rounded_away; /* the step is not zero, but rounding gave back the model's value */
    uint64_t n_nonfinite;    /* parameters with a NaN, an Inf or a negative mean square */
    uint64_t n_zero_forget;  /* importances equal to 0, for methods that read them */
    uint64_t n_zero_retain;
    double sum_weight;                   /* sum of w over the finite elements, in a fixed order */
    uint64_t weights[PERTA_WEIGHT_BINS]; /* histogram of the same weights */
    uint64_t bad_elem; /* if n_nonfinite > 0: index of the first such element in the run */
    enum perta_operand bad_operand;
};

/* Edit n elements once for each of the n_alphas alphas. outs[i] receives n elements of the model's
 * dtype; it may have any alignment and must not overlap an input. counts (n_alphas) is overwritten,
 * not added to. sum_weight is summed in blocks of 1024 elements from the start of the run. Without
 * keep_nonfinite, a bad element leaves outs unspecified: check n_nonfinite. */
PERTA_API void perta_edit(const struct perta_rule *rule, const struct perta_edit_in *in,
                          const float *alphas, uint32_t n_alphas, void *const *outs,
                          struct perta_edit_counts *counts);

/* The same on an instruction set that the caller chooses (not above perta_isa_best()). */
PERTA_API void perta_edit_isa(enum perta_isa isa, const struct perta_rule *rule,
                              const struct perta_edit_in *in, const float *alphas,
                              uint32_t n_alphas, void *const *outs,
                              struct perta_edit_counts *counts);

/* The scalar reference: one element at a time, written directly from the formula. */
PERTA_API void perta_edit_reference(const struct perta_rule *rule, const struct perta_edit_in *in,
                                    const float *alphas, uint32_t n_alphas, void *const *outs,
                                    struct perta_edit_counts *counts);

/* Consecutive rows of a LoRA's task vector. An element is scaling * sum over k of
 * rows[k] * columns[k]. The sum starts at 0 and runs from k = 0 upwards, in float32, with every
 * operation rounded. */
struct perta_lora {
    const float *rows;    /* (n_rows, r): rows of B, from first_row of the tensor on */
    const float *columns; /* (r, width): A */
    uint64_t r, width, first_row;
    float scaling;
};

/* tau (n) = elements first_elem.. of the task vector of a tensor (.., width). lora->rows must cover
 * all rows that these elements lie in. */
PERTA_API void perta_lora_tau(const struct perta_lora *lora, uint64_t first_elem, uint64_t n,
                              float *tau);
PERTA_API void perta_lora_tau_isa(enum perta_isa isa, const struct perta_lora *lora,
                                  uint64_t first_elem, uint64_t n, float *tau);
PERTA_API void perta_lora_tau_reference(const struct perta_lora *lora, uint64_t first_elem,
                                        uint64_t n, float *tau);

#endif
