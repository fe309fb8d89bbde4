// Pursuits whose rows advance together, a step at a time.
#include <cstring>

#include "rows.h"

namespace mpsae {

Session::Session(const Problem& p, const Functions& f, float* product, int64_t stride,
                 int64_t threads, bool low)
    : p_(p),
      f_(f),
      threads_(threads),
      rows_(p.B),
      maxima_(p.B * blocks_of(p.n) * f.lanes),
      residual_(p.B * p.d),
      scored_(p.B * words(p.n)) {
  std::atomic<int64_t> next{0};
  const int64_t pairs = (p.d + 1) / 2;
  parallel(threads_, [&](int64_t) {
    Buffer<uint32_t> packed(TILE_B * pairs);
    std::memset(packed.get(), 0, size_t(TILE_B * pairs) * sizeof(uint32_t));
    for (;;) {
      const int64_t first = next.fetch_add(TILE_B);
      if (first >= p_.B) return;
      const int64_t last = first + TILE_B < p_.B ? first + TILE_B : p_.B;
      double miss[TILE_B];
      if (low) {
        for (int64_t b = first; b < last; b++)
          miss[b - first] = pack_bf16(p_.x + b * p_.d, p_.d, packed.get() + b - first, TILE_B);
        products(p_, packed.get(), last - first, product + first * stride, stride);
      }
      for (int64_t b = first; b < last; b++) {
        Row& row = rows_.get()[b];
        row.correlation = product + b * stride;
        row.maxima = maxima_.get() + b * blocks_of(p_.n) * f_.lanes;
        row.residual = residual_.get() + b * p_.d;
        row.scored = scored_.get() + b * words(p_.n);
        row.live = open_row(p_, row, b);
        if (!row.live) {
          close_row(p_, row);
          continue;
        }
        row.bound = low ? packed_bound(p_, row.norm, miss[b - first])
                        : product_bound(p_, row.norm);
        f_.start(p_, row);
      }
    }
  });
}

int64_t Session::choose(int64_t* chosen) {
  std::atomic<int64_t> next{0}, live{0};
  parallel(threads_, [&](int64_t) {
    Buffer<int32_t> candidates(p_.n);
    Buffer<double> exact(p_.n);
    for (int64_t b; (b = next.fetch_add(1)) < p_.B;) {
      Row& row = rows_.get()[b];
      chosen[b] = -1;
      if (!row.live) continue;
      row.candidates = candidates.get();
      row.exact = exact.get();
      row.live = f_.scan(p_, row) && f_.decide(p_, row);
      close_row(p_, row);
      if (row.live) {
        chosen[b] = row.atom;
        live++;
      }
    }
  });
  return live;
}

void Session::renew() {
  std::atomic<int64_t> next{0};
  parallel(threads_, [&](int64_t) {
    for (int64_t b; (b = next.fetch_add(1)) < p_.B;) {
      Row& row = rows_.get()[b];
      if (!row.live) continue;
      row.bound = product_bound(p_, row.norm);
      row.excess = 0;
      f_.start(p_, row);
    }
  });
}

void Session::subtract(const int16_t* entries, int64_t stride, const float* scale,
                       const float* diagonal, const float* error, const int64_t* slots) {
  std::atomic<int64_t> next{0};
  parallel(threads_, [&](int64_t) {
    for (int64_t b; (b = next.fetch_add(1)) < p_.B;) {
      Row& row = rows_.get()[b];
      if (!row.live) continue;
      const int64_t slot = slots[row.atom];
      f_.subtract16(p_, row, entries + slot * stride, scale[slot], diagonal[slot], error[slot],
                    nullptr);
    }
  });
}

}  // namespace mpsae
