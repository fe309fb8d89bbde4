// Threads and blocks of rows around the functions of one instruction set.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mpsae {

// The best functions this CPU can run, or the named ones; null where it cannot run those.
const Functions* functions_for(const char* name);
bool has_bf16();

// GOMP_parallel of the OpenMP library that torch brought into this process, or null. Its threads
// wait for work by spinning for milliseconds after each of torch's own operators: threads of ours
// would have to share the cores with them.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMP open_mp();

// Call work(thread) on `threads` threads or fewer, this one included: work hands itself out as it
// is asked for. Throws std::bad_alloc where work threw.
template <class Work>
void parallel(int64_t threads, Work work) {
  struct Team {
    Work& work;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    static void run(void* self) {
      Team& team = *static_cast<Team*>(self);
      try {
        team.work(team.next.fetch_add(1));
      } catch (...) {
        team.failed = true;
      }
    }
  } team{work};
  if (threads == 1) {
    Team::run(&team);
  } else if (const OpenMP start = open_mp()) {
    start(Team::run, &team, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; i++) {
      try {
        others.emplace_back(Team::run, &team);
      } catch (const std::system_error&) {
        break;
      }
    }
    Team::run(&team);
    for (auto& other : others) other.join();
  }
  if (team.failed) throw std::bad_alloc();
}

// Ask for large pages behind memory not yet touched.
inline void large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
  // advice only: without it everything works, with more page faults
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Memory on cache lines, in large pages where it is large, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = size_t(count > 0 ? count : 1) * sizeof(T);
    align_ = std::align_val_t(bytes < LARGE ? 64 : LARGE);
    data_ = static_cast<T*>(::operator new(bytes, align_));
    if (bytes >= LARGE) large_pages(data_, bytes);
  }
  ~Buffer() { ::operator delete(data_, align_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr size_t LARGE = size_t(2) << 20;
  std::align_val_t align_;
  T* data_;
};

struct Gram {
  bool half;  // int16 entries
  int64_t threads;
  int64_t block_rows;  // rows whose correlations are computed at a time
  const float* product;  // [B, product_stride] <x, encoder_i>, or null: computed from `packed`
  int64_t product_stride;
};

// Every row from first to last step with the whole Gram at hand.
void pursue_gram(const Problem& p, const Gram& gram, const Functions& f);
// Every row with its correlations computed anew in each step from `packed`.
void pursue_stream(const Problem& p, int64_t threads, int64_t block_rows, const Functions& f);

// Rows that advance together, one step at a time, while somebody else brings the Gram rows.
class Session {
 public:
  Session(const Problem& p, const Functions& f, float* product, int64_t stride,
          int64_t threads, bool low);
  // Take a step: chosen[row] is the atom to be subtracted, -1 where the row is done. The output
  // `residual` is that of the step.
  int64_t choose(int64_t* chosen);
  // Subtract entries[slots[chosen[row]]] from the correlations of each live row.
  void subtract(const int16_t* entries, int64_t stride, const float* scale,
                const float* diagonal, const float* error, const int64_t* slots);
  // Take <residual, encoder_i>, computed anew by somebody else, as the correlations.
  void renew();

 private:
  Problem p_;
  const Functions& f_;
  int64_t threads_;
  Buffer<Row> rows_;
  Buffer<float> maxima_;
  Buffer<double> residual_;
  Buffer<uint64_t> scored_;
};

double pack_encoder(const float* encoder, int64_t n, int64_t d, uint32_t* packed, int64_t threads);
double largest_norm(const float* rows, int64_t n, int64_t d, int64_t threads, const Functions& f);
void quantise_rows(const float* product, int64_t rows, int64_t n, int64_t product_stride,
                   const int64_t* atoms, const double* rounding, int16_t* entries, int64_t stride,
                   float* scale, float* diagonal, float* error, int64_t threads,
                   const Functions& f);
void reverse(const Backward& q, int64_t threads, const Functions& f);
// y [B, d]: the chosen atoms, weighted by the values, added up
void decode(const Sparse& q, float* y, int64_t threads, const Functions& f);
// products [B, k] of x with the chosen atoms
void decode_dots(const Sparse& q, float* products, int64_t threads, const Functions& f);
// sums [n, d]: for each atom the x that chose it, weighted by the values, added up
void decode_scatter(const Sparse& q, float* sums, int64_t threads, const Functions& f);
// the k largest of each row of [B, n], largest first; false where a row has fewer than k that are
// not NaN
bool largest(const float* rows, int64_t B, int64_t n, int64_t k, int64_t* indices, float* values,
             int64_t threads, const Functions& f);
// of the atoms that a row has chosen (values 1, or 0 for places to leave out): sum [B] of their
// squared positive products, and the gradient [n, d] of its total, added to, if not null
void coselection(const Sparse& q, double* sum, float* gradient, int64_t threads,
                 const Functions& f);
// orthogonal matching pursuit of every row, its correlations with all atoms at hand
void orthogonal(const Orthogonal& q, int64_t threads, const Functions& f);

}  // namespace mpsae
