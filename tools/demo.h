/* demo.h - what the parts of perta demo share: the story (cmd_demo.c), and what the models
 * know at its end (demo_ask.c). */
#ifndef PERTA_TOOLS_DEMO_H
#define PERTA_TOOLS_DEMO_H

#include "estimators/edit/unlearn.h"
#include "estimators/model/samples.h"
#include "tools/cli.h"
#include "tools/demo_facts.h"

#define DEMO_BATCH 128
enum { DEMO_N_METHODS = 5, DEMO_N_POINTS = 6, DEMO_N_ASKED = 3 };

/* Each makes several models, which forget more and more: models/NAME/AXIS-POINT. */
struct demo_method {
    const char *name, *stat;
    enum demo_way { DEMO_AT_ONCE, DEMO_IN_STEPS, DEMO_HELD } way;
    enum perta_method method; /* at once */
    const char *axis, *const *points;
    int n_points; /* DEMO_N_POINTS at most */
};
extern const struct demo_method demo_methods[DEMO_N_METHODS];

/* Share of answers that are right, and probability of the right one, by part: forget,
 * retain, held out. */
struct demo_score {
    double right[DEMO_N_ASKED], probability[DEMO_N_ASKED];
};

struct demo {
    struct cli cli; /* first: the children's input */
    const char *dir;
    struct demo_facts facts;
    char *tokenizer, *config;
    struct perta_samples asked[DEMO_N_ASKED];
    struct demo_score full, unlearned[DEMO_N_METHODS][DEMO_N_POINTS];
};

/* DIR/..., the caller's to free; NULL only without memory. */
char *demo_path(const struct demo *demo, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
int demo_no_memory(struct perta_err *err);

/* Ask full and every model of every method about demo->asked. */
int demo_ask(struct demo *demo, struct perta_err *err);
/* The scores as a table, and what they come to. */
void demo_say(const struct demo *demo);
/* The caller's. */
json_t *demo_summary(const struct demo *demo);

#endif
