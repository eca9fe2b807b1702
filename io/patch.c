#include "io/patch.h"
