/* unlearn_steps.h - the options and the output of perta unlearn --steps. */
#ifndef PERTA_TOOLS_UNLEARN_STEPS_H
#define PERTA_TOOLS_UNLEARN_STEPS_H

#include "estimators/steps/steps.h"
#include "tools/cli.h"

struct unlearn_steps {
    struct perta_steps steps; /* n_steps is 0 if --steps is not given */
    int n_given;              /* number of options given that need --steps */
    bool has_back_off;
    bool tunes_reteach; /* an option for --survive reteach is given */
};

/* A child parser, whose input is the struct unlearn_steps. */
extern const struct argp unlearn_steps_argp;

void unlearn_steps_init(struct unlearn_steps *own);
/* Copy what the job has in common with a plain edit: folders, globs and flags. */
void unlearn_steps_take(struct perta_steps *to, const struct perta_unlearn *from);
/* Call after parsing: argp_error if the options do not fit together. is_signed: --method is one of
 * those that need --steps. */
void unlearn_steps_check(struct argp_state *state, struct unlearn_steps *own, bool is_signed);
/* Print the path as a table. */
void unlearn_steps_say(const struct cli *cli, const json_t *summary);
/* Was the level reached that the stop rules name? If not, a message on stderr says so. */
bool unlearn_steps_reached(const struct cli *cli, const struct perta_steps *s,
                           const json_t *summary);

#endif
