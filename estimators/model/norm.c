/* RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016), and what a layer does with any
 * norm. */
#include "estimators/model/part.h"

/* ---- RMSNorm ---- */

static void rmsnorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                            struct perta_array y, struct perta_array rstd, struct perta_array x,
                            size_t T, size_t H)
{
    be->ops->rmsnorm_forward(be, norm, y, rstd, x, T, H);
}

static void rmsnorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                             struct perta_array dx, struct perta_array dy, struct perta_array x,
                             struct perta_array rstd, size_t T, size_t H)
{
    be->ops->rmsnorm_backward(be, norm, dx, dy, x, rstd, T, H);
}

static void rmsnorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                    struct perta_array dweight, struct perta_array dbias,
                                    struct perta_array dy, struct perta_array x,
                                    struct perta_array rstd, size_t T, size_t H)
{
    (void)dbias; /* RMSNorm has no bias */
    be->ops->rmsnorm_backward_weight(be, norm, dweight, dy, x, rstd, T, H);
}

const struct perta_norm_part perta_rmsnorm_part = {1, rmsnorm_forward, rmsnorm_backward,
                                                   rmsnorm_backward_weight};

/* ---- LayerNorm ---- */

static void layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                              struct perta_array y, struct perta_array stats, struct perta_array x,
                              size_t T, size_t H)
{
    be->ops->layernorm_forward(be, norm, y, stats, x, T, H);
}

static void layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                               struct perta_array dx, struct perta_array dy, struct perta_array x,
                               struct perta_array stats, size_t T, size_t H)
{
    be->ops->layernorm_backward(be, norm, dx, dy, x, stats, T, H);
}

static void layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                      struct perta_array dweight, struct perta_array dbias,
                                      struct perta_array dy, struct perta_array x,
                                      struct perta_array stats, size_t T, size_t H)
{
    be->ops->layernorm_backward_weight(be, norm, dweight, dbias, dy, x, stats, T, H);
}

const struct perta_norm_part perta_layernorm_part = {2, layernorm_forward, layernorm_backward,
                                                     layernorm_backward_weight};

/* ---- a layer's norm ---- */

bool perta_layer_has_norm(const struct perta_layer *l, enum perta_param param)
{
    bool bare = l->llm->family->bare_norms && (param == PERTA_NORM_1 || param == PERTA_NORM_2);
    return bare || perta_llm_param(l->llm, l->site.layer, param);
}

struct perta_norm perta_layer_norm(const struct perta_layer *l, enum perta_param param)
{
    const struct perta_param_row *row = perta_llm_param(l->llm, l->site.layer, param);
    size_t out, in = 0;
    if (row)
        perta_llm_shape(l->llm, row, &out, &in);
    return (struct perta_norm){
        .weight = perta_layer_vector(l, param),
        .bias = perta_layer_vector(l, param + 1),
        .eps = l->llm->norm_eps,
        .plus = l->llm->norm_plus,
        .n_weights = row && perta_is_by_head(row) ? in / l->llm->head_dim : 1,
    };
}

static void to_sink(const struct perta_layer *l, enum perta_param param, size_t sequence,
                    struct perta_array d)
{
    struct perta_err err = {0};
    if (!l->be->rc)
        perta_backend_fail(l->be, l->sink->vector(l->sink, l->site, param, sequence, d, &err),
                           &err);
}

void perta_layer_norm_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                               enum perta_param param, struct perta_array dy, struct perta_array x,
                               struct perta_array rstd, size_t rows, size_t H,
                               struct perta_array vector)
{
    const struct perta_runs *s = &batch->sequences;
    const struct perta_norm_part *part = l->llm->family->norm;
    struct perta_norm norm = perta_layer_norm(l, param);
    bool has_weight = perta_array_is(norm.weight), has_bias = perta_array_is(norm.bias);
    size_t width = norm.n_weights * H;
    struct perta_array bias = has_bias ? perta_array_at(vector, width) : (struct perta_array){0};
    for (size_t i = 0; has_weight && l->sink && l->sink->vector && i < s->n; i++) {
        size_t t = (s->starts[i] - s->origin) * rows;
        size_t n = (s->starts[i + 1] - s->starts[i]) * rows;
        l->be->ops->zero(l->be, vector, has_bias ? 2 * width : width);
        part->backward_weight(l->be, &norm, vector, bias, perta_array_at(dy, t * H),
                              perta_array_at(x, t * H), perta_array_at(rstd, t * part->stats), n,
                              H);
        to_sink(l, param, i, vector);
        if (has_bias)
            to_sink(l, param + 1, i, bias);
    }
}
