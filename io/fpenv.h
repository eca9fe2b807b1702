/* fpenv.h - the floating-point environment that every result is computed in: round to nearest,
 * subnormal numbers kept, no traps. A host program may have set another one (-ffast-math switches a
 * whole process to flush-to-zero), and a new thread inherits the environment of its creator.
 *
 * Each public function that computes or prints numbers begins with PERTA_FP_SCOPE. Threads that it
 * starts inherit the environment; a thread that outlives the call, or that another library created,
 * needs its own PERTA_FP_SCOPE. It costs about a microsecond: use it once per call or task, not per
 * element. */
#ifndef PERTA_IO_FPENV_H
#define PERTA_IO_FPENV_H

#include <fenv.h>

struct perta_fp_env {
    fenv_t host;
};

/* Save the calling thread's environment and install the default one. It uses the C library's own
 * functions because the compiler moves no arithmetic on memory across them. */
static inline struct perta_fp_env perta_fp_enter(void)
{
    struct perta_fp_env env;
    fegetenv(&env.host);
    fesetenv(FE_DFL_ENV); /* on x86 this also clears flush-to-zero and denormals-are-zero */
    return env;
}

/* Restore the saved environment. Floating-point exceptions raised since then are not reported. */
static inline void perta_fp_leave(const struct perta_fp_env *env)
{
    fesetenv(&env->host);
}

/* The default environment holds from here to the end of the block, however it is left. */
#define PERTA_FP_SCOPE                                                                         \
    __attribute__((unused, cleanup(perta_fp_leave))) const struct perta_fp_env perta_fp_env_ = \
        perta_fp_enter()

#endif
