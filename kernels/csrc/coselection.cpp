// Co-selection penalty on threads: positive products of the atoms that a row has chosen, and the
// gradient of the sum of their squares. Products of a block of rows are kept, each pair twice;
// then each atom's gradient is added up by one thread in the order of the rows.
#include <cstring>

#include "driver.h"

namespace mpsae {

namespace {

constexpr int64_t ROOM = int64_t(1) << 23;  // products of a block of rows

struct Block {
  const int64_t* indices;  // [rows, k]
  const float* live;       // [rows, k], 1 or 0
  int64_t rows;
};

// product [rows, k, k]: relu(<d_i, d_j>) where both are live and i != j; sum[b] of their squares / 2
void multiply(const Sparse& q, const Block& block, float* product, double* sum, int64_t threads,
              const Functions& f) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    Buffer<float> row(q.k);
    for (int64_t b; (b = next.fetch_add(1)) < block.rows;) {
      const int64_t* chosen = block.indices + b * q.k;
      const float* live = block.live + b * q.k;
      float* pairs = product + b * q.k * q.k;
      std::memset(pairs, 0, size_t(q.k * q.k) * sizeof(float));
      double total = 0;
      for (int64_t i = 1; i < q.k; i++) {
        if (live[i] == 0) continue;
        f.dots(q.dictionary, q.d, chosen, i, q.dictionary + chosen[i] * q.d, row.get());
        for (int64_t j = 0; j < i; j++) {
          const float overlap = live[j] != 0 && row.get()[j] > 0 ? row.get()[j] : 0;
          pairs[i * q.k + j] = pairs[j * q.k + i] = overlap;
          total += double(overlap) * overlap;
        }
      }
      sum[b] = total;
    }
  });
}

// gradient[j] += sum over the places of atom j of 2 sum_m product[place, m] d_m
void pull(const Sparse& q, const Block& block, const float* product, float* gradient,
          int64_t threads, const Functions& f) {
  const int64_t places = block.rows * q.k;
  Buffer<int64_t> end(q.n + 1);
  std::memset(end.get(), 0, size_t(q.n + 1) * sizeof(int64_t));
  for (int64_t p = 0; p < places; p++) end.get()[block.indices[p] + 1] += block.live[p] != 0;
  for (int64_t j = 0; j < q.n; j++) end.get()[j + 1] += end.get()[j];
  Buffer<int64_t> place(end.get()[q.n]);
  // end[j] moves from the first place of atom j to the one after its last
  for (int64_t p = 0; p < places; p++)
    if (block.live[p] != 0) place.get()[end.get()[block.indices[p]]++] = p;
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    Buffer<float> sum(q.d);
    for (int64_t j; (j = next.fetch_add(1)) < q.n;) {
      float* out = gradient + j * q.d;
      for (int64_t s = j ? end.get()[j - 1] : 0; s < end.get()[j]; s++) {
        const int64_t p = place.get()[s];
        f.combine(q.dictionary, q.d, block.indices + p / q.k * q.k, product + p * q.k, q.k,
                  sum.get());
        for (int64_t i = 0; i < q.d; i++) out[i] += 2 * sum.get()[i];
      }
    }
  });
}

}  // namespace

void coselection(const Sparse& q, double* sum, float* gradient, int64_t threads,
                 const Functions& f) {
  const int64_t square = q.k * q.k;
  int64_t rows = square > 0 && ROOM / square > 1 ? ROOM / square : 1;
  if (rows > q.B) rows = q.B;
  Buffer<float> product(rows * square);
  for (int64_t first = 0; first < q.B; first += rows) {
    const Block block = {q.indices + first * q.k, q.values + first * q.k,
                         rows < q.B - first ? rows : q.B - first};
    multiply(q, block, product.get(), sum + first, threads, f);
    if (gradient) pull(q, block, product.get(), gradient, threads, f);
  }
}

}  // namespace mpsae
