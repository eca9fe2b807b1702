/* head_own.h - what the files of head.h share: head.c (memory, embedding, the way forward) and
 * head_backward.c. */
#ifndef PERTA_ESTIMATORS_PASSES_HEAD_OWN_H
#define PERTA_ESTIMATORS_PASSES_HEAD_OWN_H

#include "estimators/passes/head.h"

/* Working arrays of a batch, in head->work. */
struct perta_head_arrays {
    struct perta_array c;       /* (batch rows, H) of float64 */
    struct perta_array a, b, d; /* (batch rows, H) */
    struct perta_array logits;  /* (batch rows, PERTA_VOCABULARY_ROWS) */
    struct perta_array rstd;    /* (batch rows, stats of the norm) */
    struct perta_array capped;  /* (batch rows, PERTA_VOCABULARY_ROWS), if logits have a soft cap */
};

/* A table of which each token takes a row: the embedding, or learned positions. */
struct perta_head_table {
    const char *name;
    size_t n_rows;
    bool positions;
};

/* The tables that the model has: 1 or 2. */
size_t perta_head_tables(const struct perta_head *h, struct perta_head_table tables[2]);
/* The row of a table that a token takes. */
size_t perta_head_row_of(const struct perta_head *h, const struct perta_head_table *table,
                         uint64_t token);
/* x (tokens, H) = the sum of all tokens' rows of the tables. */
int perta_head_look_up(struct perta_head *h, struct perta_store *x, struct perta_err *err);
/* Where they are. */
struct perta_head_arrays perta_head_work_of(const struct perta_head *h);
/* Vector i: weight and bias of the final norm, gradients of a norm's weight and bias, weight and bias
 * of the norm after the embedding. */
struct perta_array perta_head_norm_vector(const struct perta_head *h, int i);
/* The gradient of the head's bias, for a block of rows of the head. */
struct perta_head_bias_gradient {
    struct perta_array sums, squares; /* (PERTA_VOCABULARY_ROWS) of float64 */
    struct perta_array of_sample;     /* (PERTA_VOCABULARY_ROWS) */
};
struct perta_head_bias_gradient perta_head_bias_gradient_of(const struct perta_head *h);
/* Gather the rows of x that predict labels first .. first + n in to. */
int perta_head_gather(const struct perta_head *h, const struct perta_store *x, size_t first,
                      size_t n, struct perta_array to, struct perta_err *err);
/* The final norm of w->a (n, H), to w->b and w->rstd. */
void perta_head_norm_forward(const struct perta_head *h, const struct perta_head_arrays *w,
                             size_t n);
/* The span of a block of the vocabulary, from row on. */
struct perta_span perta_head_span(const struct perta_head *h, size_t row);
/* Load a block of the head's weight, from row on, and read ahead the next block, or next after the
 * last one. */
int perta_head_load(struct perta_head *h, size_t row, const struct perta_span *next,
                    struct perta_linear *block, struct perta_err *err);
/* Compute w->logits (n, rows of block) of a batch's labels, as the loss sees them; *x is their rows
 * of normed. */
int perta_head_logits(struct perta_head *h, const struct perta_linear *block,
                      const struct perta_cut_batch *batch, const struct perta_head_arrays *w,
                      struct perta_array *x, struct perta_err *err);

#endif
