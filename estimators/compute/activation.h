/* activation.h - the nonlinear function of an MLP. */
#ifndef PERTA_ESTIMATORS_COMPUTE_ACTIVATION_H
#define PERTA_ESTIMATORS_COMPUTE_ACTIVATION_H

#include <stdbool.h>

/* f(x); sigmoid(x) = 1 / (1 + e^-x). Gradients are PyTorch's, also where f has a corner: 0 at 0 of
 * a ReLU, that of the inside at a clamp's ends. */
enum perta_activation_kind {
    PERTA_SILU,      /* x sigmoid(x) (Elfwing et al. 2017) */
    PERTA_GELU,      /* x (1 + erf(x / sqrt 2)) / 2 (Hendrycks & Gimpel 2016) */
    PERTA_GELU_TANH, /* its approximation, x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3) */
    PERTA_RELU,      /* max(x, 0) */
    PERTA_RELU2,     /* max(x, 0)^2 (So et al. 2021) */
    PERTA_QUICK_GELU, /* x sigmoid(1.702 x) */
    PERTA_SIGMOID,
    /* Only with a gate, GptOss: h = (up + 1) gate sigmoid(alpha gate), after gate is clamped from
     * above at limit, and up from both sides at -limit and limit. */
    PERTA_CLAMPED_SWIGLU,
};

struct perta_activation {
    enum perta_activation_kind kind;
    float alpha, limit; /* of PERTA_CLAMPED_SWIGLU */
};

/* Set *act to the activation that transformers (activations.py, ACT2FN) and config.json call name,
 * "silu" or "gelu_new". False if it is NULL or none of those above; *act is then as it was. */
bool perta_activation_named(const char *name, struct perta_activation *act);

#endif
