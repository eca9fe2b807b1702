/* samples.h - token ids and labels of a data set, from JSON lines. Spec: docs/estimate.md
 *
 * Each line is an object with "input_ids" (whole numbers from 0) and "labels" of the same length,
 * where -100 means that a position is not learned; without labels, all of input_ids are learned. As
 * in transformers, the label at position t is predicted from positions before t; "attention_mask"
 * and "position_ids" decide what a token sees and its position. A line may have other answers to
 * the same question, objects of the same form: "paraphrased" (one) and "perturbed" (an array).
 * sample_keys.h says what other keys do. */
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

/* The file that the samples were read from, as it was then. */
struct perta_samples_file {
    uint64_t len_bytes;
    struct timespec mtime;
    char xxh128[PERTA_XXH128_HEX];
    char hmac[PERTA_SHA256_HEX]; /* "" without a key */
};

struct perta_samples {
    uint64_t n; /* number of samples, with the other answers, which follow the line's own answer */
    /* of all samples; tokens that are not seen and predict nothing are left out */
    uint64_t n_tokens;
    uint64_t longest;           /* tokens of the longest sample */
    uint64_t *starts;           /* (n + 1): sample i is tokens starts[i] .. starts[i + 1] */
    int32_t *ids;               /* (n_tokens) */
    int32_t *targets;           /* (n_tokens): token that position t predicts, or PERTA_IGNORED */
    struct perta_place *places; /* (n_tokens): those that attention_mask hides come last */
    uint32_t *n_labels;         /* (n): targets that are not ignored; at least 1 */
    uint64_t *lines;            /* (n): line in the file, from 1 */
    uint8_t *kinds;             /* (n): enum perta_sample_kind */
    uint64_t room;              /* of ids, targets and places */
    struct perta_samples_file file;
    json_t *notes; /* strings: what the user should know about the file */
};

/* How to read a file. */
struct perta_samples_wanted {
    uint32_t vocab;      /* ids must be below this */
    uint64_t max_tokens; /* longer samples are refused; 0: no limit */
    uint32_t positions;  /* positions from this one on are refused; 0: no limit */
    const char *beyond;  /* why: "the model has no more" */
    uint32_t is_short;   /* lines with a position from this one on are long; 0: none is */
    struct perta_position_ids position_ids;
    bool answers;         /* read other answers, too; otherwise they are skipped */
    const char *key_path; /* file of a key for the HMAC of what is read; NULL: none */
    /* digest of an earlier reading: PERTA_EINPUT if the file differs; NULL: any */
    const char *xxh128;
    bool is_whole; /* a line whose position_ids start again is refused */
};

/* Read the whole file, once. Errors name path and line. The caller releases *out with
 * perta_samples_release. */
PERTA_API int perta_samples_read(const char *path, const struct perta_samples_wanted *wanted,
                                 struct perta_samples *out, struct perta_err *err);
/* Bytes of the heap that the samples take. */
uint64_t perta_samples_bytes(const struct perta_samples *samples);
PERTA_API void perta_samples_release(struct perta_samples *samples);

#endif
