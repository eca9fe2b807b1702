#include <assert.h>
#include <math.h>

#include "estimators/compute/scalar_own.h"

/* ---- functions of a number ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* The u of PERTA_GELU_TANH. */
static double u_of(double x)
{
    return sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
}

static double value(enum perta_activation_kind kind, double x)
{
    switch (kind) {
    case PERTA_SILU:
        return x * sigmoid(x);
    case PERTA_GELU:
        return 0.5 * x * erfc(-x / sqrt(2));
    case PERTA_GELU_TANH:
        return 0.5 * x * (1 + tanh(u_of(x)));
    case PERTA_RELU:
        return x <= 0 ? 0 : x;
    case PERTA_RELU2:
        return x <= 0 ? 0 : x * x;
    case PERTA_QUICK_GELU:
        return x * sigmoid(1.702 * x);
    case PERTA_SIGMOID:
        return sigmoid(x);
    case PERTA_CLAMPED_SWIGLU:
        break;
    }
    assert(!"an activation of one number");
    return 0;
}

static double slope(enum perta_activation_kind kind, double x)
{
    double s = sigmoid(x), q = sigmoid(1.702 * x), tanh_u = tanh(u_of(x));
    switch (kind) {
    case PERTA_SILU:
        return s + x * s * (1 - s);
    case PERTA_GELU:
        return 0.5 * erfc(-x / sqrt(2)) + x * exp(-x * x / 2) / sqrt(2 * M_PI);
    case PERTA_GELU_TANH:
        return 0.5 * (1 + tanh_u) +
               0.5 * x * (1 - tanh_u * tanh_u) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
    case PERTA_RELU:
        return x <= 0 ? 0 : 1;
    case PERTA_RELU2:
        return x <= 0 ? 0 : 2 * x;
    case PERTA_QUICK_GELU:
        return q + x * q * (1 - q) * 1.702;
    case PERTA_SIGMOID:
        return s * (1 - s);
    case PERTA_CLAMPED_SWIGLU:
        break;
    }
    assert(!"an activation of one number");
    return 0;
}

/* ---- gated linear units (Shazeer 2020) ---- */

/* h, and its slopes by gate and up. */
struct unit {
    double h, by_gate, by_up;
};

static struct unit clamped_swiglu(const struct perta_activation *act, double gate, double up)
{
    double limit = (double)act->limit, alpha = (double)act->alpha;
    double g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
    double s = sigmoid(alpha * g);
    return (struct unit){(u + 1) * g * s,
                         gate > limit ? 0 : (u + 1) * (s + alpha * g * s * (1 - s)),
                         up > limit || up < -limit ? 0 : g * s};
}

static struct unit unit_of(const struct perta_activation *act, double gate, double up)
{
    if (act->kind == PERTA_CLAMPED_SWIGLU)
        return clamped_swiglu(act, gate, up);
    double f = value(act->kind, gate);
    return (struct unit){f * up, slope(act->kind, gate) * up, f};
}

void perta_scalar_glu_forward(struct perta_backend *be, const struct perta_activation *act,
                              struct perta_array h, struct perta_array gate, struct perta_array up,
                              size_t n)
{
    float *hs = perta_scalar_floats(be, h, n);
    const float *gates = perta_scalar_floats(be, gate, n), *ups = perta_scalar_floats(be, up, n);
    for (size_t i = 0; !be->rc && i < n; i++)
        hs[i] = (float)unit_of(act, (double)gates[i], (double)ups[i]).h;
}

void perta_scalar_glu_backward(struct perta_backend *be, const struct perta_activation *act,
                               struct perta_array dgate, struct perta_array dup,
                               struct perta_array dh, struct perta_array gate,
                               struct perta_array up, size_t n)
{
    float *dgates = perta_scalar_floats(be, dgate, n), *dups = perta_scalar_floats(be, dup, n);
    const float *dhs = perta_scalar_floats(be, dh, n), *gates = perta_scalar_floats(be, gate, n);
    const float *ups = perta_scalar_floats(be, up, n);
    for (size_t i = 0; !be->rc && i < n; i++) {
        struct unit unit = unit_of(act, (double)gates[i], (double)ups[i]);
        double d = (double)dhs[i];
        dgates[i] = (float)(d * unit.by_gate);
        dups[i] = (float)(d * unit.by_up);
    }
}

/* ---- without a gate ---- */

void perta_scalar_act_forward(struct perta_backend *be, const struct perta_activation *act,
                              struct perta_array h, struct perta_array x, size_t n)
{
    float *hs = perta_scalar_floats(be, h, n);
    const float *xs = perta_scalar_floats(be, x, n);
    for (size_t i = 0; !be->rc && i < n; i++)
        hs[i] = (float)value(act->kind, (double)xs[i]);
}

void perta_scalar_act_backward(struct perta_backend *be, const struct perta_activation *act,
                               struct perta_array dx, struct perta_array dh, struct perta_array x,
                               size_t n)
{
    float *dxs = perta_scalar_floats(be, dx, n);
    const float *dhs = perta_scalar_floats(be, dh, n), *xs = perta_scalar_floats(be, x, n);
    for (size_t i = 0; !be->rc && i < n; i++)
        dxs[i] = (float)((double)dhs[i] * slope(act->kind, (double)xs[i]));
}
