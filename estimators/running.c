#include "estimators/running.h"
