// The k largest of a row in one pass: most numbers are only held against the smallest one kept.
#pragma once
#include <algorithm>

#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

// largest first, the lower index first among equals
static inline bool precedes(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// held: room for `room` >= k + 4 * LANES. False where a number is NaN, or fewer than k are above
// -infinity: somebody else has to look at the row.
static bool largest_of_row(const float* row, int64_t n, int64_t k, Candidate* held, int64_t room,
                           int64_t* indices, float* values) {
  constexpr int64_t STEP = 4 * LANES;
  constexpr uint32_t EVERY = (uint32_t(1) << LANES) - 1;
  int64_t count = 0, i = 0;
  float smallest = -std::numeric_limits<float>::infinity();
  for (; i + STEP <= n; i += STEP) {
    const Float bar = fill(smallest);
    uint32_t above[4];  // or NaN
    for (int m = 0; m < 4; m++) above[m] = EVERY & ~at_least(bar, load(row + i + m * LANES));
    if (!(above[0] | above[1] | above[2] | above[3])) continue;
    for (int64_t m = 0; m < 4; m++)
      for (int64_t l = i + m * LANES; above[m]; l++, above[m] >>= 1) {
        if (!(above[m] & 1)) continue;
        if (row[l] != row[l]) return false;
        held[count++] = {row[l], l};
      }
    if (count > room - STEP) {
      std::nth_element(held, held + k - 1, held + count, precedes);
      smallest = held[k - 1].value;
      count = k;
    }
  }
  for (; i < n; i++)
    if (!(smallest >= row[i])) {
      if (row[i] != row[i]) return false;
      held[count++] = {row[i], i};
    }
  if (count < k) return false;
  std::nth_element(held, held + k - 1, held + count, precedes);
  std::sort(held, held + k, precedes);
  for (int64_t t = 0; t < k; t++) {
    indices[t] = held[t].index;
    values[t] = held[t].value;
  }
  return true;
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
