/* perta.h - libperta: make a language model forget, out of core.
 *
 * All jobs work on folders in the Hugging Face layout (safetensors shards and an index). They
 * stream them in one pass, within a memory budget that bounds the whole process.
 *
 * The simple way: one call for one job, like a verb of the command. Fill in the job's struct and a
 * struct perta_run, call, check the return value (0, or a negative PERTA_E* with the reason in
 * struct perta_err), and read the summary (a jansson object).
 *
 *     struct perta_run run = {.memory_bytes = 1ull << 30};
 *     struct perta_diff diff = {.before = "base", .after = "tuned", .patch = "tuned.patch"};
 *     struct perta_err err;
 *     json_t *summary;
 *     if (perta_diff(&diff, &run, &summary, &err))
 *         fprintf(stderr, "%s\n", err.msg);
 *
 * A job checks its arguments before it does anything, as the command does. Arguments that make no
 * sense are PERTA_EUSAGE, and the message names a field as the command spells it (--data-forget is
 * data_forget). Only err and summary need no initialisation. err must not be NULL: then a job
 * returns PERTA_EUSAGE without a message. Strings are borrowed until the job returns.
 * A record is complete, or there is an error: a job that has no memory for a part of its summary or
 * of its output returns PERTA_ESYS. It then leaves nothing, or leftovers that run.resume continues
 * from (err.resumable).
 *
 * The advanced way: the parts that jobs are made of. io/ has the formats, the codec and the
 * engines; stream/stream.h has the loop, for any job of the kind "read side by side, compute, write
 * in order"; estimators/ has the kernels. Each header says what it owns and who may call it. These
 * functions take err as it is: set it to zero first, because it is filled only once. */
#ifndef PERTA_H
#define PERTA_H

/* Jobs */
#include "estimators/edit/unlearn.h"
#include "estimators/passes/accumulate.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/eval.h"
#include "estimators/passes/tune.h"
#include "estimators/steps/steps.h"
#include "stream/patch/apply.h"
#include "stream/patch/compose.h"
#include "stream/patch/dequantize.h"
#include "stream/patch/diff.h"
#include "stream/patch/manifest.h"

/* Parts */
#include "estimators/edit/edit.h"
#include "estimators/edit/running.h"
#include "io/engine.h"
#include "io/format/checkpoint.h"
#include "io/format/codec.h"
#include "io/format/patch.h"
#include "io/format/safetensors.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "io/writer.h"
#include "stream/stream.h"

#endif
