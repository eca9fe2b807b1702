#include "io/codec.h"
