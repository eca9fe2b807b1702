/* sample_keys.h - the keys of a line of data, and what each does to the loss. Spec:
 * docs/estimate.md
 *
 * A key that would change what is computed is either implemented or refused, unless its value
 * changes nothing. */
#ifndef PERTA_ESTIMATORS_MODEL_SAMPLE_KEYS_H
#define PERTA_ESTIMATORS_MODEL_SAMPLE_KEYS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/model/line.h"
#include "io/err.h"

#define PERTA_TOKENIZE "`perta tokenize MODEL TEXT.jsonl OUT.jsonl' makes data from text"

enum perta_key_rule {
    PERTA_KEY_UNKNOWN, /* ignored, with a note */
    PERTA_KEY_NEUTRAL, /* ignored */
    PERTA_KEY_READ,    /* input_ids, labels, attention_mask, position_ids */
    PERTA_KEY_ANSWERS, /* paraphrased, perturbed */
    /* The others are allowed if they change nothing: */
    PERTA_KEY_ABSENT,  /* null, or empty */
    PERTA_KEY_CHOOSES, /* mask of what is learned: may be 0 where the label is -100 */
    PERTA_KEY_WEIGHS,  /* 1, or an array of 1 */
    PERTA_KEY_LABELS,  /* a copy of the labels */
    PERTA_KEY_HIDES,   /* a copy of attention_mask */
    PERTA_KEY_PLACES,  /* a copy of position_ids */
    PERTA_KEY_COUNTS,  /* 0, 1, 2 and so on */
    PERTA_KEY_BOUNDS,  /* the blocks that position_ids make: their bounds, */
    PERTA_KEY_LENGTHS, /* their lengths, */
    PERTA_KEY_LENGTH,  /* the same if it is an array; otherwise any value */
    PERTA_KEY_NUMBERS, /* or another number for each */
    PERTA_KEY_CAUSAL,  /* true */
};

enum perta_key_rule perta_key_rule(const char *key);
/* Whether the value is parsed. */
static inline bool perta_key_is_read(enum perta_key_rule rule)
{
    return rule != PERTA_KEY_UNKNOWN && rule != PERTA_KEY_NEUTRAL;
}

/* A sample as on its line: n tokens. */
struct perta_draft {
    size_t n, room;
    int32_t *ids;
    int32_t *labels;     /* (n); PERTA_IGNORED: not learned */
    uint32_t *positions; /* (n) */
    uint8_t *seen;       /* (n): attention_mask; 0: hidden */
    bool is_long;        /* struct perta_place */
    uint8_t *begins;     /* (n): 1 where a block begins; tokens see nothing before their block */
};

/* Refuse keys that would change what the draft computes. */
int perta_keys_check(const struct perta_line *line, const struct perta_draft *draft, json_t *object,
                     struct perta_err *err);

#endif
