/* perta.h - libperta: make a language model forget, out of core.
 *
 * Everything works on folders in the Hugging Face layout (safetensors shards and an index) and
 * streams them in one pass, within a memory budget that bounds the whole process.
 *
 * The simple way: one call for one job, as the command's verbs do it. Fill the job's struct and
 * a struct perta_run, call, look at the return value (0, or a negative PERTA_E* with the reason
 * in struct perta_err), read the summary (jansson).
 *
 *     struct perta_run run = {.memory_bytes = 1ull << 30};
 *     struct perta_diff diff = {.before = "base", .after = "tuned", .patch = "tuned.patch"};
 *     struct perta_err err;
 *     json_t *summary;
 *     if (perta_diff(&diff, &run, &summary, &err))
 *         fprintf(stderr, "%s\n", err.msg);
 *
 * A verb checks what it is asked before it does anything, as the command has it checked: what makes
 * no sense is PERTA_EUSAGE, and the message names a field as the command spells it (--data-forget is
 * data_forget). Only err and summary need not be set before; err is needed, too: with NULL there is
 * PERTA_EUSAGE and not a word. Strings are the caller's until the verb returns.
 * A record is whole, or there is an error: a verb that has no memory for a part of its summary or of
 * what it writes is PERTA_ESYS, and leaves nothing, or what run.resume goes on with (err.resumable).
 *
 * The advanced way: the parts that jobs are made of. io/ has the formats, the codec and the
 * engines; stream/stream.h the loop that any job of "read side by side, compute, write in
 * order" can use; estimators/ the kernels. Each header says what it owns and who may call it. They
 * take err as it is: zero it first, for it is filled only once. */
#ifndef PERTA_H
#define PERTA_H

/* Jobs */
#include "estimators/edit/unlearn.h"
#include "estimators/passes/accumulate.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/eval.h"
#include "estimators/steps/steps.h"
#include "stream/patch/apply.h"
#include "stream/patch/compose.h"
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
