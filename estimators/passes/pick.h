/* pick.h - some of a data set's samples: batches of shuffled epochs. */
#ifndef PERTA_ESTIMATORS_PASSES_PICK_H
#define PERTA_ESTIMATORS_PASSES_PICK_H

#include "estimators/model/samples.h"

/* order (n) = the samples 0 .. n - 1 in the order of that epoch, from 0: a Fisher-Yates shuffle from
 * the last place to the first (docs/tune.md). */
void perta_samples_shuffle(uint32_t *order, uint64_t n, uint64_t seed, uint64_t epoch);

/* Append sample i of from to to, which has room for it. Both may be the same, for a sample that is
 * not before those that to already has. */
void perta_samples_append(struct perta_samples *to, const struct perta_samples *from, uint64_t i);

/* Keep only the samples of batch number batch, in the order of the file. An epoch, shuffled as
 * above, is cut into as many batches as it takes for none to have more than size samples; they
 * differ by one at most. */
int perta_samples_keep_batch(struct perta_samples *samples, uint64_t size, uint64_t seed,
                             uint64_t batch, struct perta_err *err);

#endif
