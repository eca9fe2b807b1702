/* Apart from the rest of steps: the command names conditions also where it is built without what
 * computes with a model. */
#include "estimators/steps/steps.h"

const char *perta_condition_name(enum perta_condition condition)
{
    if (condition == PERTA_AS_IT_IS)
        return "as it is";
    return condition == PERTA_DROPPED    ? "drop"
           : condition == PERTA_RETAUGHT ? "reteach"
                                         : perta_rounding_name((enum perta_rounding)condition);
}
