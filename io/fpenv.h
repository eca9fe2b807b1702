/* fpenv.h - the floating-point environment that every result is computed in: round to nearest,
 * subnormal numbers kept, no traps. A host program may have set another one (flush-to-zero is
 * what -ffast-math does to a whole process), and a new thread inherits that of its creator.
 *
 * Each public function that computes or spells numbers begins with PERTA_FP_SCOPE. Threads that
 * it starts inherit the environment; a thread that lives longer than the call, or that another
 * library made, needs a PERTA_FP_SCOPE of its own. Costs about a microsecond: once for a call or
 * a task, not for each element. */
#ifndef PERTA_IO_FPENV_H
#define PERTA_IO_FPENV_H

#include <fenv.h>

struct perta_fp_env {
    fenv_t host;
};

/* The environment of the calling thread, after which the default one holds. The C library's own
 * functions are used because the compiler moves no arithmetic on memory across them. */
static inline struct perta_fp_env perta_fp_enter(void)
{
    struct perta_fp_env env;
    fegetenv(&env.host);
    fesetenv(FE_DFL_ENV); /* on x86 it clears flush-to-zero and denormals-are-zero, too */
    return env;
}

/* The caller's environment is as it was; exceptions raised since are not reported to it. */
static inline void perta_fp_leave(const struct perta_fp_env *env)
{
    fesetenv(&env->host);
}

/* From here to the end of the block, whichever way it is left, the default environment holds. */
#define PERTA_FP_SCOPE                                                                         \
    __attribute__((unused, cleanup(perta_fp_leave))) const struct perta_fp_env perta_fp_env_ = \
        perta_fp_enter()

#endif
