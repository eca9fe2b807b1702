/* unlearn_steps.h - the part of perta unlearn that is for --steps. */
#ifndef PERTA_TOOLS_UNLEARN_STEPS_H
#define PERTA_TOOLS_UNLEARN_STEPS_H

#include "estimators/steps/steps.h"
#include "tools/cli.h"

struct unlearn_steps {
    struct perta_steps steps; /* n_steps 0: not wanted */
    int n_given;              /* options that only go with --steps */
    bool has_back_off;
};

/* A child parser; its input is the struct unlearn_steps. */
extern const struct argp unlearn_steps_argp;

void unlearn_steps_init(struct unlearn_steps *own);
/* What it has in common with an edit at once: folders, names, force. */
void unlearn_steps_take(struct perta_steps *to, const struct perta_unlearn *from);
/* After parsing: argp_error for what makes no sense. is_signed: --method said so. */
void unlearn_steps_check(struct argp_state *state, struct unlearn_steps *own, bool is_signed);
/* The way, as a table. */
void unlearn_steps_say(const struct cli *cli, const json_t *summary);
/* Was what the stop rules ask for reached? If not, it is said on stderr. */
bool unlearn_steps_reached(const struct cli *cli, const struct perta_steps *s,
                           const json_t *summary);

#endif
