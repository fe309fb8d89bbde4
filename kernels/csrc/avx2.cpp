#if defined(__x86_64__) && defined(__GNUC__)
#define MPSAE_ISA avx2
#define MPSAE_LEVEL 2
#include "table.h"

namespace mpsae {
const Functions avx2_functions = MPSAE_TABLE("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
