/* reader.h - a thread that runs jobs for its owner, one at a time, while the owner continues. It
 * reads weights while others are being used. */
#ifndef PERTA_ESTIMATORS_MODEL_READER_H
#define PERTA_ESTIMATORS_MODEL_READER_H

#include "io/err.h"

struct perta_reader;

/* The caller closes *out with perta_reader_close, which waits for a running job. NULL is
 * allowed. */
int perta_reader_open(struct perta_reader **out, struct perta_err *err);
void perta_reader_close(struct perta_reader *reader);
/* Call job(ctx) on the thread. The job before must have been waited for. */
void perta_reader_begin(struct perta_reader *reader, int (*job)(void *ctx, struct perta_err *err),
                        void *ctx);
/* Wait until the job is finished, and return what it returned. */
int perta_reader_wait(struct perta_reader *reader, struct perta_err *err);

#endif
