/* This build has matrix products. A build without them compiles no_model.c instead of this file and
 * of the verbs that need them. */
#include "estimators/model/weights.h"
#include "tools/cli.h"

const bool cli_has_model = true;

int cli_check_model(const char *path, struct perta_err *err)
{
    struct perta_weights weights;
    int rc = perta_weights_open(&weights, path, err);
    perta_weights_close(&weights);
    return rc;
}
