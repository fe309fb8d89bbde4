#define MPSAE_ISA plain
#define MPSAE_LEVEL 1
#include "table.h"

namespace mpsae {
const Functions plain_functions = MPSAE_TABLE("plain");
}
