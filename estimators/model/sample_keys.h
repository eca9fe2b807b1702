/* sample_keys.h - the keys of a line of data, and what each does to the loss. Spec:
 * docs/estimate.md
 *
 * * A key that would change what is computed is computed with or refused, unless it says what holds
 * anyway. */
#ifndef PERTA_ESTIMATORS_MODEL_SAMPLE_KEYS_H
#define PERTA_ESTIMATORS_MODEL_SAMPLE_KEYS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/model/line.h"
#include "io/err.h"

#define PERTA_TOKENIZE "`python -m perta.tokenize MODEL TEXT.jsonl OUT.jsonl' makes data from text"

enum perta_key_rule {
    PERTA_KEY_UNKNOWN, /* passed over, and said so */
    PERTA_KEY_NEUTRAL, /* passed over */
    PERTA_KEY_READ,    /* input_ids, labels, attention_mask, position_ids */
    PERTA_KEY_ANSWERS, /* paraphrased, perturbed */
    /* The rest may stand there if they change nothing: */
    PERTA_KEY_ABSENT,  /* null, or empty */
    PERTA_KEY_CHOOSES, /* what is learned: 0 where the label is -100 anyway */
    PERTA_KEY_WEIGHS,  /* 1, or as many */
    PERTA_KEY_LABELS,  /* the labels once more */
    PERTA_KEY_HIDES,   /* attention_mask once more */
    PERTA_KEY_PLACES,  /* position_ids once more */
    PERTA_KEY_COUNTS,  /* 0, 1, 2 and so on */
    PERTA_KEY_BOUNDS,  /* the blocks that position_ids make: their bounds, */
    PERTA_KEY_LENGTHS, /* their lengths, */
    PERTA_KEY_LENGTH,  /* likewise where it is an array; else of anything */
    PERTA_KEY_NUMBERS, /* or another number for each */
    PERTA_KEY_CAUSAL,  /* true */
};

enum perta_key_rule perta_key_rule(const char *key);
/* Is the value parsed? */
static inline bool perta_key_is_read(enum perta_key_rule rule)
{
    return rule != PERTA_KEY_UNKNOWN && rule != PERTA_KEY_NEUTRAL;
}

/* A sample as its line has it: n tokens. */
struct perta_draft {
    size_t n, room;
    int32_t *ids;
    int32_t *labels;     /* (n): PERTA_IGNORED: not learned */
    uint32_t *positions; /* (n) */
    uint8_t *seen;       /* (n): 0 where attention_mask is */
    uint8_t *begins;     /* (n): a block of tokens that see nothing before it */
};

/* Refuse keys that would change what the draft says. */
int perta_keys_check(const struct perta_line *line, const struct perta_draft *draft, json_t *object,
                     struct perta_err *err);

#endif
