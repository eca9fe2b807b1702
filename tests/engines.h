/* engines.h - calls a function with each engine that runs on this machine, with a pool for each. */
#ifndef PERTA_TESTS_ENGINES_H
#define PERTA_TESTS_ENGINES_H

#include "io/engine.h"
#include "tests/unit.h"

static const enum perta_io_mode modes[] = {PERTA_IO_DIRECT, PERTA_IO_MMAP, PERTA_IO_PREAD};
enum { N_MODES = 3 };

/* io_uring may be forbidden, for example in containers. */
static inline bool runs_here(enum perta_io_mode mode)
{
    return mode != PERTA_IO_DIRECT || !perta_engine_uring_probe();
}

#define POOL_BYTES (8u << 20)
static uint8_t *pool;

static inline struct perta_engine *open_engine(enum perta_io_mode mode, unsigned depth)
{
    struct perta_engine *engine;
    struct perta_err e = {0};
    pool = aligned_alloc(2 << 20, POOL_BYTES);
    ck_assert_ptr_nonnull(pool);
    ck_assert_msg(!perta_engine_open(mode, depth, &engine, &e), "%s", e.msg);
    return engine;
}

static inline void close_engine(struct perta_engine *engine)
{
    perta_engine_close(engine);
    free(pool);
}

#define for_each_engine(engine, depth)                                                            \
    for (unsigned m_ = 0; m_ < N_MODES; m_++)                                                     \
        for (struct perta_engine *engine = runs_here(modes[m_]) ? open_engine(modes[m_], (depth)) \
                                                                : NULL;                           \
             engine; close_engine(engine), engine = NULL)

#endif
