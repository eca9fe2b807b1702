/* measures.h - how well a model remembers an answer, by the measures of open-unlearning (Dorna et
 * al. 2025, github.com/locuslab/open-unlearning, src/evals/metrics). They are made from the
 * logarithms of the labels' probabilities, lp, and leave out an answer's last label, which is the
 * end of text: n labels are left. Formulas: docs/eval.md */
#ifndef PERTA_ESTIMATORS_PASSES_MEASURES_H
#define PERTA_ESTIMATORS_PASSES_MEASURES_H

#include "estimators/passes/head.h"

#define PERTA_MIN_K 0.4 /* the share of labels that min_k and min_k_plus_plus look at */

/* Of an answer with a single label, which leaves none: exact_memorization is NaN, the others are 0,
 * as theirs are. */
struct perta_measures {
    double exact_memorization;  /* the share of labels that are the most probable token */
    double extraction_strength; /* 1 - k / n: after k labels all are; at least 1 / n */
    double min_k;               /* minus the mean of the lowest lp (Shi et al. 2023) */
    double min_k_plus_plus;     /* the same of (lp - mean) / deviation over the vocabulary (Zhang et
                                   al. 2024) */
};

/* After perta_head_forward of a head that is measured. */
int perta_measures_of(const struct perta_head *head, uint64_t sample, struct perta_measures *m,
                      struct perta_err *err);

#endif
