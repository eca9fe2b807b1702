#include "estimators/passes/pass_arguments.h"

#include "io/format/checkpoint.h"

int perta_compute_argument(enum perta_compute compute, struct perta_err *err)
{
    return perta_arguments_choice("--compute", (int)compute, PERTA_COMPUTE_REFERENCE + 1, err);
}

int perta_rounding_argument(enum perta_rounding quantize, struct perta_err *err)
{
    return perta_arguments_choice("--quantize", (int)quantize, PERTA_N_ROUNDINGS, err);
}

int perta_scaled_arguments(const struct perta_scaled_paths *at, struct perta_err *err)
{
    if (!at)
        return 0;
    if (at->box && (at->tuned || at->base))
        return perta_fail(err, PERTA_EUSAGE, "box (of at), or tuned and base, not both");
    if (!(at->drop >= 0 && at->drop < 1))
        return perta_fail(err, PERTA_EUSAGE, "drop (of at): %g; must be at least 0, and below 1",
                          at->drop);
    bool needs_base = !at->box && !(at->tuned && perta_checkpoint_is_adapter(at->tuned));
    const char *tau = at->box ? at->box : at->tuned;
    const struct perta_argument needed[] = {{"tuned (of at)", tau},
                                            {"base (of at)", needs_base ? at->base : tau},
                                            {"scale (of at)", at->scale}};
    return perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
}

int perta_pick_argument(const struct perta_pick *pick, struct perta_err *err)
{
    int rc = perta_arguments_choice("pick", (int)pick->what, PERTA_PICK_REST + 1, err);
    if (!rc && pick->what != PERTA_PICK_ALL && !pick->size)
        rc = perta_fail(err, PERTA_EUSAGE, "pick: its size must be above 0");
    return rc;
}
