/* samples.h - token ids and labels of a data set, from JSON lines. Spec: docs/estimate.md
 *
 * One object a line: "input_ids" (whole numbers from 0), and "labels" as long, where -100 means
 * that the position is not learned; without labels all of input_ids are. As in transformers,
 * the label at position t is predicted from positions before t. Beside them may stand other
 * answers to the same question, such objects too: "paraphrased" (one), "perturbed" (an array). */
#ifndef PERTA_BACKPROP_SAMPLES_H
#define PERTA_BACKPROP_SAMPLES_H

#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"

#define PERTA_IGNORED (-100)

enum perta_sample_kind { PERTA_SAMPLE, PERTA_PARAPHRASED, PERTA_PERTURBED };

struct perta_samples {
    uint64_t n;         /* samples; other answers count, and follow the line's own */
    uint64_t n_tokens;  /* of all */
    uint64_t longest;   /* tokens of the longest */
    uint64_t *starts;   /* (n + 1): sample i is tokens starts[i] .. starts[i + 1] */
    int32_t *ids;       /* (n_tokens) */
    int32_t *targets;   /* (n_tokens): what position t predicts, or PERTA_IGNORED */
    uint32_t *n_labels; /* (n): targets that are not ignored; at least 1 */
    uint64_t *lines;    /* (n): of the file, from 1 */
    uint8_t *kinds;     /* (n): enum perta_sample_kind */
    uint64_t room;      /* of ids and targets */
};

/* What to read of a file. */
struct perta_samples_wanted {
    uint32_t vocab;      /* ids must be below it */
    uint64_t max_tokens; /* longer samples are an error; 0: no bound */
    bool answers;        /* the other answers too; else they are passed over */
};

/* Read the whole file. Errors name path and line. *out is the caller's. */
PERTA_API int perta_samples_read(const char *path, const struct perta_samples_wanted *wanted,
                                 struct perta_samples *out, struct perta_err *err);
PERTA_API void perta_samples_release(struct perta_samples *samples);

#endif
