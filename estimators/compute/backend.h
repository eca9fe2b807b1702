/* backend.h - what computes: memory of its own, and a model's operations on it.
 *
 * A backend's memory is reached by handle (struct perta_array) alone; the host moves numbers in and
 * out with put and get, so that an accelerator can stand here without a block knowing of it.
 * Implementations: cpu.h (workers and oneDNN), scalar.h (plain loops in memory of its own, the
 * reference that the others are compared with). docs/architecture.md draws the seam.
 *
 * Operations are submitted in order, and may run later: what they write is there after get() or
 * perta_backend_wait(). Host pointers that an operation takes (runs, places, targets, indices) are
 * read until then. An operation cannot fail by itself: the first failure is kept, what is submitted
 * afterwards does nothing, and perta_backend_wait() returns it.
 *
 * Threads: one at a time, but for put() and get(), which any thread may call.
 *
 * Arrays are row-major and float32 unless said otherwise. T, n: tokens (rows); H hidden; I
 * intermediate; D head_dim. Formulas: docs/estimate.md. */
#ifndef PERTA_ESTIMATORS_COMPUTE_BACKEND_H
#define PERTA_ESTIMATORS_COMPUTE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/cut.h"
#include "estimators/compute/place.h"
#include "io/err.h"
#include "io/format/dtype.h"

/* A place in a backend's memory. {0}: none. */
struct perta_array {
    uint32_t buffer;   /* 0: none */
    uint64_t at_bytes; /* from the start of the buffer */
};

static inline bool perta_array_is(struct perta_array a)
{
    return a.buffer != 0;
}

/* So many float32 further on. */
static inline struct perta_array perta_array_at(struct perta_array a, uint64_t n_floats)
{
    a.at_bytes += n_floats * sizeof(float);
    return a;
}

/* A linear layer, or some rows of one: y = x weight^T + bias. */
struct perta_linear {
    struct perta_array weight; /* (out, in); none: the layer is not there */
    enum perta_dtype dtype;    /* of weight: F32, BF16 or F16 */
    size_t out, in;
    struct perta_array bias; /* (out), or none */
};

/* A row of an embedding gets a token's gradient. */
struct perta_token_row {
    uint64_t sample;
    uint32_t row; /* of the block */
};

/* What samples add to rows of a matrix's gradient, summed over samples, and to the sum of squares of
 * each sample's own. A sample's gradient is that of its chunks (cut.h), dy^T x over the rows of each,
 * and d of each of its tokens. Where chunks are not by sample there are no squares, and tokens are
 * added to the sums, in order, after the chunks. Every element's terms are added in order, in
 * float64: any split of chunks into calls gives the same bits. */
struct perta_gradient {
    size_t rows, in;
    struct perta_array sums;    /* (rows, in) float64 */
    struct perta_array squares; /* (rows, in) float64; none: not wanted */
    struct perta_array
        sample; /* (rows, in): the sample under way, where some sample has more chunks
                                   than one (perta_chunks.parts); else none. Kept between calls */
    const struct perta_chunks *chunks;
    size_t first, end; /* of chunks: those that are added */
    /* Row r of the chunks is row r - origin of x (in wide) and of dy (dy_width wide), of which
     * columns col .. col + rows count. x none: no products. */
    struct perta_array x, dy;
    size_t origin, dy_width, col;
    bool
        x_again; /* x, origin and chunks first .. end are those of the call before: what was made of
                     x then may be used again */
    const struct perta_token_row *tokens; /* (n_tokens), of the chunks' samples, in order */
    struct perta_array d;                 /* (n_tokens, in) */
    size_t n_tokens;
};

struct perta_backend;

struct perta_backend_ops {
    const char *name;

    /* ---- memory ---- */

    /* What alloc takes for a buffer of len_bytes. */
    uint64_t (*buffer_bytes)(const struct perta_backend *be, uint64_t len_bytes);
    /* A buffer, zeros. Where rows of a product are read past the end of an array (cpu.h) there is
     * memory after the buffer's end. Returns 0, or PERTA_ESYS with *err filled and *buffer 0. */
    int (*alloc)(struct perta_backend *be, uint64_t len_bytes, uint32_t *buffer,
                 struct perta_err *err);
    /* A buffer of memory that the host keeps and fills (weights as they are read): what it writes
     * counts after uploaded(). Borrowed until free. */
    int (*share)(struct perta_backend *be, void *host, uint64_t len_bytes, uint32_t *buffer,
                 struct perta_err *err);
    void (*uploaded)(struct perta_backend *be, struct perta_array a, uint64_t len_bytes);
    /* Waits for what was submitted. buffer 0: nothing. */
    void (*free)(struct perta_backend *be, uint32_t buffer);
    void (*put)(struct perta_backend *be, struct perta_array to, const void *from,
                uint64_t len_bytes);
    /* Waits for what was submitted. After a failure, to is undefined. */
    void (*get)(struct perta_backend *be, struct perta_array from, void *to, uint64_t len_bytes);
    /* Until all is done. Returns 0, or the first failure since the last wait, with *err filled. */
    int (*wait)(struct perta_backend *be, struct perta_err *err);

    /* ---- rows ---- */

    void (*zero)(struct perta_backend *be, struct perta_array to, uint64_t n);
    void (*copy)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                 uint64_t n);
    /* to (n) += from (n) */
    void (*add)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                uint64_t n);
    /* Row i of to (n, H) = row index[i] of from; to's row index[i] = row i of from; or += it, in the
     * order of i, but for index UINT32_MAX. */
    void (*gather)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                   const uint32_t *index, size_t n, size_t H);
    void (*scatter)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    const uint32_t *index, size_t n, size_t H);
    void (*scatter_add)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                        const uint32_t *index, size_t n, size_t H);

    /* ---- linear layers ---- */

    /* y (n, out) = x (n, in) weight^T + bias; with add, y +=. tiles: where the n rows are cut. */
    void (*linear_forward)(struct perta_backend *be, const struct perta_linear *linear,
                           const struct perta_runs *tiles, struct perta_array x,
                           struct perta_array y, size_t n, bool add);
    /* dx (n, in) = dy (n, out) weight; with add, dx +=. */
    void (*linear_backward)(struct perta_backend *be, const struct perta_linear *linear,
                            const struct perta_runs *tiles, struct perta_array dy,
                            struct perta_array dx, size_t n, bool add);
    /* dweight (out, in) += dy (n, out)^T x (n, in), in float32: what training wants. */
    void (*linear_backward_weight)(struct perta_backend *be, struct perta_array dweight,
                                   struct perta_array dy, struct perta_array x, size_t n,
                                   size_t out, size_t in);
    /* dbias (out) = sum over rows first .. end of dy (.., out), summed in float64. */
    void (*linear_backward_bias)(struct perta_backend *be, struct perta_array dbias,
                                 struct perta_array dy, size_t first, size_t end, size_t out);

    /* ---- the parts of a block ---- */

    /* y (T, H) = x (T, H) * rstd * weight (H); rstd (T) = 1 / sqrt(mean(x^2) + eps)
     * (Zhang & Sennrich 2019). */
    void (*rmsnorm_forward)(struct perta_backend *be, struct perta_array y, struct perta_array rstd,
                            struct perta_array x, struct perta_array weight, size_t T, size_t H,
                            float eps);
    /* dx (T, H) += gradient through x, of dy (T, H). */
    void (*rmsnorm_backward)(struct perta_backend *be, struct perta_array dx, struct perta_array dy,
                             struct perta_array x, struct perta_array rstd,
                             struct perta_array weight, size_t T, size_t H);
    /* dweight (H) += sum over tokens of dy * x * rstd. */
    void (*rmsnorm_backward_weight)(struct perta_backend *be, struct perta_array dweight,
                                    struct perta_array dy, struct perta_array x,
                                    struct perta_array rstd, size_t T, size_t H);
    /* Rotate x (T, n_heads, D) by the angles position * inv_freq (D / 2), halves of each head paired
     * (Su et al. 2021), as transformers does; position is that of places (T). backward turns dx the
     * other way. */
    void (*rope_forward)(struct perta_backend *be, struct perta_array x,
                         const struct perta_place *places, const float *inv_freq, size_t T,
                         size_t n_heads, size_t D);
    void (*rope_backward)(struct perta_backend *be, struct perta_array dx,
                          const struct perta_place *places, const float *inv_freq, size_t T,
                          size_t n_heads, size_t D);
    void (*attention_forward)(struct perta_backend *be, const struct perta_attention *attention,
                              struct perta_array out, struct perta_array q, struct perta_array k,
                              struct perta_array v);
    /* dq (n, n_heads, D), dk, dv (n, n_kv_heads, D) are set, from dout and what forward was given.
     * of_heads: two times (n, n_heads, D) of scratch. */
    void (*attention_backward)(struct perta_backend *be, const struct perta_attention *attention,
                               struct perta_array dq, struct perta_array dk, struct perta_array dv,
                               struct perta_array dout, struct perta_array q, struct perta_array k,
                               struct perta_array v, const struct perta_array of_heads[2]);
    /* h (n) = silu(gate) * up. */
    void (*swiglu_forward)(struct perta_backend *be, struct perta_array h, struct perta_array gate,
                           struct perta_array up, size_t n);
    /* dgate, dup = gradients through gate and up, of dh; dgate may be dh. */
    void (*swiglu_backward)(struct perta_backend *be, struct perta_array dgate,
                            struct perta_array dup, struct perta_array dh, struct perta_array gate,
                            struct perta_array up, size_t n);

    /* ---- cross-entropy, a block of the vocabulary at a time ---- */

    /* logits (n, n_rows) of entries row .. row + n_rows. forward, for every block in turn, keeps the
     * running maximum most (n) and sum of exponentials sums (n) float64 (Milakov & Gimelshein 2018),
     * which begin as -INFINITY and 0, and the logit of target (n) in of_target (n) once it comes
     * by. */
    void (*cross_entropy_forward)(struct perta_backend *be, struct perta_array logits, size_t row,
                                  size_t n_rows, size_t n, const int32_t *target,
                                  struct perta_array most, struct perta_array sums,
                                  struct perta_array of_target);
    /* logits become their gradients: share (n) * (softmax - one at target), from what forward left in
     * most and sums. A log of the sum, added to a large most, would be rounded: the gradient of a
     * target that is nearly certain is what is left after taking away one. */
    void (*cross_entropy_backward)(struct perta_backend *be, struct perta_array logits, size_t row,
                                   size_t n_rows, size_t n, const int32_t *target,
                                   struct perta_array most, struct perta_array sums,
                                   struct perta_array share);
    /* The running maximum most (n), which begins as -INFINITY, and where it is, best (n) int32: of
     * equals the first. */
    void (*best_forward)(struct perta_backend *be, struct perta_array logits, size_t row,
                         size_t n_rows, size_t n, struct perta_array most, struct perta_array best);

    /* ---- gradients ---- */

    void (*gradient)(struct perta_backend *be, const struct perta_gradient *gradient);
    /* sums (n) float64 += d, squares (n) float64, unless none, += d^2. */
    void (*accumulate)(struct perta_backend *be, struct perta_array sums,
                       struct perta_array squares, struct perta_array d, size_t n);
    /* to (n) = from (n) float64 / of, rounded to float32. *finite, after a wait: all of them are. */
    void (*mean)(struct perta_backend *be, struct perta_array to, struct perta_array from,
                 double of, size_t n, bool *finite);

    /* ---- training ---- */

    /* One step of AdamW (Loshchilov & Hutter 2019), betas 0.9 and 0.999, eps 1e-8: step counts from
     * 1. weight, first, second, gradient (n). */
    void (*adamw)(struct perta_backend *be, struct perta_array weight, struct perta_array first,
                  struct perta_array second, struct perta_array gradient, uint64_t n,
                  float learning_rate, float weight_decay, uint64_t step);

    void (*close)(struct perta_backend *be);
};

/* What every backend begins with. */
struct perta_backend {
    const struct perta_backend_ops *ops;
    /* The first failure since the last wait; rc 0: none. */
    int rc;
    struct perta_err err;
};

/* A failure of what feeds it: weights, a sink. rc 0: none. The first is kept. */
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

/* NULL: nothing. */
static inline void perta_backend_close(struct perta_backend *be)
{
    if (be)
        be->ops->close(be);
}

#endif
