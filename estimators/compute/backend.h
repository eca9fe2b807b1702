/* backend.h - a compute backend: memory of its own, and a model's operations on it.
 *
 * A backend's memory is only reached through handles (struct perta_array). The host copies
 * numbers in and out with put and get, so an accelerator's backend can be added without a change to
 * any block. Implementations: cpu.h (workers and oneDNN) and scalar.h (plain loops, in memory of
 * its own: the reference that others are compared with). docs/architecture.md draws the seam.
 *
 * Operations are submitted in order and may run later; their results are valid after get() or
 * perta_backend_wait(). The structs that an operation is given are copied when it is submitted. The
 * host arrays that these point to (starts of runs, places, targets, indices, chunks, tokens, slopes,
 * factors of rows) are borrowed until the next get() or wait. Operations return nothing: the backend keeps the first
 * failure, ignores what is submitted after it, and returns it from perta_backend_wait().
 *
 * Threads: one at a time, except that any thread may call put() and get().
 *
 * Arrays are row-major float32 unless stated otherwise. T, n: tokens (rows); H: hidden; I:
 * intermediate; D: head_dim. Formulas: docs/estimate.md. */
#ifndef PERTA_ESTIMATORS_COMPUTE_BACKEND_H
#define PERTA_ESTIMATORS_COMPUTE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/activation.h"
#include "estimators/compute/cut.h"
#include "estimators/compute/place.h"
#include "io/err.h"
#include "io/format/dtype.h"

/* An address in a backend's memory. {0}: no array. */
struct perta_array {
    uint32_t buffer;   /* 0: none */
    uint64_t at_bytes; /* offset in the buffer */
};

static inline bool perta_array_is(struct perta_array a)
{
    return a.buffer != 0;
}

/* The address n_floats float32 after a. */
static inline struct perta_array perta_array_at(struct perta_array a, uint64_t n_floats)
{
    a.at_bytes += n_floats * sizeof(float);
    return a;
}

/* Take the next n floats of memory, after the first *at; *at moves to the cache line behind them.
 * Without memory, only count. */
static inline struct perta_array perta_array_take(struct perta_array memory, size_t *at, size_t n)
{
    struct perta_array here = perta_array_at(memory, *at);
    *at += (n + 15) & ~(size_t)15;
    return here;
}

/* A linear layer, or a range of its output rows: y = x weight^T + bias. */
struct perta_linear {
    struct perta_array weight; /* (out, in); no array: the model has no such layer */
    enum perta_dtype dtype;    /* of weight: F32, BF16 or F16 */
    size_t out, in;
    struct perta_array bias; /* (out); no array: no bias */
    bool transposed;         /* weight is stored as (in, out) */
};

/* A LoRA beside a linear layer (Hu et al. 2021): scaling * (b a) is added to its weight (out, in),
 * without ever forming that product. float32 also where other products are bfloat16: it would
 * round away what a small LoRA adds. */
struct perta_low_rank {
    struct perta_array a; /* (r, in) */
    struct perta_array b; /* (out, r) */
    size_t out, in, r;
    float scaling;
};

/* A norm's weight and bias, (n_weights, H) float32 each. Row t of what is normalised has their row
 * t % n_weights: with a weight for each head, the rows are heads. */
struct perta_norm {
    struct perta_array weight; /* no array: ones */
    struct perta_array bias;   /* no array: zeros; RMSNorm has none */
    float eps;
    float plus;       /* weight + plus, in float32, is what rows are multiplied by. Gemma: 1 */
    size_t n_weights; /* from 1 */
};

/* A token, and the row of the embedding to which its gradient is added. */
struct perta_token_row {
    uint64_t sample;
    uint32_t row; /* within the block of rows */
};

/* Adds the gradients of samples, for a block of rows of a matrix, to their sum and to the sum of
 * their squares. A sample's gradient is the sum of dy^T x over the rows of its chunks (cut.h), plus
 * d of each of its tokens. If chunks are not by sample there are no squares, and tokens are added
 * to the sums in order, after the chunks. The terms of each element are added in order, in float64,
 * so every division of the chunks into calls gives the same bits. */
struct perta_gradient {
    size_t rows, in;
    struct perta_array sums;    /* (rows, in) float64; no array: not wanted */
    struct perta_array squares; /* (rows, in) float64; no array: not wanted */
    /* (perta_tiles(rows, in), n_samples) float64: sums of the squares of a sample's gradient within
     * a tile, of which those of the first columns come first; no array: not wanted. Only by sample */
    struct perta_array norms;
    uint64_t n_samples;
    /* (rows, in): the gradient of a sample whose chunks are not all added yet, kept between calls.
     * Only if some sample has several chunks (perta_chunks.parts). */
    struct perta_array sample;
    const struct perta_chunks *chunks;
    size_t first, end; /* the chunks that this call adds */
    /* Row r of the chunks is row r - origin of x (rows of in) and of dy (rows of dy_width, of which
     * columns col .. col + rows are used). No array x: no products are added. */
    struct perta_array x, dy;
    size_t origin, dy_width, col;
    bool x_again; /* x, origin and chunks first .. end are the same as in the previous call, so a
                     backend may use what it prepared from x again */
    const struct perta_token_row *tokens; /* (n_tokens), in the order of samples */
    struct perta_array d;                 /* (n_tokens, in) */
    size_t n_tokens;
};

/* Rotary positions: which elements of a head are paired, and by which angles pairs are rotated. */
struct perta_rotation {
    const float *inv_freq; /* (rotated / 2): a pair's angle is position * inv_freq */
    size_t first, rotated; /* elements first .. first + rotated of each head; the others stay */
    bool interleaved;      /* pairs are (2i, 2i + 1) of these; otherwise (i, i + rotated / 2) */
    float factor;          /* of cos and sin */
    /* the same of tokens whose place is long */
    const float *long_inv_freq;
    float long_factor;
};

/* Attention within each sequence of a batch: q (n, n_heads, D), k (n, n_kv_heads, D),
 * v (n, n_kv_heads, V), out (n, n_heads, V); every n_heads / n_kv_heads query heads share a
 * key-value head. A token sees the tokens that its place says, less those that are window or more
 * before it and those of earlier chunks. If it sees none, out is 0, as with PyTorch's
 * scaled_dot_product_attention. The tokens that are seen are in the order of at. */
struct perta_attention {
    struct perta_runs sequences;
    const struct perta_place *places; /* (n) */
    size_t n_heads, n_kv_heads, D, V;
    uint32_t window; /* UINT32_MAX: no limit */
    /* 0: none. Otherwise a sequence is cut into chunks of so many tokens, counted by at from its
     * first token that is seen, and a token sees those of its own chunk alone (Llama 4) */
    uint32_t chunk;
    float scale;   /* score = scale * q k */
    float softcap; /* 0: none. Otherwise score = softcap * tanh(score / softcap) (Gemma 2) */
    /* ALiBi (Press et al. 2022), host (n_heads); NULL: none. score += slope * number of the key
     * among the tokens of its sequence that are seen, less the same of the last key that the token
     * sees. slopes_bf16: that number and the product are rounded to bfloat16, and the product is
     * multiplied by scale (Falcon) */
    const float *slopes;
    bool slopes_bf16;
    /* (n_heads); no array: none. One more score of each head, which takes its share of the softmax
     * and has no value (gpt-oss) */
    struct perta_array sinks;
    struct perta_array dsinks; /* (sequences.n, n_heads): set by backward, if there are sinks */
};

/* What a token that is added to a sequence sees: n keys and values, its own included. */
struct perta_past {
    uint64_t keys, values; /* floats of the array before them */
    size_t first;          /* tokens of the sequence before them, which are not seen */
    size_t n;
};

/* Attention of one token of each sequence over that sequence's keys (past.n, n_kv_heads, D) and
 * values (past.n, n_kv_heads, V), which were computed before: q (n, n_heads, D),
 * out (n, n_heads, V). */
struct perta_attention_past {
    struct perta_attention of;      /* without sequences, places, window, chunk and dsinks */
    const struct perta_past *pasts; /* (n) */
    size_t n;
};

struct perta_backend;

struct perta_backend_ops {
    const char *name;

    /* ---- memory ---- */

    /* Bytes of memory that alloc takes for a buffer of len_bytes. */
    uint64_t (*buffer_bytes)(const struct perta_backend *be, uint64_t len_bytes);
    /* A new buffer, filled with zeros. If the backend's products read past the end of an array
     * (cpu.h), there is memory to read after the buffer's end. Returns 0, or PERTA_ESYS with *err
     * filled and *buffer 0. */
    int (*alloc)(struct perta_backend *be, uint64_t len_bytes, uint32_t *buffer,
                 struct perta_err *err);
    /* Make a buffer of the host's own memory, which the host fills (with weights as they are read).
     * The backend sees what the host wrote only after uploaded(). Borrowed until free. */
    int (*share)(struct perta_backend *be, void *host, uint64_t len_bytes, uint32_t *buffer,
                 struct perta_err *err);
    void (*uploaded)(struct perta_backend *be, struct perta_array a, uint64_t len_bytes);
    /* Waits for the operations submitted so far. Buffer 0 is allowed. */
    void (*free)(struct perta_backend *be, uint32_t buffer);
    /* Takes its turn after the operations submitted so far; from may be overwritten on return. */
    void (*put)(struct perta_backend *be, struct perta_array to, const void *from,
                uint64_t len_bytes);
    /* Waits for the operations submitted so far. After a failure, to is undefined. */
    void (*get)(struct perta_backend *be, struct perta_array from, void *to, uint64_t len_bytes);
    /* Wait for everything submitted. Returns 0, or the first failure since the last wait, with *err
     * filled. */
    int (*wait)(struct perta_backend *be, struct perta_err *err);

    /* ---- rows ---- */

    void (*zero)(struct perta_backend *be, struct perta_array to, uint64_t n);
    void (*copy)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                 uint64_t n);
    /* to (n) += from (n) */
    void (*add)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                uint64_t n);
    /* x (n) *= by */
    void (*scale)(struct perta_backend *be, struct perta_array x, float by, uint64_t n);
    /* x (n) is clamped to -limit .. limit; NaN stays. backward: dx (n) *= whether x, which is what
     * forward was given, is within the limits or at one of them. */
    void (*clamp_forward)(struct perta_backend *be, struct perta_array x, float limit, uint64_t n);
    void (*clamp_backward)(struct perta_backend *be, struct perta_array dx, struct perta_array x,
                           float limit, uint64_t n);
    /* row i of x (n, H) *= by[i] */
    void (*scale_rows)(struct perta_backend *be, struct perta_array x, const float *by, size_t n,
                       size_t H);
    /* gather: row i of to (n, H) = row index[i] of from. scatter: row index[i] of to = row i of
     * from (n, H). scatter_add: the same with +=, in the order of i, skipping index UINT32_MAX. */
    void (*gather)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                   const uint32_t *index, size_t n, size_t H);
    void (*scatter)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    const uint32_t *index, size_t n, size_t H);
    void (*scatter_add)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                        const uint32_t *index, size_t n, size_t H);

    /* scatter_add of by[i] (host; NULL: 1) times row i. */
    void (*scatter_add_scaled)(struct perta_backend *be, struct perta_array to,
                               struct perta_array from, const uint32_t *index, const float *by,
                               size_t n, size_t H);
    /* to (n) += by * from (n) */
    void (*add_scaled)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       float by, uint64_t n);
    /* to (n, H): row i = by[i] * row i of a, with by (n) in the backend's memory. to may be a. */
    void (*multiply_rows)(struct perta_backend *be, struct perta_array to, struct perta_array a,
                          struct perta_array by, size_t n, size_t H);
    /* to (n) = a . b for each row of a and b (n, width), summed in float64. */
    void (*row_dots)(struct perta_backend *be, struct perta_array to, struct perta_array a,
                     struct perta_array b, size_t n, size_t width);
    /* Blocks of columns of rows: block b is columns first + b * stride .. + block. split: to
     * (n, n_blocks * block) = those columns of from (n, width). join: those columns of to
     * (n, width) = from (n, n_blocks * block); the others stay. */
    void (*split)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                  size_t n, size_t width, size_t first, size_t block, size_t stride,
                  size_t n_blocks);
    void (*join)(struct perta_backend *be, struct perta_array to, struct perta_array from, size_t n,
                 size_t width, size_t first, size_t block, size_t stride, size_t n_blocks);

    /* ---- linear layers ---- */

    /* y (n, out) = x (n, in) weight^T + bias; with add, y +=. tiles: how the n rows are cut. */
    void (*linear_forward)(struct perta_backend *be, const struct perta_linear *linear,
                           const struct perta_runs *tiles, struct perta_array x,
                           struct perta_array y, size_t n, bool add);
    /* dx (n, in) = dy (n, out) weight; with add, dx +=. */
    void (*linear_backward)(struct perta_backend *be, const struct perta_linear *linear,
                            const struct perta_runs *tiles, struct perta_array dy,
                            struct perta_array dx, size_t n, bool add);
    /* dweight (out, in) += dy (n, out)^T x (n, in), in float32. Used by training. */
    void (*linear_backward_weight)(struct perta_backend *be, struct perta_array dweight,
                                   struct perta_array dy, struct perta_array x, size_t n,
                                   size_t out, size_t in);
    /* dbias (out) = sum over rows first .. end of dy (.., out), summed in float64. */
    void (*linear_backward_bias)(struct perta_backend *be, struct perta_array dbias,
                                 struct perta_array dy, size_t first, size_t end, size_t out);

    /* ---- LoRA; room: scratch (2, n, r) ---- */

    /* y (n, out) += scaling * (x (n, in) a^T) b^T. tiles: how the n rows are cut. */
    void (*low_rank_forward)(struct perta_backend *be, const struct perta_low_rank *lora,
                             const struct perta_runs *tiles, struct perta_array x,
                             struct perta_array y, size_t n, struct perta_array room);
    /* dx (n, in) += scaling * (dy (n, out) b) a. */
    void (*low_rank_backward)(struct perta_backend *be, const struct perta_low_rank *lora,
                              const struct perta_runs *tiles, struct perta_array dy,
                              struct perta_array dx, size_t n, struct perta_array room);
    /* da (r, in) += scaling * (dy b)^T x, db (out, r) += scaling * dy^T (x a^T). Tiles are added
     * one after another, so calls for consecutive tiles give the same bits as one for all. */
    void (*low_rank_gradient)(struct perta_backend *be, const struct perta_low_rank *lora,
                              const struct perta_runs *tiles, struct perta_array x,
                              struct perta_array dy, struct perta_array da, struct perta_array db,
                              size_t n, struct perta_array room);

    /* ---- the parts of a block ---- */

    /* y (T, H) = x (T, H) * rstd * (weight + plus); rstd (T) = 1 / sqrt(mean(x^2) + eps)
     * (Zhang & Sennrich 2019). */
    void (*rmsnorm_forward)(struct perta_backend *be, const struct perta_norm *norm,
                            struct perta_array y, struct perta_array rstd, struct perta_array x,
                            size_t T, size_t H);
    /* dx (T, H) += the gradient of x, from dy (T, H). */
    void (*rmsnorm_backward)(struct perta_backend *be, const struct perta_norm *norm,
                             struct perta_array dx, struct perta_array dy, struct perta_array x,
                             struct perta_array rstd, size_t T, size_t H);
    /* dweight (n_weights, H) += sum over its rows of dy * x * rstd. */
    void (*rmsnorm_backward_weight)(struct perta_backend *be, const struct perta_norm *norm,
                                    struct perta_array dweight, struct perta_array dy,
                                    struct perta_array x, struct perta_array rstd, size_t T,
                                    size_t H);
    /* y (T, H) = (x (T, H) - mean) * rstd * (weight + plus) + bias; stats (T, 2) = the mean of the
     * row and 1 / sqrt(its variance + eps) (Ba et al. 2016). */
    void (*layernorm_forward)(struct perta_backend *be, const struct perta_norm *norm,
                              struct perta_array y, struct perta_array stats, struct perta_array x,
                              size_t T, size_t H);
    /* dx (T, H) += the gradient of x, from dy (T, H). */
    void (*layernorm_backward)(struct perta_backend *be, const struct perta_norm *norm,
                               struct perta_array dx, struct perta_array dy, struct perta_array x,
                               struct perta_array stats, size_t T, size_t H);
    /* dweight (n_weights, H) += sum over its rows of dy * (x - mean) * rstd, dbias (n_weights, H)
     * += that of dy. Either may be no array. */
    void (*layernorm_backward_weight)(struct perta_backend *be, const struct perta_norm *norm,
                                      struct perta_array dweight, struct perta_array dbias,
                                      struct perta_array dy, struct perta_array x,
                                      struct perta_array stats, size_t T, size_t H);
    /* Rotate each head of x (T, n_heads, D) as rotation says (Su et al. 2021). Positions come from
     * places (T). backward rotates dx in the opposite direction. */
    void (*rope_forward)(struct perta_backend *be, struct perta_array x,
                         const struct perta_place *places, const struct perta_rotation *rotation,
                         size_t T, size_t n_heads, size_t D);
    void (*rope_backward)(struct perta_backend *be, struct perta_array dx,
                          const struct perta_place *places, const struct perta_rotation *rotation,
                          size_t T, size_t n_heads, size_t D);
    void (*attention_forward)(struct perta_backend *be, const struct perta_attention *attention,
                              struct perta_array out, struct perta_array q, struct perta_array k,
                              struct perta_array v);
    /* Set dq (n, n_heads, D), dk (n, n_kv_heads, D), dv (n, n_kv_heads, V) and dsinks from
     * dout (n, n_heads, V) and the inputs of forward. of_heads: scratch, (n, n_heads, D) and
     * (n, n_heads, V). */
    void (*attention_backward)(struct perta_backend *be, const struct perta_attention *attention,
                               struct perta_array dq, struct perta_array dk, struct perta_array dv,
                               struct perta_array dout, struct perta_array q, struct perta_array k,
                               struct perta_array v, const struct perta_array of_heads[2]);
    /* kv: keys and values. */
    void (*attention_past_forward)(struct perta_backend *be,
                                   const struct perta_attention_past *past, struct perta_array out,
                                   struct perta_array q, struct perta_array kv);
    /* h (n) = f(gate) * up (Shazeer 2020), or what activation.h says. */
    void (*glu_forward)(struct perta_backend *be, const struct perta_activation *act,
                        struct perta_array h, struct perta_array gate, struct perta_array up,
                        size_t n);
    /* dgate, dup = the gradients of gate and up, from dh; dgate may be dh. */
    void (*glu_backward)(struct perta_backend *be, const struct perta_activation *act,
                         struct perta_array dgate, struct perta_array dup, struct perta_array dh,
                         struct perta_array gate, struct perta_array up, size_t n);
    /* h (n) = f(x). Not for PERTA_CLAMPED_SWIGLU. */
    void (*act_forward)(struct perta_backend *be, const struct perta_activation *act,
                        struct perta_array h, struct perta_array x, size_t n);
    /* dx = the gradient of x, from dh; dx may be dh. */
    void (*act_backward)(struct perta_backend *be, const struct perta_activation *act,
                         struct perta_array dx, struct perta_array dh, struct perta_array x,
                         size_t n);

    /* ---- cross-entropy, a block of the vocabulary at a time ---- */

    /* x (n) = cap * tanh(x / cap): a soft cap of logits (Gemma 2). */
    void (*softcap_forward)(struct perta_backend *be, struct perta_array x, float cap, uint64_t n);
    /* dx (n) *= 1 - (y / cap)^2, from the gradient of y (n), what forward gave, to that of x. */
    void (*softcap_backward)(struct perta_backend *be, struct perta_array dx, struct perta_array y,
                             float cap, uint64_t n);
    /* logits (n, n_rows) of the vocabulary's entries row .. row + n_rows. forward is called for
     * each block in turn and updates the running maximum most (n) and the running sum of
     * exponentials sums (n) float64 (Milakov & Gimelshein 2018), which start as -INFINITY and 0.
     * The block that has target (n) sets of_target (n) to its logit. */
    void (*cross_entropy_forward)(struct perta_backend *be, struct perta_array logits, size_t row,
                                  size_t n_rows, size_t n, const int32_t *target,
                                  struct perta_array most, struct perta_array sums,
                                  struct perta_array of_target);
    /* Replace logits by their gradients, share (n) * (softmax - 1 at the target), computed from
     * most and sums as forward left them. The log of the sum is not used: added to a large most it
     * would be rounded, and the gradient of a nearly certain target is what remains after
     * subtracting 1. */
    void (*cross_entropy_backward)(struct perta_backend *be, struct perta_array logits, size_t row,
                                   size_t n_rows, size_t n, const int32_t *target,
                                   struct perta_array most, struct perta_array sums,
                                   struct perta_array share);
    /* Update the running maximum most (n), which starts as -INFINITY, and its entry best (n) int32;
     * the first of equal ones. */
    void (*best_forward)(struct perta_backend *be, struct perta_array logits, size_t row,
                         size_t n_rows, size_t n, struct perta_array most, struct perta_array best);
    /* Update moments (n, 2) float64, which start as 0: the sums of e^d d and of e^d d^2 over the
     * vocabulary, with d = logit - the running maximum. It comes before cross_entropy_forward of
     * the same block, and only reads most and sums. With S = sums in the end, the mean of d over
     * the model's distribution is moments[0] / S, that of d^2 is moments[1] / S. */
    void (*moments_forward)(struct perta_backend *be, struct perta_array logits, size_t n_rows,
                            size_t n, struct perta_array most, struct perta_array sums,
                            struct perta_array moments);

    /* ---- gradients ---- */

    void (*gradient)(struct perta_backend *be, const struct perta_gradient *gradient);
    /* sums (n) float64 += d; squares (n) float64 += d^2, if there is such an array. */
    void (*accumulate)(struct perta_backend *be, struct perta_array sums,
                       struct perta_array squares, struct perta_array d, size_t n);
    /* to (n) = from (n) float64 / of, rounded to float32. After a wait, *finite says whether all of
     * to are finite. */
    void (*mean)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                 double of, size_t n, bool *finite);

    /* ---- training ---- */

    /* One step of AdamW (Loshchilov & Hutter 2019) with betas 0.9 and 0.999 and eps 1e-8; step
     * counts from 1. weight, its moments first and second, gradient: (n). */
    void (*adamw)(struct perta_backend *be, struct perta_array weight, struct perta_array first,
                  struct perta_array second, struct perta_array gradient, uint64_t n,
                  float learning_rate, float weight_decay, uint64_t step);

    void (*close)(struct perta_backend *be);
};

/* The first member of every backend. */
struct perta_backend {
    const struct perta_backend_ops *ops;
    /* The first failure since the last wait; rc 0: no failure. */
    int rc;
    struct perta_err err;
};

/* Make a failure outside the backend (of the weights, of a sink) its own, unless it has one
 * already. rc 0: no failure. */
static inline void perta_backend_fail(struct perta_backend *be, int rc, const struct perta_err *err)
{
    if (!rc || be->rc)
        return;
    be->rc = rc;
    be->err = *err;
}

static inline int perta_backend_wait(struct perta_backend *be, struct perta_err *err)
{
    return be->ops->wait(be, err);
}

/* NULL is allowed. */
static inline void perta_backend_close(struct perta_backend *be)
{
    if (be)
        be->ops->close(be);
}

#endif
