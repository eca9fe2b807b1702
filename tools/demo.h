/* demo.h - what the parts of perta demo share: the demo itself (cmd_demo.c), and what the models
 * know at its end (demo_ask.c). */
#ifndef PERTA_TOOLS_DEMO_H
#define PERTA_TOOLS_DEMO_H

#include "estimators/edit/unlearn.h"
#include "estimators/model/samples.h"
#include "tools/cli.h"
#include "tools/demo_facts.h"

#define DEMO_BATCH 128
enum { DEMO_N_METHODS = 5, DEMO_N_POINTS = 6, DEMO_N_ASKED = 3 };

/* A method makes several models, each of which has forgotten more than the one before:
 * models/NAME/AXIS-POINT. */
struct demo_method {
    const char *name, *stat;
    enum demo_way { DEMO_AT_ONCE, DEMO_IN_STEPS, DEMO_HELD } way;
    enum perta_method method; /* for DEMO_AT_ONCE */
    const char *axis, *const *points;
    int n_points; /* at most DEMO_N_POINTS */
};
extern const struct demo_method demo_methods[DEMO_N_METHODS];

/* The share of correct answers, and the mean probability of the correct answer, for each set:
 * forget, retain, held out. */
struct demo_score {
    double right[DEMO_N_ASKED], probability[DEMO_N_ASKED];
};

struct demo {
    struct cli cli; /* must be first: it is the input of the child parsers */
    const char *dir;
    struct demo_facts facts;
    char *tokenizer, *config;
    struct perta_samples asked[DEMO_N_ASKED];
    struct demo_score full, unlearned[DEMO_N_METHODS][DEMO_N_POINTS];
};

/* The path of a file in DIR; the caller frees it. NULL only when out of memory. */
char *demo_path(const struct demo *demo, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
int demo_no_memory(struct perta_err *err);

/* Ask the full model, and every model of every method, about demo->asked. */
int demo_ask(struct demo *demo, struct perta_err *err);
/* Print the scores as a table, and a summary. */
void demo_say(const struct demo *demo);
/* The caller owns the reference. */
json_t *demo_summary(const struct demo *demo);

#endif
