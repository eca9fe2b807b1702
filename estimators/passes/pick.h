/* pick.h - some of a data set's samples: batches of shuffled epochs, a random part and its rest. */
#ifndef PERTA_ESTIMATORS_PASSES_PICK_H
#define PERTA_ESTIMATORS_PASSES_PICK_H

#include "estimators/model/samples.h"
#include "estimators/passes/estimate.h"

/* order (n) = the samples 0 .. n - 1 in the order of that epoch, from 0: a Fisher-Yates shuffle from
 * the last place to the first (docs/tune.md). */
void perta_samples_shuffle(uint32_t *order, uint64_t n, uint64_t seed, uint64_t epoch);

/* Append sample i of from to to, which has room for it. Both may be the same, for a sample that is
 * not before those that to already has. */
void perta_samples_append(struct perta_samples *to, const struct perta_samples *from, uint64_t i);

/* Keep only the samples that pick says, in the order of the file.
 *
 * PERTA_PICK_BATCH: an epoch, shuffled as above, is cut into as many batches as it takes for none to
 * have more than size samples; they differ by one at most. PERTA_PICK_SOME: the first size samples
 * of the order that epoch number turn has. PERTA_PICK_REST: the other samples. PERTA_EINPUT, naming
 * path, if none would remain for one of these two. */
int perta_samples_pick(struct perta_samples *samples, const struct perta_pick *pick,
                       const char *path, struct perta_err *err);

/* Add to the identity of a run what decides which samples are taken; nothing if that is all. */
void perta_pick_identity(const struct perta_pick *pick, json_t **identity);

#endif
