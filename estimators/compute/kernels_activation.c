/* Activations and gated linear units. Compiled once for each instruction set, see io/isa.h. A loop
 * is written once, and inlined with the function that it applies, so that both are vectorised. */
#if defined(__GNUC__) && !defined(__clang__)
/* Neither errno nor exception flags are read here. These options change no value, and let loops
 * vectorise. */
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include "estimators/compute/kernels.h"

#include "estimators/compute/exponential.h"
#include "io/format/convert.h"
#include "io/isa.h"

#define INLINED static inline __attribute__((always_inline))

/* ---- functions of a number: a value, and the slope there ---- */

struct point {
    float value, slope;
};

/* x s, s = sigmoid(c), from e^-c and the slope of c. */
INLINED struct point gated_by_sigmoid(float x, float exponential, float slope)
{
    float s = 1 / (1 + exponential);
    return (struct point){x / (1 + exponential), s + x * s * (1 - s) * slope};
}

INLINED struct point silu(float x)
{
    return gated_by_sigmoid(x, perta_exponential(-x), 1);
}

INLINED struct point quick_gelu(float x)
{
    return gated_by_sigmoid(x, perta_exponential(-1.702f * x), 1.702f);
}

/* (1 + tanh(u)) / 2 = sigmoid(2 u) */
INLINED struct point gelu_tanh(float x)
{
    const float twice = 1.5957691216057308f, cubic = 0.044715f; /* 2 sqrt(2 / pi) */
    return gated_by_sigmoid(x, perta_exponential(-twice * (x + cubic * (x * x * x))),
                            twice * (1 + 3 * cubic * (x * x)));
}

INLINED struct point sigmoid(float x)
{
    float s = 1 / (1 + perta_exponential(-x));
    return (struct point){s, s * (1 - s)};
}

INLINED struct point relu(float x)
{
    return (struct point){x <= 0 ? 0 : x, x <= 0 ? 0.0f : 1.0f}; /* NaN stays NaN */
}

INLINED struct point relu2(float x)
{
    float r = x <= 0 ? 0 : x;
    return (struct point){r * r, 2 * r};
}

/* 1 - erf(t) for t from 0, within 2^-23. Near 0 a polynomial in t^2 for erf, further away e to the
 * power of a polynomial in t; minimax, coefficients of N. Juffa's erff. */
INLINED float complement(float t)
{
    float s = t * t;
    float near = -5.96761703e-4f;
    near = near * s + 4.99119423e-3f;
    near = near * s - 2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s - 3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    near = near * t + t;
    float far = -1.72853470e-5f * t + 3.83197126e-4f;
    far = far * s + (-3.88396438e-3f * t + 2.42546219e-2f);
    far = far * t - 1.06777877e-1f;
    far = far * t - 6.34846687e-1f;
    far = far * t - 1.28717512e-1f;
    far = far * t - t;
    float e = perta_exponential(far);
    return t > 0.927734375f ? e : 1 - near;
}

/* x P, P the normal distribution's; its slope is P + x e^(-x^2 / 2) / sqrt(2 pi). */
INLINED struct point gelu(float x)
{
    float tail = 0.5f * complement((x < 0 ? -x : x) * 0.70710678118654752f);
    float p = x < 0 ? tail : 1 - tail;
    float density = 0.39894228040143268f * perta_exponential(-0.5f * (x * x));
    return (struct point){x * p, p + x * density};
}

/* ---- loops over them ---- */

typedef struct point point_of(float x);

INLINED void each(point_of *f, float *restrict h, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h[i] = f(x[i]).value;
}

INLINED void each_backward(point_of *f, float *dx, const float *dh, const float *restrict x,
                           size_t n)
{
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep /* dx is dh itself, or does not overlap it */
#endif
    for (size_t i = 0; i < n; i++)
        dx[i] = dh[i] * f(x[i]).slope;
}

INLINED void gated(point_of *f, float *restrict h, const float *restrict gate,
                   const float *restrict up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h[i] = f(gate[i]).value * up[i];
}

INLINED void gated_backward(point_of *f, float *dgate, float *restrict dup, const float *dh,
                            const float *restrict gate, const float *restrict up, size_t n)
{
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep /* dgate is dh itself, or does not overlap it */
#endif
    for (size_t i = 0; i < n; i++) {
        struct point at = f(gate[i]);
        float d = dh[i];
        dgate[i] = d * up[i] * at.slope;
        dup[i] = d * at.value;
    }
}

/* ---- gated linear units of their own ---- */

/* SwiGLU (Shazeer 2020), in this order of operations. */
static void swiglu_backward(const struct perta_activation *act, float *dgate, float *restrict dup,
                            const float *dh, const float *restrict gate, const float *restrict up,
                            size_t n)
{
    (void)act;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep /* dgate is dh itself, or does not overlap it */
#endif
    for (size_t i = 0; i < n; i++) {
        float g = gate[i], d = dh[i];
        float sigmoid = 1 / (1 + perta_exponential(-g));
        dgate[i] = d * up[i] * sigmoid * (1 + g * (1 - sigmoid));
        dup[i] = d * g * sigmoid;
    }
}

static void clamped_swiglu(const struct perta_activation *act, float *restrict h,
                           const float *restrict gate, const float *restrict up, size_t n)
{
    const float alpha = act->alpha, limit = act->limit;
    for (size_t i = 0; i < n; i++) {
        float g = gate[i] > limit ? limit : gate[i];
        float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        h[i] = (u + 1) * (g / (1 + perta_exponential(-alpha * g)));
    }
}

static void clamped_swiglu_backward(const struct perta_activation *act, float *dgate,
                                    float *restrict dup, const float *dh,
                                    const float *restrict gate, const float *restrict up, size_t n)
{
    const float alpha = act->alpha, limit = act->limit;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep /* dgate is dh itself, or does not overlap it */
#endif
    for (size_t i = 0; i < n; i++) {
        float g = gate[i] > limit ? limit : gate[i], d = dh[i];
        float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        struct point at = gated_by_sigmoid(g, perta_exponential(-alpha * g), alpha);
        float by_gate = d * (u + 1) * at.slope, by_up = d * at.value;
        dgate[i] = gate[i] > limit ? 0 : by_gate;
        dup[i] = up[i] > limit || up[i] < -limit ? 0 : by_up;
    }
}

/* ---- by kind ---- */

/* The loops, with f inlined. */
#define LOOPS_OF(f)                                                                      \
    static void f##_glu(const struct perta_activation *act, float *h, const float *gate, \
                        const float *up, size_t n)                                       \
    {                                                                                    \
        (void)act;                                                                       \
        gated(f, h, gate, up, n);                                                        \
    }                                                                                    \
    static void f##_each(float *h, const float *x, size_t n)                             \
    {                                                                                    \
        each(f, h, x, n);                                                                \
    }                                                                                    \
    static void f##_each_backward(float *dx, const float *dh, const float *x, size_t n)  \
    {                                                                                    \
        each_backward(f, dx, dh, x, n);                                                  \
    }
LOOPS_OF(silu)
LOOPS_OF(gelu)
LOOPS_OF(gelu_tanh)
LOOPS_OF(relu)
LOOPS_OF(relu2)
LOOPS_OF(quick_gelu)
LOOPS_OF(sigmoid)

#define GLU_BACKWARD_OF(f)                                                                      \
    static void f##_glu_backward(const struct perta_activation *act, float *dgate, float *dup,  \
                                 const float *dh, const float *gate, const float *up, size_t n) \
    {                                                                                           \
        (void)act;                                                                              \
        gated_backward(f, dgate, dup, dh, gate, up, n);                                         \
    }
GLU_BACKWARD_OF(gelu)
GLU_BACKWARD_OF(gelu_tanh)
GLU_BACKWARD_OF(relu)
GLU_BACKWARD_OF(relu2)
GLU_BACKWARD_OF(quick_gelu)
GLU_BACKWARD_OF(sigmoid)

const struct perta_activation_kernels PERTA_ISA_NAME(perta_activation_kernels)[] = {
    [PERTA_SILU] = {silu_glu, swiglu_backward, silu_each, silu_each_backward},
    [PERTA_GELU] = {gelu_glu, gelu_glu_backward, gelu_each, gelu_each_backward},
    [PERTA_GELU_TANH] = {gelu_tanh_glu, gelu_tanh_glu_backward, gelu_tanh_each,
                         gelu_tanh_each_backward},
    [PERTA_RELU] = {relu_glu, relu_glu_backward, relu_each, relu_each_backward},
    [PERTA_RELU2] = {relu2_glu, relu2_glu_backward, relu2_each, relu2_each_backward},
    [PERTA_QUICK_GELU] = {quick_gelu_glu, quick_gelu_glu_backward, quick_gelu_each,
                          quick_gelu_each_backward},
    [PERTA_SIGMOID] = {sigmoid_glu, sigmoid_glu_backward, sigmoid_each, sigmoid_each_backward},
    [PERTA_CLAMPED_SWIGLU] = {clamped_swiglu, clamped_swiglu_backward, NULL, NULL},
};
