#include "estimators/compute/cpu.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/cpu_own.h"
#include "io/checked.h"

/* ---- memory needed ---- */

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* For the converted operands of a product: rows of a weight and, in bf16, rows of activations. */
static uint64_t converted_floats(const struct perta_cpu_needs *needs)
{
    uint64_t weight = PERTA_CPU_WEIGHT_ROWS + PERTA_SLACK_ROWS + 1;
    uint64_t rows = needs->rows + PERTA_SLACK_ROWS + 1;
    return needs->bf16 ? (rows + weight) * needs->widest / 2 + 128 : weight * needs->widest + 128;
}

static uint64_t scratch_floats(const struct perta_cpu_needs *needs)
{
    return larger(converted_floats(needs), needs->gradient_floats / (needs->bf16 ? 2 : 1));
}

/* A worker's room holds a row, a tile, or attention's scores. */
static uint64_t room_floats(const struct perta_cpu_needs *needs)
{
    return larger(larger((uint64_t)PERTA_TILE_ROWS * PERTA_TILE_COLS, needs->widest),
                  perta_cpu_attention_room(needs->longest));
}

uint64_t perta_cpu_bytes(const struct perta_cpu_needs *needs)
{
    return scratch_floats(needs) * sizeof(float);
}

uint64_t perta_cpu_worker_bytes(const struct perta_cpu_needs *needs)
{
    return PERTA_GEMM_WORKER_BYTES + room_floats(needs) * sizeof(float);
}

static uint64_t with_slack(const struct perta_cpu_needs *needs, uint64_t len_bytes)
{
    return len_bytes + (uint64_t)PERTA_SLACK_ROWS * needs->widest * sizeof(float);
}

uint64_t perta_cpu_buffer_bytes(const struct perta_cpu_needs *needs, uint64_t len_bytes)
{
    return perta_align_up(with_slack(needs, len_bytes), perta_page_bytes());
}

/* ---- memory ---- */

void *perta_cpu_at(struct perta_cpu *cpu, struct perta_array a)
{
    if (!perta_array_is(a))
        return NULL;
    pthread_mutex_lock(&cpu->lock);
    assert(a.buffer <= cpu->n_buffers);
    struct perta_cpu_buffer buffer = cpu->buffers[a.buffer - 1];
    pthread_mutex_unlock(&cpu->lock);
    assert(buffer.base && a.at_bytes <= buffer.len_bytes);
    return buffer.base + a.at_bytes;
}

/* Add a buffer to the table. *handle is 0 on error. */
static int keep(struct perta_cpu *cpu, const struct perta_cpu_buffer *buffer, uint32_t *handle,
                struct perta_err *err)
{
    uint32_t i = 0;
    int rc = 0;
    pthread_mutex_lock(&cpu->lock);
    while (i < cpu->n_buffers && cpu->buffers[i].base)
        i++;
    if (i == cpu->n_buffers) {
        struct perta_cpu_buffer *more = realloc(cpu->buffers, (i + 1) * sizeof *more);
        cpu->buffers = more ? more : cpu->buffers;
        cpu->n_buffers += more != NULL;
        rc = more ? 0 : perta_fail_sys(err, ENOMEM, "buffers");
    }
    if (!rc)
        cpu->buffers[i] = *buffer;
    pthread_mutex_unlock(&cpu->lock);
    *handle = rc ? 0 : i + 1;
    return rc;
}

static uint64_t cpu_buffer_bytes(const struct perta_backend *be, uint64_t len_bytes)
{
    return perta_cpu_buffer_bytes(&((const struct perta_cpu *)be)->needs, len_bytes);
}

static int cpu_alloc(struct perta_backend *be, uint64_t len_bytes, uint32_t *handle,
                     struct perta_err *err)
{
    struct perta_cpu *cpu = (struct perta_cpu *)be;
    struct perta_cpu_buffer buffer = {.len_bytes = len_bytes};
    *handle = 0;
    int rc = perta_pool_take(&buffer.pool, with_slack(&cpu->needs, len_bytes), err);
    if (rc)
        return rc;
    buffer.base = buffer.pool.base;
    rc = keep(cpu, &buffer, handle, err);
    if (rc)
        perta_pool_give(&buffer.pool);
    return rc;
}

static int cpu_share(struct perta_backend *be, void *host, uint64_t len_bytes, uint32_t *handle,
                     struct perta_err *err)
{
    const struct perta_cpu_buffer buffer = {.base = host, .len_bytes = len_bytes};
    return keep((struct perta_cpu *)be, &buffer, handle, err);
}

/* Nothing to do: operations read the host's own memory. */
static void cpu_uploaded(struct perta_backend *be, struct perta_array a, uint64_t len_bytes)
{
    (void)be;
    (void)a;
    (void)len_bytes;
}

static void cpu_free(struct perta_backend *be, uint32_t handle)
{
    struct perta_cpu *cpu = (struct perta_cpu *)be;
    if (!handle)
        return;
    pthread_mutex_lock(&cpu->lock);
    struct perta_cpu_buffer buffer = cpu->buffers[handle - 1];
    cpu->buffers[handle - 1] = (struct perta_cpu_buffer){0};
    pthread_mutex_unlock(&cpu->lock);
    perta_pool_give(&buffer.pool);
}

static void cpu_put(struct perta_backend *be, struct perta_array to, const void *from,
                    uint64_t len_bytes)
{
    void *at = perta_cpu_at((struct perta_cpu *)be, to);
    if (at != from) /* equal: the host shares this memory */
        memcpy(at, from, len_bytes);
}

static void cpu_get(struct perta_backend *be, struct perta_array from, void *to, uint64_t len_bytes)
{
    const void *at = perta_cpu_at((struct perta_cpu *)be, from);
    if (at != to) /* equal: the host shares this memory */
        memcpy(to, at, len_bytes);
}

static int cpu_wait(struct perta_backend *be, struct perta_err *err)
{
    int rc = be->rc;
    if (rc && !err->code)
        *err = be->err;
    be->rc = 0;
    be->err = (struct perta_err){0};
    return rc;
}

/* ---- distributing work ---- */

/* Elements in a piece, about: tens of microseconds of work. */
#define PIECE_ELEMS (1u << 16)

struct shares {
    void (*some)(const void *args, size_t from, size_t to);
    const void *args;
    size_t n, of_piece;
};

static int run_share(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct shares *r = ctx;
    size_t from = i * r->of_piece, to = from + r->of_piece;
    (void)worker;
    (void)err;
    r->some(r->args, from, to < r->n ? to : r->n);
    return 0;
}

void perta_cpu_share_out(const struct perta_cpu *cpu, size_t n, size_t elems,
                         void (*some)(const void *args, size_t from, size_t to), const void *args)
{
    struct perta_err never = {0};
    struct shares r = {some, args, n, elems && elems < PIECE_ELEMS ? PIECE_ELEMS / elems : 1};
    perta_workers_run(cpu->workers, (n + r.of_piece - 1) / r.of_piece, run_share, &r, &never);
}

/* ---- training ---- */

struct adamw {
    float *w, *m, *v;
    const float *g;
    float rate, decay, c1, c2;
};

static void adamw_elems(const void *args, size_t first, size_t end)
{
    const struct adamw *a = args;
    const float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
    for (size_t i = first; i < end; i++) {
        a->m[i] = beta1 * a->m[i] + (1 - beta1) * a->g[i];
        a->v[i] = beta2 * a->v[i] + (1 - beta2) * a->g[i] * a->g[i];
        a->w[i] -= a->rate * a->decay * a->w[i];
        a->w[i] -= a->rate * (a->m[i] / a->c1) / (sqrtf(a->v[i] / a->c2) + eps);
    }
}

static void adamw(struct perta_backend *be, struct perta_array weight, struct perta_array first,
                  struct perta_array second, struct perta_array gradient, uint64_t n,
                  float learning_rate, float weight_decay, uint64_t step)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct adamw a = {perta_cpu_at(cpu, weight),
                            perta_cpu_at(cpu, first),
                            perta_cpu_at(cpu, second),
                            perta_cpu_at(cpu, gradient),
                            learning_rate,
                            weight_decay,
                            (float)(1 - pow(0.9, (double)step)),
                            (float)(1 - pow(0.999, (double)step))};
    perta_cpu_share_out(cpu, n, 1, adamw_elems, &a);
}

/* ---- open, close ---- */

static void cpu_close(struct perta_backend *be)
{
    struct perta_cpu *cpu = (struct perta_cpu *)be;
    for (uint32_t i = 0; i < cpu->n_buffers; i++)
        perta_pool_give(&cpu->buffers[i].pool);
    free(cpu->buffers);
    pthread_mutex_destroy(&cpu->lock);
    perta_gemm_close(cpu->gemm);
    free(cpu);
}

static const struct perta_backend_ops cpu_ops = {
    .name = "cpu",
    .buffer_bytes = cpu_buffer_bytes,
    .alloc = cpu_alloc,
    .share = cpu_share,
    .uploaded = cpu_uploaded,
    .free = cpu_free,
    .put = cpu_put,
    .get = cpu_get,
    .wait = cpu_wait,
    .zero = perta_cpu_zero,
    .copy = perta_cpu_copy,
    .add = perta_cpu_add,
    .scale = perta_cpu_scale,
    .clamp_forward = perta_cpu_clamp_forward,
    .clamp_backward = perta_cpu_clamp_backward,
    .scale_rows = perta_cpu_scale_rows,
    .gather = perta_cpu_gather,
    .scatter = perta_cpu_scatter,
    .scatter_add = perta_cpu_scatter_add,
    .scatter_add_scaled = perta_cpu_scatter_add_scaled,
    .add_scaled = perta_cpu_add_scaled,
    .multiply_rows = perta_cpu_multiply_rows,
    .row_dots = perta_cpu_row_dots,
    .split = perta_cpu_split,
    .join = perta_cpu_join,
    .linear_forward = perta_cpu_linear_forward,
    .linear_backward = perta_cpu_linear_backward,
    .linear_backward_weight = perta_cpu_linear_backward_weight,
    .linear_backward_bias = perta_cpu_linear_backward_bias,
    .low_rank_forward = perta_cpu_low_rank_forward,
    .low_rank_backward = perta_cpu_low_rank_backward,
    .low_rank_gradient = perta_cpu_low_rank_gradient,
    .rmsnorm_forward = perta_cpu_rmsnorm_forward,
    .rmsnorm_backward = perta_cpu_rmsnorm_backward,
    .rmsnorm_backward_weight = perta_cpu_rmsnorm_backward_weight,
    .layernorm_forward = perta_cpu_layernorm_forward,
    .layernorm_backward = perta_cpu_layernorm_backward,
    .layernorm_backward_weight = perta_cpu_layernorm_backward_weight,
    .rope_forward = perta_cpu_rope_forward,
    .rope_backward = perta_cpu_rope_backward,
    .attention_forward = perta_cpu_attention_forward,
    .attention_past_forward = perta_cpu_attention_past_forward,
    .attention_backward = perta_cpu_attention_backward,
    .glu_forward = perta_cpu_glu_forward,
    .glu_backward = perta_cpu_glu_backward,
    .act_forward = perta_cpu_act_forward,
    .act_backward = perta_cpu_act_backward,
    .softcap_forward = perta_cpu_softcap_forward,
    .softcap_backward = perta_cpu_softcap_backward,
    .cross_entropy_forward = perta_cpu_cross_entropy_forward,
    .cross_entropy_backward = perta_cpu_cross_entropy_backward,
    .best_forward = perta_cpu_best_forward,
    .moments_forward = perta_cpu_moments_forward,
    .gradient = perta_cpu_gradient,
    .accumulate = perta_cpu_accumulate,
    .mean = perta_cpu_mean,
    .adamw = adamw,
    .close = cpu_close,
};

int perta_cpu_open(const struct perta_cpu_needs *needs, struct perta_workers *workers,
                   struct perta_backend **out, struct perta_err *err)
{
    struct perta_cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return perta_fail_sys(err, ENOMEM, "matrix products");
    *cpu = (struct perta_cpu){.backend.ops = &cpu_ops,
                              .needs = *needs,
                              .workers = workers,
                              .scratch_floats = scratch_floats(needs)};
    int rc = perta_gemm_open(needs->bf16, workers, cpu->scratch_floats, room_floats(needs),
                             &cpu->gemm, err);
    if (rc) {
        free(cpu);
        return rc;
    }
    pthread_mutex_init(&cpu->lock, NULL);
    *out = &cpu->backend;
    return 0;
}
