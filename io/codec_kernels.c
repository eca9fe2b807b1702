#include "io/isa.h"
