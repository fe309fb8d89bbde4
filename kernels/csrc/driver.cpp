// Which functions this CPU runs, and the work on whole matrices.
#include "driver.h"

#include <cmath>
#include <cstring>
#include <string>

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace mpsae {

namespace {

// NaN stays once it is there.
void keep_larger(double& most, double value) {
  if (value > most || value != value) most = value;
}

}  // namespace

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

OpenMP open_mp() {
#if defined(__GLIBC__)
  static const OpenMP found = [] {
    std::string path;
    const auto look = [](dl_phdr_info* library, size_t, void* data) {
      std::string& best = *static_cast<std::string*>(data);
      const std::string name = library->dlpi_name ? library->dlpi_name : "";
      const size_t slash = name.rfind('/');
      const std::string file = slash == std::string::npos ? name : name.substr(slash + 1);
      for (const char* start : {"libgomp", "libomp", "libiomp"})
        if (file.rfind(start, 0) == 0 &&
            (best.empty() || name.find("torch") != std::string::npos))
          best = name;
      return 0;
    };
    dl_iterate_phdr(look, &path);
    void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<OpenMP>(dlsym(library, "GOMP_parallel")) : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
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
