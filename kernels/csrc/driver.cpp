#include "driver.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace mpsae {

namespace {

constexpr double EPS = 1.1920929e-7;
constexpr double TINY = 1.1754944e-38;
constexpr int64_t SLOTS = 3;

int64_t blocks_of(int64_t n) { return (round_up(n, PAD) + BLOCK - 1) / BLOCK; }

bool finite(double value) { return std::fabs(value) < std::numeric_limits<double>::infinity(); }

// NaN stays once it is there.
void keep_larger(double& most, double value) {
  if (value > most || value != value) most = value;
}

// Rounding bound of an fp32 product of a vector of this norm with every encoder row, bias added.
double product_bound(const Problem& p, double norm) {
  if (norm == 0) return 0;
  return EPS * ((double(p.d) + 2) * norm * p.encoder_norm + p.bias_size) +
         TINY * double(p.d) * (4 + norm + p.encoder_norm);
}

double packed_bound(const Problem& p, double norm, double miss) {
  if (norm == 0) return 0;
  return (miss * p.encoder_norm + (norm + miss) * p.packed_error) * (1 + 1e-6) +
         product_bound(p, norm + miss);
}

// Where row `at` of a block goes among the packed rows.
uint32_t* place(uint32_t* packed, int64_t at, int64_t pairs) {
  return packed + at / TILE_B * TILE_B * pairs + at % TILE_B;
}

// Begin a row: the residual in fp64, its norm, no step taken. False where it is not finite.
bool open_row(const Problem& p, Row& row, int64_t b) {
  row.row = b;
  row.t = 0;
  row.limit = p.k;
  if (p.k_rows) row.limit = p.k_rows[b] < p.k ? p.k_rows[b] : p.k;
  row.excess = 0;
  row.count = 0;
  double sum = 0;
  for (int64_t i = 0; i < p.d; i++) {
    row.residual[i] = p.x[b * p.d + i];
    sum += row.residual[i] * row.residual[i];
  }
  row.norm = std::sqrt(sum);
  return finite(row.norm) && finite(p.encoder_norm) && finite(p.bias_size);
}

void close_row(const Problem& p, const Row& row) {
  p.steps[row.row] = row.t;
  for (int64_t i = 0; i < p.d; i++) p.residual[row.row * p.d + i] = float(row.residual[i]);
}

void products(const Problem& p, const uint32_t* rows, int64_t count, float* out, int64_t stride) {
  product_bf16(rows, round_up(count, TILE_B) / TILE_B, p.packed, p.n, (p.d + 1) / 2, out, stride);
}

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
        scored_(SLOTS * p.n) {
    for (int64_t s = 0; s < SLOTS; s++) {
      rows_[s].maxima = maxima_.get() + s * blocks_of(p.n) * f.lanes;
      rows_[s].residual = residual_.get() + s * p.d;
      rows_[s].candidates = candidates_.get() + s * p.n;
      rows_[s].scored = scored_.get() + s * p.n;
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
  Buffer<double> scored_;
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
    Buffer<double> scored(p.n);
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

Session::Session(const Problem& p, const Functions& f, float* product, int64_t stride,
                 int64_t threads, bool low)
    : p_(p),
      f_(f),
      threads_(threads),
      rows_(p.B),
      maxima_(p.B * blocks_of(p.n) * f.lanes),
      residual_(p.B * p.d) {
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
    Buffer<double> scored(p_.n);
    for (int64_t b; (b = next.fetch_add(1)) < p_.B;) {
      Row& row = rows_.get()[b];
      chosen[b] = -1;
      if (!row.live) continue;
      row.candidates = candidates.get();
      row.scored = scored.get();
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

double pack_encoder(const float* encoder, int64_t n, int64_t d, uint32_t* packed,
                    int64_t threads) {
  const int64_t pairs = (d + 1) / 2, panels = round_up(n, TILE_N) / TILE_N;
  std::atomic<int64_t> next{0};
  std::vector<double> worst(size_t(threads), 0.0);
  parallel(threads, [&](int64_t thread) {
    for (int64_t q; (q = next.fetch_add(1)) < panels;) {
      uint32_t* panel = packed + q * pairs * TILE_N;
      for (int64_t a = 0; a < TILE_N; a++) {
        const int64_t atom = q * TILE_N + a;
        if (atom >= n) {
          for (int64_t i = 0; i < pairs; i++) panel[i * TILE_N + a] = 0;
          continue;
        }
        const double miss = pack_bf16(encoder + atom * d, d, panel + a, TILE_N);
        keep_larger(worst[size_t(thread)], miss);
      }
    }
  });
  double most = 0;
  for (double miss : worst) keep_larger(most, miss);
  return most;
}

double largest_norm(const float* rows, int64_t n, int64_t d, int64_t threads, const Functions& f) {
  std::atomic<int64_t> next{0};
  std::vector<double> most(size_t(threads), 0.0);
  constexpr int64_t CHUNK = 64;
  parallel(threads, [&](int64_t thread) {
    for (int64_t first; (first = next.fetch_add(CHUNK)) < n;)
      for (int64_t j = first; j < n && j < first + CHUNK; j++)
        keep_larger(most[size_t(thread)], f.norm(rows + j * d, d));
  });
  double top = 0;
  for (double size : most) keep_larger(top, size);
  return top;
}

void quantise_rows(const float* product, int64_t rows, int64_t n, int64_t product_stride,
                   const int64_t* atoms, const double* rounding, int16_t* entries, int64_t stride,
                   float* scale, float* diagonal, float* error, int64_t threads,
                   const Functions& f) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < rows;)
      f.quantise(product + i * product_stride, n, atoms[i], rounding[i], entries + i * stride,
                 stride, scale + i, diagonal + i, error + i);
  });
}

void reverse(const Backward& q, int64_t threads, const Functions& f) {
  std::atomic<int64_t> next{0};
  constexpr int64_t CHUNK = 8;
  parallel(threads, [&](int64_t) {
    for (int64_t first; (first = next.fetch_add(CHUNK)) < q.B;)
      for (int64_t b = first; b < q.B && b < first + CHUNK; b++) {
        float* g = q.grad_x + b * q.d;
        if (q.grad_residual)
          std::memcpy(g, q.grad_residual + b * q.d, size_t(q.d) * sizeof(float));
        else
          std::memset(g, 0, size_t(q.d) * sizeof(float));
        f.backward_row(q, b, g);
      }
  });
  const int64_t units = round_up(q.d, PAD) / PAD;
  const int64_t slices = threads < units ? threads : units;
  std::atomic<int64_t> slice{0};
  parallel(slices, [&](int64_t) {
    Buffer<float> r(q.d), g(q.d);
    for (int64_t s; (s = slice.fetch_add(1)) < slices;) {
      const int64_t first = s * units / slices * PAD;
      const int64_t last = (s + 1) * units / slices * PAD;
      f.backward_columns(q, first, last < q.d ? last : q.d, r.get(), g.get());
    }
  });
}

bool has_bf16() {
#if defined(MPSAE_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

const Functions* functions_for(const char* name) {
  const bool any = !*name;
#if defined(MPSAE_X86)
  __builtin_cpu_init();
  if ((any || !std::strcmp(name, "avx512")) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return &avx512_functions;
  if ((any || !std::strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return &avx2_functions;
#endif
  return any || !std::strcmp(name, "plain") ? &plain_functions : nullptr;
}

}  // namespace mpsae
