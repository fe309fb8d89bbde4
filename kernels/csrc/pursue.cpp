// Whole pursuits: with the Gram at hand, and with correlations computed anew in each step.
#include <cstring>
#include <utility>

#include "rows.h"

namespace mpsae {

namespace {

constexpr int64_t SLOTS = 3;

// Rows waiting for a slot, and where their products <x, encoder_i> lie.
struct Waiting {
  std::atomic<int64_t>* next;
  int64_t first, last;
  float* product;
  int64_t stride;
  const double* miss;  // [last - first] rounding of the packed rows, or null
};

enum class State { EMPTY, SCANNED, DECIDED };

// Carry rows through all their steps, SLOTS at a time: while the correlations of one are updated,
// the Gram row of the next and the atoms of the one after it are on their way from memory.
class Carousel {
 public:
  Carousel(const Problem& p, const Functions& f, bool half)
      : p_(p),
        f_(f),
        half_(half),
        maxima_(SLOTS * blocks_of(p.n) * f.lanes),
        residual_(SLOTS * p.d),
        candidates_(SLOTS * p.n),
        exact_(SLOTS * p.n),
        scored_(SLOTS * words(p.n)) {
    for (int64_t s = 0; s < SLOTS; s++) {
      rows_[s].maxima = maxima_.get() + s * blocks_of(p.n) * f.lanes;
      rows_[s].residual = residual_.get() + s * p.d;
      rows_[s].candidates = candidates_.get() + s * p.n;
      rows_[s].exact = exact_.get() + s * p.n;
      rows_[s].scored = scored_.get() + s * words(p.n);
    }
  }

  void run(const Waiting& waiting) {
    State state[SLOTS] = {State::EMPTY, State::EMPTY, State::EMPTY};
    bool more = true;
    for (int64_t s = 0;; s = (s + 1) % SLOTS) {
      const int64_t after = (s + 1) % SLOTS;
      if (state[after] == State::SCANNED) state[after] = decide(rows_[after]);
      if (state[s] == State::DECIDED) {
        const bool known = state[after] == State::DECIDED;
        subtract(rows_[s], known ? entries(rows_[after].atom) : nullptr);
        state[s] = scan(rows_[s]);
      }
      while (state[s] == State::EMPTY && more) {
        const int64_t b = waiting.next->fetch_add(1);
        more = b < waiting.last;
        if (more) state[s] = open(rows_[s], b, waiting);
      }
      bool idle = !more;
      for (int64_t i = 0; i < SLOTS; i++) idle &= state[i] == State::EMPTY;
      if (idle) return;
    }
  }

 private:
  const void* entries(int64_t atom) const {
    const int64_t bytes = half_ ? sizeof(int16_t) : sizeof(float);
    return static_cast<const char*>(p_.entries) + atom * p_.stride * bytes;
  }

  State open(Row& row, int64_t b, const Waiting& waiting) {
    if (!open_row(p_, row, b)) {
      close_row(p_, row);
      return State::EMPTY;
    }
    row.correlation = waiting.product + (b - waiting.first) * waiting.stride;
    row.bound = waiting.miss ? packed_bound(p_, row.norm, waiting.miss[b - waiting.first])
                             : product_bound(p_, row.norm);
    f_.start(p_, row);
    return scan(row);
  }

  State scan(Row& row) {
    if (f_.scan(p_, row)) return State::SCANNED;
    close_row(p_, row);
    return State::EMPTY;
  }

  State decide(Row& row) {
    if (f_.decide(p_, row)) return State::DECIDED;
    close_row(p_, row);
    return State::EMPTY;
  }

  void subtract(Row& row, const void* next) {
    const int64_t j = row.atom;
    if (half_)
      f_.subtract16(p_, row, static_cast<const int16_t*>(entries(j)), p_.scale[j],
                    p_.diagonal[j], p_.error[j], next);
    else
      f_.subtract32(p_, row, static_cast<const float*>(entries(j)), 1.0f, p_.diagonal[j],
                    p_.error[j], next);
  }

  const Problem& p_;
  const Functions& f_;
  bool half_;
  Row rows_[SLOTS];
  Buffer<float> maxima_;
  Buffer<double> residual_;
  Buffer<int32_t> candidates_;
  Buffer<double> exact_;
  Buffer<uint64_t> scored_;
};

}  // namespace

void pursue_gram(const Problem& p, const Gram& gram, const Functions& f) {
  std::atomic<int64_t> next{0};
  if (gram.product) {
    parallel(gram.threads, [&](int64_t) {
      Carousel carousel(p, f, gram.half);
      carousel.run({&next, 0, p.B, const_cast<float*>(gram.product), gram.product_stride, nullptr});
    });
    return;
  }
  const int64_t stride = round_up(p.n, PAD);
  const int64_t pairs = (p.d + 1) / 2;
  const int64_t block = round_up(gram.block_rows, TILE_B);
  parallel(gram.threads, [&](int64_t) {
    Carousel carousel(p, f, gram.half);
    Buffer<uint32_t> packed(block * pairs);
    Buffer<float> product(block * stride);
    Buffer<double> miss(block);
    std::memset(packed.get(), 0, size_t(block * pairs) * sizeof(uint32_t));
    for (;;) {
      const int64_t first = next.fetch_add(block);
      if (first >= p.B) return;
      const int64_t last = first + block < p.B ? first + block : p.B;
      for (int64_t b = first; b < last; b++)
        miss.get()[b - first] =
            pack_bf16(p.x + b * p.d, p.d, place(packed.get(), b - first, pairs), TILE_B);
      products(p, packed.get(), last - first, product.get(), stride);
      std::atomic<int64_t> waiting{first};
      carousel.run({&waiting, first, last, product.get(), stride, miss.get()});
    }
  });
}

void pursue_stream(const Problem& p, int64_t threads, int64_t block_rows, const Functions& f) {
  std::atomic<int64_t> next{0};
  const int64_t stride = round_up(p.n, PAD);
  const int64_t pairs = (p.d + 1) / 2;
  const int64_t block = round_up(block_rows, TILE_B);
  parallel(threads, [&](int64_t) {
    Buffer<uint32_t> packed(block * pairs);
    Buffer<float> product(block * stride);
    Buffer<float> narrow(p.d);
    Buffer<Row> rows(block);
    Buffer<double> residual(block * p.d);
    Buffer<float> maxima(blocks_of(p.n) * f.lanes);
    Buffer<int32_t> candidates(p.n);
    Buffer<double> exact(p.n);
    Buffer<uint64_t> scored(words(p.n));
    std::memset(packed.get(), 0, size_t(block * pairs) * sizeof(uint32_t));
    for (;;) {
      const int64_t first = next.fetch_add(block);
      if (first >= p.B) return;
      const int64_t last = first + block < p.B ? first + block : p.B;
      int64_t live = 0;
      for (int64_t b = first; b < last; b++) {
        Row& row = rows.get()[live];
        row.residual = residual.get() + live * p.d;
        row.maxima = maxima.get();
        row.candidates = candidates.get();
        row.exact = exact.get();
        row.scored = scored.get();
        if (open_row(p, row, b))
          live++;
        else
          close_row(p, row);
      }
      while (live) {
        for (int64_t i = 0; i < live; i++) {
          Row& row = rows.get()[i];
          for (int64_t l = 0; l < p.d; l++) narrow.get()[l] = float(row.residual[l]);
          const double miss =
              pack_bf16(narrow.get(), p.d, place(packed.get(), i, pairs), TILE_B);
          row.bound = packed_bound(p, row.norm, miss + EPS * row.norm);
        }
        products(p, packed.get(), live, product.get(), stride);
        int64_t kept = 0;
        for (int64_t i = 0; i < live; i++) {
          Row& row = rows.get()[i];
          row.correlation = product.get() + i * stride;
          row.excess = 0;
          f.start(p, row);
          if (!f.scan(p, row) || !f.decide(p, row)) {
            close_row(p, row);
            continue;
          }
          // finished rows make room: live ones stay together, each with its own residual
          std::swap(rows.get()[kept++], row);
        }
        live = kept;
      }
    }
  });
}

}  // namespace mpsae
