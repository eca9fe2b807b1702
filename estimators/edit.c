#include "estimators/edit.h"
