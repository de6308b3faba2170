#include "base/quant.h"
