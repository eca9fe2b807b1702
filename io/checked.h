/* checked.h - arithmetic on sizes, which may come from files. The functions named _overflows return
 * true on overflow. */
#ifndef PERTA_IO_CHECKED_H
#define PERTA_IO_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool perta_add_overflows(uint64_t a, uint64_t b, uint64_t *sum)
{
    return __builtin_add_overflow(a, b, sum);
}

static inline bool perta_mul_overflows(uint64_t a, uint64_t b, uint64_t *product)
{
    return __builtin_mul_overflow(a, b, product);
}

static inline uint64_t perta_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Round up or down to a multiple of unit, a power of two. */
static inline uint64_t perta_align_up(uint64_t n, uint64_t unit)
{
    return (n + unit - 1) & ~(unit - 1);
}

static inline uint64_t perta_align_down(uint64_t n, uint64_t unit)
{
    return n & ~(unit - 1);
}

#endif
