// Sums over chosen rows: out = sum_p weight[p] * rows[index[p]], and <x, rows[index[p]]>.
#pragma once
#include "backward.h"
#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

// Terms that are added together: the sum is read and written once for all of them.
constexpr int64_t GROUP = 4;
struct Group {
  const float* row[GROUP];
  float weight[GROUP];
  int64_t count;
};

// The next terms that are not zero; returns where to go on.
static inline int64_t next_group(const float* rows, int64_t d, const int64_t* index,
                                 const float* weight, int64_t from, int64_t count, Group& group) {
  group.count = 0;
  for (; from < count && group.count < GROUP; from++) {
    if (weight[from] == 0) continue;
    group.row[group.count] = rows + index[from] * d;
    group.weight[group.count++] = weight[from];
  }
  return from;
}

// `ahead` comes from memory in the meantime.
template <int N>
static void add_group(const Group& group, const Group& ahead, int64_t d, float* out) {
  const float* soon[GROUP];
  for (int64_t m = 0; m < GROUP; m++)
    soon[m] = m < ahead.count ? ahead.row[m] : group.row[0];
  Float weight[N];
  for (int m = 0; m < N; m++) weight[m] = fill(group.weight[m]);
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    for (int64_t m = 0; m < GROUP; m++) fetch(soon[m] + i);
    Float sum = load(out + i);
    for (int m = 0; m < N; m++) sum = fused(weight[m], load(group.row[m] + i), sum);
    store(out + i, sum);
  }
  for (; i < d; i++) {
    float sum = out[i];
    for (int m = 0; m < N; m++) sum += group.weight[m] * group.row[m][i];
    out[i] = sum;
  }
}

static void combine(const float* rows, int64_t d, const int64_t* index, const float* weight,
                    int64_t count, float* out) {
  std::memset(out, 0, size_t(d) * sizeof(float));
  Group group, ahead;
  int64_t from = next_group(rows, d, index, weight, 0, count, group);
  while (group.count) {
    from = next_group(rows, d, index, weight, from, count, ahead);
    switch (group.count) {
      case 1: add_group<1>(group, ahead, d, out); break;
      case 2: add_group<2>(group, ahead, d, out); break;
      case 3: add_group<3>(group, ahead, d, out); break;
      default: add_group<4>(group, ahead, d, out);
    }
    group = ahead;
  }
}

static void dots(const float* rows, int64_t d, const int64_t* index, int64_t count, const float* x,
                 float* out) {
  for (int64_t p = 0; p < count; p++) {
    if (p + 1 < count) fetch_row(rows + index[p + 1] * d, d);
    out[p] = dot(x, rows + index[p] * d, d);
  }
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
