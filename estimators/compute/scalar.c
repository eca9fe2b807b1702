#include "estimators/compute/scalar.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/scalar_own.h"

/* ---- memory ---- */

struct buffer {
    uint8_t *bytes; /* kept until close, so that a stale handle reads NaN */
    uint64_t len_bytes;
    const uint8_t *host; /* memory that the host shares, or NULL */
};

struct scalar {
    struct perta_backend backend;
    pthread_mutex_t lock;   /* guards the table below, which put() and get() read on any thread */
    struct buffer *buffers; /* (n_buffers); a handle is an index plus 1 */
    uint32_t n_buffers;
};

/* Fill with bytes that are NaN as float32, float64, BF16 and F16. */
static void poison(void *bytes, uint64_t len_bytes)
{
    memset(bytes, 0xff, len_bytes);
}

static struct buffer buffer_of(struct perta_backend *be, uint32_t handle)
{
    struct scalar *s = (struct scalar *)be;
    pthread_mutex_lock(&s->lock);
    assert(handle && handle <= s->n_buffers);
    struct buffer buffer = s->buffers[handle - 1];
    pthread_mutex_unlock(&s->lock);
    return buffer;
}

void *perta_scalar_bytes(struct perta_backend *be, struct perta_array a, uint64_t len_bytes)
{
    if (!perta_array_is(a))
        return NULL;
    struct buffer buffer = buffer_of(be, a.buffer);
    assert(a.at_bytes <= buffer.len_bytes && len_bytes <= buffer.len_bytes - a.at_bytes);
    return buffer.bytes + a.at_bytes;
}

float *perta_scalar_floats(struct perta_backend *be, struct perta_array a, uint64_t n)
{
    return perta_scalar_bytes(be, a, n * sizeof(float));
}

double *perta_scalar_doubles(struct perta_backend *be, struct perta_array a, uint64_t n)
{
    return perta_scalar_bytes(be, a, n * sizeof(double));
}

/* Add a new buffer to the table. *handle is 0 on error. */
static int add_buffer(struct perta_backend *be, const uint8_t *host, uint64_t len_bytes,
                      uint32_t *handle, struct perta_err *err)
{
    struct scalar *s = (struct scalar *)be;
    uint8_t *bytes = malloc(len_bytes + !len_bytes);
    pthread_mutex_lock(&s->lock);
    struct buffer *more = bytes ? realloc(s->buffers, (s->n_buffers + 1) * sizeof *more) : NULL;
    if (more) {
        more[s->n_buffers++] = (struct buffer){bytes, len_bytes, host};
        s->buffers = more;
    }
    *handle = more ? s->n_buffers : 0;
    pthread_mutex_unlock(&s->lock);
    if (more)
        return 0;
    free(bytes);
    return perta_fail_sys(err, ENOMEM, "%llu MiB of buffers", (unsigned long long)len_bytes >> 20);
}

static uint64_t scalar_buffer_bytes(const struct perta_backend *be, uint64_t len_bytes)
{
    (void)be;
    return len_bytes;
}

static int scalar_alloc(struct perta_backend *be, uint64_t len_bytes, uint32_t *handle,
                        struct perta_err *err)
{
    int rc = add_buffer(be, NULL, len_bytes, handle, err);
    if (!rc)
        memset(buffer_of(be, *handle).bytes, 0, len_bytes);
    return rc;
}

static int scalar_share(struct perta_backend *be, void *host, uint64_t len_bytes, uint32_t *handle,
                        struct perta_err *err)
{
    int rc = add_buffer(be, host, len_bytes, handle, err);
    if (!rc)
        poison(buffer_of(be, *handle).bytes, len_bytes);
    return rc;
}

static void scalar_uploaded(struct perta_backend *be, struct perta_array a, uint64_t len_bytes)
{
    memcpy(perta_scalar_bytes(be, a, len_bytes), buffer_of(be, a.buffer).host + a.at_bytes,
           len_bytes);
}

static void scalar_free(struct perta_backend *be, uint32_t handle)
{
    if (handle)
        poison(buffer_of(be, handle).bytes, buffer_of(be, handle).len_bytes);
}

static void scalar_put(struct perta_backend *be, struct perta_array to, const void *from,
                       uint64_t len_bytes)
{
    memcpy(perta_scalar_bytes(be, to, len_bytes), from, len_bytes);
}

static void scalar_get(struct perta_backend *be, struct perta_array from, void *to,
                       uint64_t len_bytes)
{
    memcpy(to, perta_scalar_bytes(be, from, len_bytes), len_bytes);
}

static int scalar_wait(struct perta_backend *be, struct perta_err *err)
{
    int rc = be->rc;
    if (rc && !err->code)
        *err = be->err;
    be->rc = 0;
    be->err = (struct perta_err){0};
    return rc;
}

/* ---- open, close ---- */

static void scalar_close(struct perta_backend *be)
{
    struct scalar *s = (struct scalar *)be;
    for (uint32_t i = 0; i < s->n_buffers; i++)
        free(s->buffers[i].bytes);
    free(s->buffers);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static const struct perta_backend_ops scalar_ops = {
    .name = "scalar",
    .buffer_bytes = scalar_buffer_bytes,
    .alloc = scalar_alloc,
    .share = scalar_share,
    .uploaded = scalar_uploaded,
    .free = scalar_free,
    .put = scalar_put,
    .get = scalar_get,
    .wait = scalar_wait,
    .zero = perta_scalar_zero,
    .copy = perta_scalar_copy,
    .add = perta_scalar_add,
    .scale = perta_scalar_scale,
    .clamp_forward = perta_scalar_clamp_forward,
    .clamp_backward = perta_scalar_clamp_backward,
    .scale_rows = perta_scalar_scale_rows,
    .gather = perta_scalar_gather,
    .scatter = perta_scalar_scatter,
    .scatter_add = perta_scalar_scatter_add,
    .scatter_add_scaled = perta_scalar_scatter_add_scaled,
    .add_scaled = perta_scalar_add_scaled,
    .multiply_rows = perta_scalar_multiply_rows,
    .row_dots = perta_scalar_row_dots,
    .split = perta_scalar_split,
    .join = perta_scalar_join,
    .linear_forward = perta_scalar_linear_forward,
    .linear_backward = perta_scalar_linear_backward,
    .linear_backward_weight = perta_scalar_linear_backward_weight,
    .linear_backward_bias = perta_scalar_linear_backward_bias,
    .low_rank_forward = perta_scalar_low_rank_forward,
    .low_rank_backward = perta_scalar_low_rank_backward,
    .low_rank_gradient = perta_scalar_low_rank_gradient,
    .rmsnorm_forward = perta_scalar_rmsnorm_forward,
    .rmsnorm_backward = perta_scalar_rmsnorm_backward,
    .rmsnorm_backward_weight = perta_scalar_rmsnorm_backward_weight,
    .layernorm_forward = perta_scalar_layernorm_forward,
    .layernorm_backward = perta_scalar_layernorm_backward,
    .layernorm_backward_weight = perta_scalar_layernorm_backward_weight,
    .rope_forward = perta_scalar_rope_forward,
    .rope_backward = perta_scalar_rope_backward,
    .attention_forward = perta_scalar_attention_forward,
    .attention_past_forward = perta_scalar_attention_past_forward,
    .attention_backward = perta_scalar_attention_backward,
    .glu_forward = perta_scalar_glu_forward,
    .glu_backward = perta_scalar_glu_backward,
    .act_forward = perta_scalar_act_forward,
    .act_backward = perta_scalar_act_backward,
    .softcap_forward = perta_scalar_softcap_forward,
    .softcap_backward = perta_scalar_softcap_backward,
    .cross_entropy_forward = perta_scalar_cross_entropy_forward,
    .cross_entropy_backward = perta_scalar_cross_entropy_backward,
    .best_forward = perta_scalar_best_forward,
    .moments_forward = perta_scalar_moments_forward,
    .gradient = perta_scalar_gradient,
    .accumulate = perta_scalar_accumulate,
    .mean = perta_scalar_mean,
    .adamw = perta_scalar_adamw,
    .close = scalar_close,
};

int perta_scalar_open(struct perta_backend **out, struct perta_err *err)
{
    struct scalar *s = calloc(1, sizeof *s);
    if (!s)
        return perta_fail_sys(err, ENOMEM, "arrays");
    s->backend.ops = &scalar_ops;
    pthread_mutex_init(&s->lock, NULL);
    *out = &s->backend;
    return 0;
}
