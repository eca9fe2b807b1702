/* demo.h - what the parts of perta demo share: the demo itself (cmd_demo.c), the methods
 * (demo_unlearn.c), and what the models know (demo_ask.c). */
#ifndef PERTA_TOOLS_DEMO_H
#define PERTA_TOOLS_DEMO_H

#include "estimators/edit/unlearn.h"
#include "estimators/model/samples.h"
#include "tools/cli.h"
#include "tools/demo_facts.h"

#define DEMO_BATCH 128
enum { DEMO_N_METHODS = 6, DEMO_N_POINTS = 6, DEMO_N_ASKED = 3 };
enum { DEMO_OWN_GRADIENT }; /* the method that takes the model alone */

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

/* ---- demo_unlearn.c ---- */

/* Estimate the importance of every parameter of base for a set (forget or retain). */
int demo_estimate(const struct demo *demo, const char *set, struct perta_err *err);
/* Make the models of method number m, and print the commands. */
int demo_unlearn(const struct demo *demo, int m, struct perta_err *err);

/* ---- demo_ask.c ---- */

/* Ask the full model about demo->asked; and every model of method number m. */
int demo_ask_full(struct demo *demo, struct perta_err *err);
int demo_ask(struct demo *demo, int m, struct perta_err *err);
/* Print the scores of the full model and of the method that takes it alone; then those of the other
 * methods, and a summary of all. */
void demo_say_own(const struct demo *demo);
void demo_say_all(const struct demo *demo);
/* The caller owns the reference. */
json_t *demo_summary(const struct demo *demo);

#endif
