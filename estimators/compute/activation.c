#include "estimators/compute/activation.h"

#include <stddef.h>
#include <string.h>

/* Those of one kind differ only in the order of operations. */
static const struct {
    const char *name;
    enum perta_activation_kind kind;
} names[] = {
    {"silu", PERTA_SILU},
    {"swish", PERTA_SILU},
    {"gelu", PERTA_GELU},
    {"gelu_python", PERTA_GELU},
    {"gelu_pytorch_tanh", PERTA_GELU_TANH},
    {"gelu_python_tanh", PERTA_GELU_TANH},
    {"gelu_new", PERTA_GELU_TANH},
    {"gelu_fast", PERTA_GELU_TANH},
    {"gelu_accurate", PERTA_GELU_TANH},
    {"relu", PERTA_RELU},
    {"relu2", PERTA_RELU2},
    {"quick_gelu", PERTA_QUICK_GELU},
    {"sigmoid", PERTA_SIGMOID},
};

bool perta_activation_named(const char *name, struct perta_activation *act)
{
    for (size_t i = 0; name && i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i].name)) {
            *act = (struct perta_activation){.kind = names[i].kind};
            return true;
        }
    return false;
}
