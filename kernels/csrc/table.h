// The table of functions of one instruction set; the including file defines MPSAE_ISA, MPSAE_LEVEL.
#pragma once
#include "simd.h"

#include "backward.h"
#include "decode.h"
#include "gram.h"
#include "largest.h"
#include "gradient.h"
#include "pursuit.h"

#define MPSAE_TABLE(label)                                                              \
  {label, MPSAE_ISA::LANES, MPSAE_ISA::start, MPSAE_ISA::scan, MPSAE_ISA::decide,       \
   MPSAE_ISA::subtract16, MPSAE_ISA::subtract32, MPSAE_ISA::quantise, MPSAE_ISA::norm,  \
   MPSAE_ISA::backward_row, MPSAE_ISA::backward_columns, MPSAE_ISA::combine,            \
   MPSAE_ISA::dots, MPSAE_ISA::largest_of_row, MPSAE_ISA::refit_row}
