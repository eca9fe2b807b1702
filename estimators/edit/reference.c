/* The scalar reference. It computes in float64 and, unless the model is F64, rounds to float32
 * after each operation. For + - * / and square root this gives exactly the bits of float32
 * arithmetic, because float64 has more than twice the digits and two more (Figueroa 1995); and it
 * shares no code with the kernels. */
#include <math.h>
#include <string.h>

#include "estimators/edit/edit.h"
#include "estimators/edit/kernels.h"
#include "estimators/edit/pow.h"
#include "io/fpenv.h"

static double rounded(bool wide, double x)
{
    return wide ? x : (double)(float)x;
}

static double element(const struct perta_view *view, uint64_t i, bool wide)
{
    const char *at = (const char *)view->data + i * (perta_dtype_bits(view->dtype) / 8);
    uint16_t half;
    float single;
    double full;
    switch (view->dtype) {
    case PERTA_F16:
        memcpy(&half, at, sizeof half);
        return (double)perta_f32_from_f16(half);
    case PERTA_BF16:
        memcpy(&half, at, sizeof half);
        return (double)perta_f32_from_bf16(half);
    case PERTA_F32:
        memcpy(&single, at, sizeof single);
        return (double)single;
    default:
        memcpy(&full, at, sizeof full);
        return rounded(wide, full);
    }
}

/* r^p, or its equivalent from mean squares; x is |g_r| / |g_f|, or s_r / s_f. */
static double raised(const struct perta_rule *rule, bool wide, double x)
{
    bool squares = rule->stat == PERTA_STAT_MEANSQ;
    if (rule->method == PERTA_GRAD)
        return squares ? rounded(wide, sqrt(x)) : x;
    if (rule->method == PERTA_FISHER)
        return squares ? x : rounded(wide, x * x);
    return rounded(wide, perta_pow(x, squares ? rule->power / 2 : rule->power));
}

static double weight(const struct perta_rule *rule, const struct perta_edit_in *in, uint64_t i,
                     bool wide, const double *x)
{
    switch (rule->method) {
    case PERTA_TV:
        return 1;
    case PERTA_CONSTANT:
        return rounded(wide, rule->weight);
    case PERTA_RANDOM:
        return (double)perta_random_weight(rule->seed ^ in->name_hash, in->first_elem + i);
    case PERTA_SCALE:
        return x[PERTA_IN_SCALE];
    default:
        break;
    }
    double f = fabs(x[PERTA_IN_FORGET]), r = fabs(x[PERTA_IN_RETAIN]);
    if (f == 0)
        return 0;
    double rp = raised(rule, wide, rounded(wide, r / f));
    return rounded(wide, 1 / rounded(wide, 1 + rp));
}

/* The first operand that holds a bad number, or PERTA_IN_RESULT if all are good. */
static enum perta_operand first_bad(const struct perta_rule *rule, const double *x)
{
    bool squares = rule->stat == PERTA_STAT_MEANSQ;
    bool importance = perta_rule_needs_importance(rule);
    for (int o = PERTA_IN_MODEL; o <= (importance ? PERTA_IN_RETAIN : PERTA_IN_BASE); o++) {
        bool negative = o >= PERTA_IN_FORGET && squares && x[o] < 0;
        if (!isfinite(x[o]) || negative)
            return (enum perta_operand)o;
    }
    if (rule->method == PERTA_SCALE && !(isfinite(x[PERTA_IN_SCALE]) && x[PERTA_IN_SCALE] >= 0))
        return PERTA_IN_SCALE;
    return PERTA_IN_RESULT;
}

/* Round x to dtype and store it at out. Returns true if the result is finite. */
static bool store(enum perta_dtype dtype, double x, void *out)
{
    float single = (float)x;
    uint16_t half;
    switch (dtype) {
    case PERTA_F16:
        half = perta_f16_from_f32(single);
        memcpy(out, &half, sizeof half);
        return (half & 0x7c00) != 0x7c00;
    case PERTA_BF16:
        half = perta_bf16_from_f32(single);
        memcpy(out, &half, sizeof half);
        return (half & 0x7f80) != 0x7f80;
    case PERTA_F32:
        memcpy(out, &single, sizeof single);
        return isfinite(single);
    default:
        memcpy(out, &x, sizeof x);
        return isfinite(x);
    }
}

/* Edit element i, and add its weight to *lane. */
static void edit_element(const struct perta_rule *rule, const struct perta_edit_in *in, uint64_t i,
                         double alpha, void *out, struct perta_edit_counts *c, double *lane)
{
    bool wide = in->model.dtype == PERTA_F64;
    bool importance = perta_rule_needs_importance(rule);
    size_t width = perta_dtype_bits(in->model.dtype) / 8;
    const char *was = (const char *)in->model.data + i * width;
    char *is = (char *)out + i * width;
    double x[PERTA_IN_RESULT] = {
        element(&in->model, i, wide),
        element(&in->tuned, i, wide),
        in->base.data ? element(&in->base, i, wide) : 0,
        importance ? element(&in->forget, i, wide) : 0,
        importance ? element(&in->retain, i, wide) : 0,
        rule->method == PERTA_SCALE ? element(&in->scale, i, wide) : 0,
    };
    double w = weight(rule, in, i, wide, x);
    c->n_zero_forget += importance && x[PERTA_IN_FORGET] == 0;
    c->n_zero_retain += importance && x[PERTA_IN_RETAIN] == 0;
    double tau = rounded(wide, x[PERTA_IN_TUNED] - x[PERTA_IN_BASE]);
    double step = rounded(wide, rounded(wide, alpha * w) * tau);
    enum perta_operand bad = first_bad(rule, x);
    bool finite = store(in->model.dtype, rounded(wide, x[PERTA_IN_MODEL] - step), is);
    if (bad != PERTA_IN_RESULT || (step != 0 && !finite)) {
        memcpy(is, was, width);
        if (c->n_nonfinite++ == 0) {
            c->bad_elem = i;
            c->bad_operand = bad;
        }
        return;
    }
    if (step == 0)
        memcpy(is, was, width);
    bool changed = memcmp(is, was, width) != 0;
    c->n_changed += changed;
    c->n_rounded_away += step != 0 && !changed;
    *lane += w;
    int bin = PERTA_WEIGHT_BINS - 1;
    while (bin > 0 && w < rounded(wide, (double)bin / PERTA_WEIGHT_BINS))
        bin--;
    c->weights[bin]++;
}

void perta_edit_reference(const struct perta_rule *rule, const struct perta_edit_in *in,
                          const float *alphas, uint32_t n_alphas, void *const *outs,
                          struct perta_edit_counts *counts)
{
    PERTA_FP_SCOPE;
    memset(counts, 0, n_alphas * sizeof *counts);
    for (uint32_t a = 0; a < n_alphas; a++)
        for (uint64_t first = 0; first < in->n; first += PERTA_TILE) {
            double lanes[PERTA_SUM_LANES] = {0}, sum = 0;
            for (uint64_t i = first; i < in->n && i < first + PERTA_TILE; i++)
                edit_element(rule, in, i, (double)alphas[a], outs[a], &counts[a],
                             &lanes[i % PERTA_SUM_LANES]);
            for (int j = 0; j < PERTA_SUM_LANES; j++)
                sum += lanes[j];
            counts[a].sum_weight += sum;
        }
}

void perta_lora_tau_reference(const struct perta_lora *lora, uint64_t first_elem, uint64_t n,
                              float *tau)
{
    PERTA_FP_SCOPE;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t row = (first_elem + i) / lora->width - lora->first_row;
        uint64_t column = (first_elem + i) % lora->width;
        float sum = 0;
        for (uint64_t k = 0; k < lora->r; k++) {
            float product = lora->rows[row * lora->r + k] * lora->columns[k * lora->width + column];
            sum = sum + product;
        }
        tau[i] = lora->scaling * sum;
    }
}
