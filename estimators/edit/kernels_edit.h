/* kernels_edit.h - the edit in one floating-point type. kernels.c includes it twice, with real
 * defined as float and as double; therefore it has no include guard. */

/* One tile, widened to real. The padding keeps the arrays from sharing cache sets. */
struct REAL(tile) {
    real model[PERTA_TILE + 16], tuned[PERTA_TILE + 16], base[PERTA_TILE + 16];
    real forget[PERTA_TILE + 16], retain[PERTA_TILE + 16];
    real weight[PERTA_TILE + 16];
};

/* dst (n) = elements first.. of view, converted. */
static void REAL(load)(const struct perta_view *view, uint64_t first, size_t n, real *restrict dst)
{
    const u16_any *u16 = (const u16_any *)view->data + first;
    const f32_any *f32 = (const f32_any *)view->data + first;
    const f64_any *f64 = (const f64_any *)view->data + first;
    switch (view->dtype) {
    case PERTA_F16:
        for (size_t i = 0; i < n; i++)
            dst[i] = (real)perta_f32_from_f16(u16[i]);
        break;
    case PERTA_BF16:
        for (size_t i = 0; i < n; i++)
            dst[i] = (real)perta_f32_from_bf16(u16[i]);
        break;
    case PERTA_F32:
        for (size_t i = 0; i < n; i++)
            dst[i] = (real)f32[i];
        break;
    default:
        for (size_t i = 0; i < n; i++)
            dst[i] = (real)f64[i];
        break;
    }
}

static bool REAL(is_bad)(real x, bool refuse_negative)
{
    return (REAL_BITS(x) & REAL_EXPONENT) == REAL_EXPONENT || (refuse_negative && x < 0);
}

static bool REAL(any_bad)(const real *x, size_t n, bool refuse_negative)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (REAL_BITS(x[i]) & REAL_EXPONENT) == REAL_EXPONENT;
    for (size_t i = 0; refuse_negative && i < n; i++)
        bad |= x[i] < 0;
    return bad != 0;
}

/* Returns true if the tile holds a number that cannot be used: NaN, Inf or a negative mean
 * square. */
static bool REAL(load_tile)(const struct perta_rule *rule, const struct perta_edit_in *in,
                            uint64_t first, size_t n, struct REAL(tile) * t)
{
    REAL(load)(&in->model, first, n, t->model);
    REAL(load)(&in->tuned, first, n, t->tuned);
    if (in->base.data)
        REAL(load)(&in->base, first, n, t->base);
    else
        memset(t->base, 0, n * sizeof(real)); /* then tuned is the task vector itself */
    bool bad = REAL(any_bad)(t->model, n, false);
    bad |= REAL(any_bad)(t->tuned, n, false);
    bad |= REAL(any_bad)(t->base, n, false);
    if (rule->method == PERTA_SCALE) {
        REAL(load)(&in->scale, first, n, t->weight);
        bad |= REAL(any_bad)(t->weight, n, true);
    }
    if (!perta_rule_needs_importance(rule))
        return bad;
    bool squares = rule->stat == PERTA_STAT_MEANSQ;
    REAL(load)(&in->forget, first, n, t->forget);
    REAL(load)(&in->retain, first, n, t->retain);
    bad |= REAL(any_bad)(t->forget, n, squares);
    bad |= REAL(any_bad)(t->retain, n, squares);
    return bad;
}

/* w = 1 / (1 + x), x = EXPR of r = |retain| / |forget|; 0 where forget is 0. */
#define WEIGH(name, expr)                                               \
    static void REAL(name)(struct REAL(tile) * t, size_t n, double p)   \
    {                                                                   \
        (void)p;                                                        \
        for (size_t i = 0; i < n; i++) {                                \
            real r = REAL_FABS(t->retain[i]) / REAL_FABS(t->forget[i]); \
            real w = 1 / (1 + (expr));                                  \
            t->weight[i] = t->forget[i] == 0 ? 0 : w;                   \
        }                                                               \
    }
WEIGH(weigh_plain, r)
WEIGH(weigh_square, r *r)
WEIGH(weigh_root, REAL_SQRT(r))
WEIGH(weigh_power, (real)perta_pow((double)r, p))
#undef WEIGH

static void REAL(weigh_random)(const struct perta_rule *rule, const struct perta_edit_in *in,
                               uint64_t first, size_t n, struct REAL(tile) * t)
{
    uint64_t state = rule->seed ^ in->name_hash;
    for (size_t i = 0; i < n; i++)
        t->weight[i] = (real)perta_random_weight(state, in->first_elem + first + i);
}

static void REAL(weigh)(const struct perta_rule *rule, const struct perta_edit_in *in,
                        uint64_t first, size_t n, struct REAL(tile) * t)
{
    bool squares = rule->stat == PERTA_STAT_MEANSQ;
    real same = rule->method == PERTA_TV ? 1 : (real)rule->weight;
    switch (rule->method) {
    case PERTA_GRAD:
        (squares ? REAL(weigh_root) : REAL(weigh_plain))(t, n, 1);
        break;
    case PERTA_FISHER:
        (squares ? REAL(weigh_plain) : REAL(weigh_square))(t, n, 2);
        break;
    case PERTA_POWER:
        REAL(weigh_power)(t, n, squares ? rule->power / 2 : rule->power);
        break;
    case PERTA_RANDOM:
        REAL(weigh_random)(rule, in, first, n, t);
        break;
    case PERTA_SCALE: /* load_tile() has loaded the weights */
        break;
    default:
        for (size_t i = 0; i < n; i++)
            t->weight[i] = same;
        break;
    }
}

/* Sum of the n weights. Sets the elements after them to zero, up to a whole number of lanes. */
static double REAL(sum_weights)(real *w, size_t n)
{
    double lanes[PERTA_SUM_LANES] = {0}, sum = 0;
    for (size_t i = n; i % PERTA_SUM_LANES; i++)
        w[i] = 0;
    for (size_t i = 0; i < n; i += PERTA_SUM_LANES)
        for (size_t j = 0; j < PERTA_SUM_LANES; j++)
            lanes[j] += (double)w[i + j];
    for (size_t j = 0; j < PERTA_SUM_LANES; j++)
        sum += lanes[j];
    return sum;
}

static uint32_t REAL(count_zeros)(const real *x, size_t n)
{
    uint32_t zeros = 0;
    for (size_t i = 0; i < n; i++)
        zeros += x[i] == 0;
    return zeros;
}

static real REAL(bin_edge)(int bin)
{
    return (real)bin / (real)PERTA_WEIGHT_BINS;
}

/* bins (PERTA_WEIGHT_BINS) = the histogram of the n weights; n is at most PERTA_TILE. */
static void REAL(count_weights)(const real *w, size_t n, uint32_t *bins)
{
    uint32_t above = 0; /* weights in the bins above this one */
    for (int bin = PERTA_WEIGHT_BINS - 1; bin >= 0; bin--) {
        uint32_t reach = 0;
        real edge = REAL(bin_edge)(bin);
        for (size_t i = 0; i < n; i++)
            reach += w[i] >= edge;
        bins[bin] = reach - above;
        above = reach;
    }
}

/* Edit one tile into one dtype. Counts the elements whose bits change, and those whose step is lost
 * to rounding. Returns true if a result is not finite. */
#define FINISH(name, uint, any, round, exponent)                                              \
    static bool REAL(name)(const struct REAL(tile) * t, real alpha, size_t n,                 \
                           const any *restrict model, any *restrict out, uint32_t *n_changed, \
                           uint32_t *n_away)                                                  \
    {                                                                                         \
        uint32_t n_bad = 0, n_differ = 0, n_step = 0;                                         \
        for (size_t i = 0; i < n; i++) {                                                      \
            real step = (alpha * t->weight[i]) * (t->tuned[i] - t->base[i]);                  \
            uint was = model[i], is = round(t->model[i] - step);                              \
            is = step == 0 ? was : is;                                                        \
            out[i] = is;                                                                      \
            n_step += step != 0;                                                              \
            n_differ += is != was;                                                            \
            n_bad += (is & (exponent)) == (exponent);                                         \
        }                                                                                     \
        *n_changed = n_differ;                                                                \
        *n_away = n_step - n_differ;                                                          \
        return n_bad != 0;                                                                    \
    }
#ifdef REAL_IS_F64
FINISH(finish_f64, uint64_t, u64_any, perta_f64_bits, REAL_EXPONENT)
#else
FINISH(finish_f16, uint16_t, u16_any, perta_f16_from_f32, 0x7c00)
FINISH(finish_bf16, uint16_t, u16_any, perta_bf16_from_f32, 0x7f80)
FINISH(finish_f32, uint32_t, u32_any, perta_f32_bits, REAL_EXPONENT)
#endif
#undef FINISH

static bool REAL(finish)(const struct REAL(tile) * t, enum perta_dtype dtype, real alpha, size_t n,
                         const void *model, void *out, uint32_t *n_changed, uint32_t *n_away)
{
#ifdef REAL_IS_F64
    (void)dtype;
    return REAL(finish_f64)(t, alpha, n, model, out, n_changed, n_away);
#else
    if (dtype == PERTA_F16)
        return REAL(finish_f16)(t, alpha, n, model, out, n_changed, n_away);
    if (dtype == PERTA_BF16)
        return REAL(finish_bf16)(t, alpha, n, model, out, n_changed, n_away);
    return REAL(finish_f32)(t, alpha, n, model, out, n_changed, n_away);
#endif
}

static enum perta_operand REAL(bad_operand)(const struct perta_rule *rule,
                                            const struct REAL(tile) * t, real result, size_t i)
{
    bool squares = rule->stat == PERTA_STAT_MEANSQ;
    if (REAL(is_bad)(t->model[i], false))
        return PERTA_IN_MODEL;
    if (REAL(is_bad)(t->tuned[i], false))
        return PERTA_IN_TUNED;
    if (REAL(is_bad)(t->base[i], false))
        return PERTA_IN_BASE;
    if (perta_rule_needs_importance(rule) && REAL(is_bad)(t->forget[i], squares))
        return PERTA_IN_FORGET;
    if (perta_rule_needs_importance(rule) && REAL(is_bad)(t->retain[i], squares))
        return PERTA_IN_RETAIN;
    if (rule->method == PERTA_SCALE && REAL(is_bad)(t->weight[i], true))
        return PERTA_IN_SCALE;
    return REAL(is_bad)(result, false) ? PERTA_IN_RESULT : PERTA_N_OPERANDS;
}

/* The slow path, for a finished tile that holds a number that is not finite: restores the model's
 * bits there, and counts the whole tile again. */
static void REAL(settle)(const struct perta_rule *rule, const struct REAL(tile) * t,
                         enum perta_dtype dtype, real alpha, uint64_t first, size_t n,
                         const char *model, char *out, struct perta_edit_counts *c)
{
    const struct perta_view done = {dtype, out};
    size_t width = width_bytes(dtype);
    double lanes[PERTA_SUM_LANES] = {0}, sum = 0;
    uint32_t bins[PERTA_WEIGHT_BINS];
    for (size_t i = 0; i < n; i++) {
        real result;
        REAL(load)(&done, i, 1, &result);
        enum perta_operand operand = REAL(bad_operand)(rule, t, result, i);
        if (operand != PERTA_N_OPERANDS) {
            memcpy(out + i * width, model + i * width, width);
            if (c->n_nonfinite++ == 0) {
                c->bad_elem = first + i;
                c->bad_operand = operand;
            }
            continue;
        }
        real step = (alpha * t->weight[i]) * (t->tuned[i] - t->base[i]);
        bool changed = memcmp(out + i * width, model + i * width, width) != 0;
        c->n_changed += changed;
        c->n_rounded_away += step != 0 && !changed;
        lanes[i % PERTA_SUM_LANES] += (double)t->weight[i];
        REAL(count_weights)(&t->weight[i], 1, bins);
        for (int j = 0; j < PERTA_WEIGHT_BINS; j++)
            c->weights[j] += bins[j];
    }
    for (size_t j = 0; j < PERTA_SUM_LANES; j++)
        sum += lanes[j];
    c->sum_weight += sum;
}

static void REAL(edit)(const struct perta_rule *rule, const struct perta_edit_in *in,
                       const float *alphas, uint32_t n_alphas, void *const *outs,
                       struct perta_edit_counts *counts)
{
    struct REAL(tile) t;
    enum perta_dtype dtype = in->model.dtype;
    memset(counts, 0, n_alphas * sizeof *counts);
    for (uint64_t first = 0; first < in->n; first += PERTA_TILE) {
        uint64_t left = in->n - first;
        size_t n = left < PERTA_TILE ? (size_t)left : PERTA_TILE;
        const char *model = (const char *)in->model.data + first * width_bytes(dtype);
        bool bad_inputs = REAL(load_tile)(rule, in, first, n, &t);
        REAL(weigh)(rule, in, first, n, &t);
        double sum = REAL(sum_weights)(t.weight, n);
        uint32_t bins[PERTA_WEIGHT_BINS];
        REAL(count_weights)(t.weight, n, bins);
        bool importance = perta_rule_needs_importance(rule);
        uint32_t zero_forget = importance ? REAL(count_zeros)(t.forget, n) : 0;
        uint32_t zero_retain = importance ? REAL(count_zeros)(t.retain, n) : 0;
        for (uint32_t a = 0; a < n_alphas; a++) {
            struct perta_edit_counts *c = &counts[a];
            c->n_zero_forget += zero_forget;
            c->n_zero_retain += zero_retain;
            char *out = (char *)outs[a] + first * width_bytes(dtype);
            real alpha = (real)alphas[a];
            uint32_t n_changed, n_away;
            bool bad = REAL(finish)(&t, dtype, alpha, n, model, out, &n_changed, &n_away);
            if (bad || bad_inputs) {
                REAL(settle)(rule, &t, dtype, alpha, first, n, model, out, c);
                continue;
            }
            c->n_changed += n_changed;
            c->n_rounded_away += n_away;
            c->sum_weight += sum;
            for (int j = 0; j < PERTA_WEIGHT_BINS; j++)
                c->weights[j] += bins[j];
        }
    }
}
