/* head.h - the two ends of the model: the embedding; and the final norm, the head and the loss. The
 * vocabulary is processed in blocks of rows, so logits are never stored whole.
 *
 * The loss of a sample is, as in transformers, the mean over its labels of
 * log(sum over v of exp(logit_v)) - logit_label, with the logits
 *
 *   cap(logit_multiplier * (norm(x) head^T + bias)),   cap(z) = logit_softcap * tanh(z / logit_softcap)
 *
 * of what perta_llm has of these. Embeddings are multiplied by embedding_multiplier. */
#ifndef PERTA_ESTIMATORS_PASSES_HEAD_H
#define PERTA_ESTIMATORS_PASSES_HEAD_H

#include "estimators/model/samples.h"
#include "estimators/model/store.h"
#include "estimators/model/weights.h"
#include "estimators/passes/statistic.h"

#define PERTA_VOCABULARY_ROWS 1024 /* rows of the head at a time */

struct perta_head {
    struct perta_weights *weights;
    struct perta_backend *be;
    const struct perta_samples *samples;
    struct perta_statistic *statistic; /* NULL: no gradients of the model's parameters */
    bool backward;                     /* without a statistic: the backward pass follows, too */
    bool measured;                     /* compute best and moments, for measures.h */
    bool without_last; /* the last label of each sample counts only in its loss, not in gradients */
    bool pooled;       /* every label weighs the same, whatever its sample; not by_probability */
    int (*advance)(
        void *ctx,
        struct perta_err *err); /* called after each block of rows; stops if it does not return 0 */
    void *ctx;
    /* weight each sample's gradient by its probability, exp(-loss), relative to the largest: up to
     * a factor, the gradient of -probability */
    bool by_probability;
    size_t batch_rows;       /* labels at a time; more if a group (cut) has more */
    uint8_t *room;           /* for reading single tensors; borrowed */
    struct perta_array work; /* perta_head_work floats of the backend's; borrowed */

    size_t n_labels;
    uint32_t *token; /* (n_labels): the token that predicts it */
    int32_t *target; /* (n_labels) */
    float *share;    /* (n_labels): 1 / labels of its sample (pooled: 1 / n_labels), times the
                        sample's weight */
    float *most;     /* (n_labels): the largest logit */
    double *sums;    /* (n_labels): sum of exp(logit - most) */
    float *logit;    /* (n_labels): logit of the target; the loss is most - logit + log(sum) */
    int32_t *best;   /* (n_labels): token of the largest logit; NULL if a backward pass follows and
                        it is not measured */
    double *moments; /* (n_labels, 2): backend.h; NULL: not measured */
    struct perta_label_arrays {
        struct perta_array share, most, logit, sums, best, best_logit, moments;
    } on_device;          /* the same in the backend's memory */
    uint32_t memory;      /* buffer of these, of the final norm and of the head's bias */
    size_t *starts;       /* (samples->n + 1): labels of each sample */
    struct perta_cut cut; /* labels */
    struct perta_chunks chunks;
    struct perta_norm norm;         /* the final one */
    struct perta_norm embedding;    /* that after the embedding, if there is one */
    struct perta_scratch *scratch;  /* borrowed */
    struct perta_array bias;        /* (vocab): the head's; no array: none */
    struct perta_token_row *tokens; /* (max_tokens): tokens whose dx are loaded */
    size_t max_tokens;
    struct perta_store normed;  /* (n_labels, H): input of the head */
    struct perta_store dnormed; /* (n_labels, H) of float64: its gradient */
};

/* batch_rows for batches of this many tokens. */
size_t perta_head_rows(const struct perta_samples *samples, size_t tokens);
/* Floats of working memory for batches of batch_rows labels. */
size_t perta_head_work(const struct perta_llm *llm, size_t batch_rows);
/* Bytes that labels take besides the stores: on the host, and in the backend's memory (one
 * buffer). */
uint64_t perta_head_bytes(const struct perta_samples *samples, bool measured);
uint64_t perta_head_device_bytes(const struct perta_samples *samples, const struct perta_llm *llm,
                                 bool measured);

/* The members above the first blank line must be set. */
int perta_head_open(struct perta_head *head, struct perta_scratch *scratch, struct perta_err *err);
void perta_head_close(struct perta_head *head, struct perta_scratch *scratch);

/* x (tokens, H) = the embeddings of all tokens: their rows of the embedding, plus those of learned
 * positions, normalised, if the model has these. */
int perta_embed(struct perta_head *head, struct perta_store *x, struct perta_err *err);
/* Means over samples. */
struct perta_head_means {
    double loss, probability;
    /* of p (1 - p), relative to the largest p as the weights of by_probability are: a change of the
     * model that moves the loss of these gradients by x moves the log odds of p by x / spread */
    double spread;
};
/* Forward from x, the result of the last block, to the losses. next: span to read ahead in the end,
 * or NULL. */
int perta_head_forward(struct perta_head *head, const struct perta_store *x,
                       const struct perta_span *next, struct perta_head_means *means,
                       struct perta_err *err);
/* After perta_head_forward: the loss of one sample. */
double perta_head_loss(const struct perta_head *head, uint64_t sample);
/* After perta_head_forward: dx (tokens, H) = the gradient of each sample's loss, weighted. Writes
 * the importance of the final norm, of the head's bias and, if it is not tied, of the head. */
int perta_head_backward(struct perta_head *head, const struct perta_store *x,
                        const struct perta_span *next, struct perta_store *dx,
                        struct perta_err *err);
/* The span that a pass over the head reads first. */
struct perta_span perta_head_first(const struct perta_head *head);
/* dx: gradients of what perta_embed gives. Writes the importance of the embedding, which includes
 * the head's if they are tied, of learned positions and of the norm after both. */
int perta_embed_backward(struct perta_head *head, const struct perta_store *dx,
                         struct perta_err *err);

#endif
