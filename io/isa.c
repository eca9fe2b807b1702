#include "io/isa.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[PERTA_N_ISAS] = {"v2", "v3", "v4"};
static enum perta_isa best, chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void look_up(void)
{
    __builtin_cpu_init();
    best = PERTA_ISA_V2;
#if defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("x86-64-v3"))
        best = PERTA_ISA_V3;
    if (__builtin_cpu_supports("x86-64-v4"))
        best = PERTA_ISA_V4;
#else
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("fma"))
        best = PERTA_ISA_V3;
#endif
    chosen = best;
    const char *asked = getenv("PERTA_ISA");
    for (int i = 0; asked && i < (int)best; i++)
        if (!strcmp(asked, names[i]))
            chosen = (enum perta_isa)i;
}

enum perta_isa perta_isa_chosen(void)
{
    pthread_once(&once, look_up);
    return chosen;
}

enum perta_isa perta_isa_best(void)
{
    pthread_once(&once, look_up);
    return best;
}

const char *perta_isa_name(enum perta_isa isa)
{
    return names[isa];
}
