/* samples.h - token ids and labels of a data set, from JSON lines. Spec: docs/estimate.md
 *
 * One object a line: "input_ids" (whole numbers from 0), and "labels" as long, where -100 means
 * that the position is not learned; without labels all of input_ids are. As in transformers,
 * the label at position t is predicted from positions before t; "attention_mask" and
 * "position_ids" say what a token sees, and where it stands. Beside them may stand other
 * answers to the same question, such objects too: "paraphrased" (one), "perturbed" (an array).
 * What other keys do: sample_keys.h. */
#ifndef PERTA_ESTIMATORS_MODEL_SAMPLES_H
#define PERTA_ESTIMATORS_MODEL_SAMPLES_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "estimators/compute/place.h"
#include "io/err.h"
#include "io/hash.h"

#define PERTA_IGNORED (-100)

enum perta_sample_kind { PERTA_SAMPLE, PERTA_PARAPHRASED, PERTA_PERTURBED };

/* What the samples were read from: one reading. */
struct perta_samples_file {
    uint64_t len_bytes;
    struct timespec mtime;
    char xxh128[PERTA_XXH128_HEX];
    char hmac[PERTA_SHA256_HEX]; /* "": no key */
};

struct perta_samples {
    uint64_t n;        /* samples; other answers count, and follow the line's own */
    uint64_t n_tokens; /* of all; a token that nothing sees and that predicts nothing is left out */
    uint64_t longest;  /* tokens of the longest */
    uint64_t *starts;  /* (n + 1): sample i is tokens starts[i] .. starts[i + 1] */
    int32_t *ids;      /* (n_tokens) */
    int32_t *targets;  /* (n_tokens): what position t predicts, or PERTA_IGNORED */
    struct perta_place *places; /* (n_tokens): those that attention_mask hides come last */
    uint32_t *n_labels;         /* (n): targets that are not ignored; at least 1 */
    uint64_t *lines;            /* (n): of the file, from 1 */
    uint8_t *kinds;             /* (n): enum perta_sample_kind */
    uint64_t room;              /* of ids, targets and places */
    struct perta_samples_file file;
    json_t *notes; /* strings: what a user ought to know of the file */
};

/* What to read of a file. */
struct perta_samples_wanted {
    uint32_t vocab;       /* ids must be below it */
    uint64_t max_tokens;  /* longer samples are an error; 0: no bound */
    bool answers;         /* the other answers too; else they are passed over */
    const char *key_path; /* file of a key: the HMAC of what was read; NULL: none */
    const char
        *xxh128; /* of what was read before: PERTA_EINPUT if the file is another; NULL: any */
};

/* Read the whole file, once. Errors name path and line. *out is the caller's. */
PERTA_API int perta_samples_read(const char *path, const struct perta_samples_wanted *wanted,
                                 struct perta_samples *out, struct perta_err *err);
/* What they take of the heap. */
uint64_t perta_samples_bytes(const struct perta_samples *samples);
PERTA_API void perta_samples_release(struct perta_samples *samples);

#endif
