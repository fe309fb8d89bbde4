#if defined(__x86_64__) && defined(__GNUC__)
#define MPSAE_ISA avx512
#define MPSAE_LEVEL 3
#include "table.h"

namespace mpsae {
const Functions avx512_functions = MPSAE_TABLE("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
