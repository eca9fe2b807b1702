/* This build has matrix products; one without has no_model.c in place of this and its verbs. */
#include "tools/cli.h"

const bool cli_has_model = true;
