/* This build has matrix products. A build without them compiles no_model.c instead of this file and
 * of the verbs that need them. */
#include "tools/cli.h"

const bool cli_has_model = true;
