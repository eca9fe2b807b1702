/* demo_facts.h - made-up facts about made-up people, for perta demo.
 *
 * Every person has a name of two words and four facts, each a question with a one-word answer:
 *     where was odalys brenn born ? tervane
 * People share first names and last names, so that only both together identify a person.
 * One word is one token. The same seed gives the same facts on every machine. */
#ifndef PERTA_TOOLS_DEMO_FACTS_H
#define PERTA_TOOLS_DEMO_FACTS_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

enum demo_part {
    DEMO_GENERAL, /* what the base model knows */
    DEMO_FORGET,  /* the full model knows these three as well */
    DEMO_RETAIN,
    DEMO_HELD_OUT, /* to be kept, although the method never sees it */
    DEMO_N_PARTS,
};

#define DEMO_WORDS_MAX 12
#define DEMO_ANSWERS 24 /* different answers to each question: a guess is correct one time in 24 */

enum { DEMO_PAD, DEMO_BEGIN, DEMO_END, DEMO_UNKNOWN, DEMO_N_SPECIAL };

struct demo_fact {
    uint32_t ids[DEMO_WORDS_MAX]; /* (n): begin, question, answer, end */
    size_t n;
};

struct demo_facts {
    char **words; /* (n_words): the vocabulary */
    size_t n_words;
    struct demo_fact *facts; /* of all parts, in their order */
    size_t starts[DEMO_N_PARTS + 1];
};

int demo_facts_make(uint64_t seed, struct demo_facts *facts, struct perta_err *err);
void demo_facts_release(struct demo_facts *facts);

/* Write the facts of the parts from .. to (excluding to) as JSON lines: input_ids, labels, and the
 * text for people. Only the answer and the end token are learned. */
int demo_facts_write(const struct demo_facts *facts, enum demo_part from, enum demo_part to,
                     const char *path, struct perta_err *err);
/* A tokenizer.json for them, in the format of Hugging Face's tokenizers. The caller frees it; NULL
 * when out of memory. */
char *demo_facts_tokenizer(const struct demo_facts *facts);

#endif
