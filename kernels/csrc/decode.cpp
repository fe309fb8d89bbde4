// Sparse sums on threads. With T = sum over b, t of values[b, t] <x_b, dictionary[indices[b, t]]>,
// each function makes the gradient of T by one of its factors from the other two.
#include <cstring>

#include "driver.h"

namespace mpsae {

namespace {

// Call work(b) for every row; a row belongs to one thread.
template <class Work>
void each(int64_t count, int64_t chunk, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    for (int64_t first; (first = next.fetch_add(chunk)) < count;)
      for (int64_t b = first; b < count && b < first + chunk; b++) work(b);
  });
}

}  // namespace

void decode(const Sparse& q, float* y, int64_t threads, const Functions& f) {
  each(q.B, 8, threads, [&](int64_t b) {
    f.combine(q.dictionary, q.d, q.indices + b * q.k, q.values + b * q.k, q.k, y + b * q.d);
  });
}

void decode_dots(const Sparse& q, float* products, int64_t threads, const Functions& f) {
  each(q.B, 8, threads, [&](int64_t b) {
    f.dots(q.dictionary, q.d, q.indices + b * q.k, q.k, q.x + b * q.d, products + b * q.k);
  });
}

// Sorted by atom, in the order of the rows, an atom's terms are added up in cache by one thread,
// and its sum is written once: no atomics, and one order whatever the number of threads.
void decode_scatter(const Sparse& q, float* sums, int64_t threads, const Functions& f) {
  const int64_t pairs = q.B * q.k;
  Buffer<int64_t> end(q.n + 1);
  std::memset(end.get(), 0, size_t(q.n + 1) * sizeof(int64_t));
  for (int64_t p = 0; p < pairs; p++) end.get()[q.indices[p] + 1] += q.values[p] != 0;
  for (int64_t j = 0; j < q.n; j++) end.get()[j + 1] += end.get()[j];
  const int64_t used = end.get()[q.n];
  Buffer<int64_t> row(used);
  Buffer<float> weight(used);
  // end[j] moves from the first place of atom j to the one after its last
  for (int64_t b = 0; b < q.B; b++)
    for (int64_t p = b * q.k; p < (b + 1) * q.k; p++) {
      if (q.values[p] == 0) continue;
      const int64_t place = end.get()[q.indices[p]]++;
      row.get()[place] = b;
      weight.get()[place] = q.values[p];
    }
  each(q.n, 16, threads, [&](int64_t j) {
    const int64_t first = j ? end.get()[j - 1] : 0;
    f.combine(q.x, q.d, row.get() + first, weight.get() + first, end.get()[j] - first,
              sums + j * q.d);
  });
}

bool largest(const float* rows, int64_t B, int64_t n, int64_t k, int64_t* indices, float* values,
             int64_t threads, const Functions& f) {
  const int64_t room = 4 * k + 256;
  std::atomic<int64_t> next{0};
  std::atomic<bool> whole{true};
  parallel(threads, [&](int64_t) {
    Buffer<Candidate> held(room);
    for (int64_t b; (b = next.fetch_add(1)) < B;)
      if (!f.largest_of_row(rows + b * n, n, k, held.get(), room, indices + b * k, values + b * k))
        whole = false;
  });
  return whole;
}

}  // namespace mpsae
