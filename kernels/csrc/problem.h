// What the parts of the CPU kernel share: the problem, the state of a row, the table of functions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpsae {

// Correlations are watched in blocks of BLOCK atoms; rows of n floats or entries are padded to PAD.
constexpr int64_t BLOCK = 256;
constexpr int64_t PAD = 32;
// The low precision product: rows and atoms of one register tile.
constexpr int64_t TILE_B = 12;
constexpr int64_t TILE_N = 32;

static constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

static constexpr int64_t words(int64_t n) { return (n + 63) / 64; }

enum Select : int { RELU = 0, MAX = 1, ABS = 2 };

struct Problem {
  const float* x;           // [B, d]
  const float* dictionary;  // [n, d]
  const float* encoder;     // [n, d]
  const float* bias;        // [n] or null
  int64_t B, d, n, k;

  // Gram: <dictionary_j, encoder_i> = scale[j] * entries[j, i] for i != j, entries[j, j] = 0
  const void* entries;  // [n, stride] int16 or fp32
  const float* scale;   // [n], null for fp32 entries
  const float* diagonal;
  const float* error;
  int64_t stride;

  const uint32_t* packed;  // bf16 encoder, [n / 32, d / 2, 32] pairs of columns, or null
  double encoder_norm;     // max ||encoder_i||
  double dictionary_norm;  // max ||dictionary_j||
  double packed_error;     // max ||encoder_i - bf16(encoder_i)||
  double bias_size;        // max |bias_i|

  const int64_t* k_rows;  // [B] or null
  const int64_t* slices;  // [k, 2] or null
  double residual_threshold, correlation_threshold;
  int select;
  bool stop_on_repeat, allow_repeats, certified;

  int64_t* indices;  // [B, k]
  float* values;     // [B, k]
  float* residual;   // [B, d]
  int64_t* steps;    // [B]
  int64_t* rescored;  // [B]
};

// One row under way. `bound` is the most that a correlation may be off from <r, encoder_i> +
// bias_i; `drift` is the same for atoms that were scored: their exact correlation was once put in
// place, so they carry what came after only.
struct Row {
  float* correlation;  // [round_up(n, PAD)], NaN where padded or banned
  float* maxima;       // [blocks, lanes] running maxima, one vector a block
  double* residual;    // [d]
  int32_t* candidates;  // [n]
  double* exact;        // [n] exact correlations of the candidates, NaN where not needed
  uint64_t* scored;     // [n / 64] one bit an atom
  double bound, drift, norm, value, best;
  int64_t row, t, limit, atom;
  int64_t count;   // candidates of this step
  int64_t excess;  // candidates scored since the last refresh
  float top;       // largest score of the row
  bool live;
};

struct Backward {
  const float *dictionary, *encoder;  // [n, d]
  const int64_t* indices;             // [B, k]
  const float* values;                // [B, k]
  const float* residual;              // [B, d]
  const int64_t* steps;               // [B]
  const float* grad_residual;         // [B, d] or null
  const float* grad_values;           // [B, k] or null
  int64_t B, d, n, k;
  bool relu, detach, tied;
  float* share;            // [B, k] scratch: what reaches <r_t, encoder_j>
  float* grad_x;           // [B, d]
  float* grad_dictionary;  // [n, d], zero at the start
  float* grad_encoder;     // [n, d], zero at the start; grad_dictionary where tied
  float* grad_bias;        // [n], zero at the start, or null
};

struct Candidate {
  float value;
  int64_t index;
};

struct Sparse {
  const int64_t* indices;   // [B, k], from 0 to n - 1
  const float* values;      // [B, k], those of 0 are skipped
  const float* x;           // [B, d]
  const float* dictionary;  // [n, d]
  int64_t B, d, n, k;
};

struct Orthogonal {
  const float* x;           // [B, d]
  const float* dictionary;  // [n, d]
  const float* gram;        // [n, n] dictionary . dictionary^T
  float* correlation;       // [B, n] x . dictionary^T, overwritten
  const int64_t* k_rows;    // [B] or null
  int64_t B, d, n, k;
  int select;
  bool nonnegative, gradient;  // gradient: one step along it in place of the fit
  double residual_threshold, correlation_threshold;
  int64_t* indices;  // [B, k]
  float* values;     // [B, k]
  int64_t* steps;    // [B]
};

// What a thread needs beside, for rows of `room` atoms at most; stride > room, a multiple of 8.
struct OrthogonalScratch {
  float* correlation;  // [n] of the step
  float* maxima;       // one vector a tile
  const float** rows;  // [room] Gram rows of the atoms that are not 0
  float* weight;       // [room] their values
  double* span;        // [room, stride] inverse of the Gram of the atoms taken
  double* fit;         // [room, stride] of those fitted, where nonnegative
  double* pairs;       // [room, stride] the Gram of the atoms taken, where nonnegative or gradient
  int64_t stride;
  double *start, *value;            // [stride] by order of selection: <x, d_s>, v_s
  double *g, *u, *target;           // [stride] by order in the inverse
  double *gradient, *change;        // [stride]
  double* residual;                 // [d]
  int64_t* members;                 // [room] the atoms fitted, places in the order of selection
  bool* fitted;                     // [room]
};

// The same functions, compiled for one instruction set each.
struct Functions {
  const char* name;
  int64_t lanes;
  // products <r, encoder_i> -> correlations with bias, bans and maxima
  void (*start)(const Problem&, Row&);
  // collect the candidates of the next step; false where the row is done
  bool (*scan)(const Problem&, Row&);
  // choose among the candidates, record, subtract from the residual; false where the row is done
  bool (*decide)(const Problem&, Row&);
  // subtract one Gram row from the correlations while `next` is fetched into the cache
  void (*subtract16)(const Problem&, Row&, const int16_t* entries, float scale, float diagonal,
                     float error, const void* next);
  void (*subtract32)(const Problem&, Row&, const float* entries, float scale, float diagonal,
                     float error, const void* next);
  // one fp32 Gram row -> entries, scale, diagonal, error
  void (*quantise)(const float* product, int64_t n, int64_t diagonal_at, double rounding,
                   int16_t* entries, int64_t stride, float* scale, float* diagonal, float* error);
  double (*norm)(const float* row, int64_t d);
  void (*backward_row)(const Backward&, int64_t row, float* g);
  void (*backward_columns)(const Backward&, int64_t first, int64_t last, float* r, float* g);
  // out [d] = sum of weight[p] * rows[index[p]], and out[p] = <x, rows[index[p]]>
  void (*combine)(const float* rows, int64_t d, const int64_t* index, const float* weight,
                  int64_t count, float* out);
  void (*dots)(const float* rows, int64_t d, const int64_t* index, int64_t count, const float* x,
               float* out);
  bool (*largest_of_row)(const float* row, int64_t n, int64_t k, Candidate* held, int64_t room,
                         int64_t* indices, float* values);
  void (*orthogonal_row)(const Orthogonal&, int64_t row, const OrthogonalScratch&);
};

extern const Functions plain_functions;
#if defined(__x86_64__) && defined(__GNUC__)
#define MPSAE_X86 1
extern const Functions avx2_functions;
extern const Functions avx512_functions;
#endif

// correlations [groups * TILE_B, stride] of packed rows with every atom of the packed encoder
void product_bf16(const uint32_t* rows, int64_t groups, const uint32_t* packed, int64_t n,
                  int64_t pairs, float* correlation, int64_t stride);
// v [d] to bf16, columns 2i and 2i + 1 in out[i * stride]; returns ||v - bf16(v)||
double pack_bf16(const float* v, int64_t d, uint32_t* out, int64_t stride);

}  // namespace mpsae
