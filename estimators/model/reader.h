/* reader.h - a thread that does one thing after another for its owner, who may go on meanwhile:
 * what reads weights while others are computed with. */
#ifndef PERTA_ESTIMATORS_MODEL_READER_H
#define PERTA_ESTIMATORS_MODEL_READER_H

#include "io/err.h"

struct perta_reader;

/* *out is closed with perta_reader_close, which waits for what is under way. NULL is allowed. */
int perta_reader_open(struct perta_reader **out, struct perta_err *err);
void perta_reader_close(struct perta_reader *reader);
/* Call job(ctx) on the thread. What was begun before must have been waited for. */
void perta_reader_begin(struct perta_reader *reader, int (*job)(void *ctx, struct perta_err *err),
                        void *ctx);
/* Wait until it is done; what it returned. */
int perta_reader_wait(struct perta_reader *reader, struct perta_err *err);

#endif
