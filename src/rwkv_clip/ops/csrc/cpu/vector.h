// Vectors of 16 floats, matrix products of them, and the way of tensors into packed rows and back.
//
// Vectors are GCC's and clang's portable ones: one of AVX-512 where the processor has it, elsewhere several smaller
// ones, because compilers pass vectors that are larger than the processor's through memory.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

constexpr int BLOCK = 16;  // tokens of a block = lanes of a vector

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Part __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntPart __attribute__((vector_size(4 * LANES), may_alias));

#ifdef __AVX512F__
typedef Part Vec;
#else
struct __attribute__((may_alias, aligned(64))) Vec {
  Part part[BLOCK / LANES];
#define EACH(left, right) \
  for (int i = 0; i < BLOCK / LANES; i++) left right; \
  return *this
  Vec& operator+=(const Vec& x) { EACH(part[i], += x.part[i]); }
  Vec& operator*=(const Vec& x) { EACH(part[i], *= x.part[i]); }
  Vec& operator+=(float x) { EACH(part[i], += x); }
  Vec& operator*=(float x) { EACH(part[i], *= x); }
#undef EACH
};
inline Vec operator+(Vec a, const Vec& b) { return a += b; }
inline Vec operator*(Vec a, const Vec& b) { return a *= b; }
inline Vec operator+(Vec a, float b) { return a += b; }
inline Vec operator*(float a, Vec b) { return b *= a; }
#endif

inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// One of r, k, v, w, y, .. as (B, T, H, N), the channels adjacent; strides in elements.
struct View {
  void* data;
  int64_t b, t, h;
  int64_t is_bfloat16;
};

struct Shape {
  int64_t b, t, h, n;
  int64_t blocks() const { return (t + BLOCK - 1) / BLOCK; }
  int64_t width() const { return (n + BLOCK - 1) / BLOCK * BLOCK; }  // channels, rounded up to whole vectors
  int64_t vectors() const { return width() / BLOCK; }
  int64_t rows(int64_t block) const { return std::min<int64_t>(BLOCK, t - block * BLOCK); }
  int64_t size() const { return blocks() * BLOCK * width(); }
  bool pairwise() const { return t <= 2 * width() + BLOCK; }  // where both forms cost about the same
};

// Hands out a thread's scratch memory; without memory, only counts how much is needed.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* start = base ? base + used : nullptr;
    used += (floats + BLOCK - 1) / BLOCK * BLOCK;
    return start;
  }
};

// One head of x as packed rows of whole vectors; what lies beyond T and N is set to `fill`.
void load(const View& x, const Shape& s, int64_t b, int64_t h, float fill, float* out) {
  const int64_t width = s.width();
  for (int64_t t = 0; t < s.blocks() * BLOCK; t++, out += width) {
    int64_t n = 0;
    if (t < s.t) {
      const int64_t start = b * x.b + t * x.t + h * x.h;
      n = s.n;
      if (x.is_bfloat16) {
        const bf16* in = static_cast<const bf16*>(x.data) + start;
        for (int64_t i = 0; i < n; i++) out[i] = load(in[i]);
      } else {
        std::memcpy(out, static_cast<const float*>(x.data) + start, n * sizeof(float));
      }
    }
    std::fill(out + n, out + width, fill);
  }
}

void store(const float* in, const Shape& s, int64_t b, int64_t h, const View& x) {
  for (int64_t t = 0; t < s.t; t++, in += s.width()) {
    const int64_t start = b * x.b + t * x.t + h * x.h;
    if (!x.is_bfloat16) {
      std::memcpy(static_cast<float*>(x.data) + start, in, s.n * sizeof(float));
      continue;
    }
    bf16* out = static_cast<bf16*>(x.data) + start;
    for (int64_t i = 0; i < s.n; i++) store(out[i], in[i]);
  }
}

// exp(x) for x <= 80, zero below -88.
inline Part exponential(Part x) {
  const auto e = split_exponential<IntPart>(x < -88.0f ? Part{} - 88.0f : x);
  return (e.series * (e.rest * e.rest) + e.rest + 1.0f) * e.power;
}

// Raw decays -> w = exp(-exp(.)), in place, and log w if wanted. Capped at 80: 0 long before, and never 0 * inf.
void decay(float* w, float* log_w, const Shape& s) {
  for (int64_t i = 0; i < s.size(); i += LANES) {
    Part& x = *reinterpret_cast<Part*>(w + i);
    const Part negative = -exponential(x > 80.0f ? Part{} + 80.0f : x);
    x = exponential(negative);
    if (log_w) *reinterpret_cast<Part*>(log_w + i) = negative;
  }
}

// Beyond T and N the factor is 1, so that whole blocks can be multiplied.
void load_decay(const View& x, const Shape& s, int64_t b, int64_t h, float* w, float* log_w) {
  load(x, s, b, h, -100.0f, w);  // exp(-exp(-100)) = 1
  decay(w, log_w, s);
}

template <int ROWS, int COLS>
inline void tile(float* out, int64_t out_row, const float* a, int64_t a_row, int64_t a_col, const float* b,
                 int64_t b_row, int64_t count, bool add) {
  Vec sum[ROWS][COLS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < COLS; j++) sum[i][j] = add ? vec(out + i * out_row + j * BLOCK) : Vec{};
  for (int64_t c = 0; c < count; c++) {
    Vec right[COLS];
    for (int j = 0; j < COLS; j++) right[j] = vec(b + c * b_row + j * BLOCK);
    for (int i = 0; i < ROWS; i++) {
      const float left = a[i * a_row + c * a_col];
      for (int j = 0; j < COLS; j++) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < COLS; j++) vec(out + i * out_row + j * BLOCK) = sum[i][j];
}

template <int ROWS, int COLS>
inline int64_t tiles(float* out, int64_t out_row, int64_t first, int64_t rows, const float* a, int64_t a_row,
                     int64_t a_col, const float* b, int64_t b_row, int64_t count, bool add) {
  for (; rows - first > ROWS / 2; first += ROWS)
    tile<ROWS, COLS>(out + first * out_row, out_row, a + first * a_row, a_row, a_col, b, b_row, count, add);
  return first;
}

// out (+)= a b with a: rows x count, b: count x 16 * vectors. Rows are rounded up to 4: every matrix here has them.
void product(float* out, int64_t out_row, int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t a_col,
             const float* b, int64_t b_row, int64_t count, bool add) {
  constexpr bool wide = LANES == BLOCK;  // 32 registers of 16 lanes; else 16 of at most 8
  for (; wide && vectors >= 2; vectors -= 2, out += 2 * BLOCK, b += 2 * BLOCK) {
    const int64_t done = tiles<8, 2>(out, out_row, 0, rows, a, a_row, a_col, b, b_row, count, add);
    tiles<4, 2>(out, out_row, done, rows + 2, a, a_row, a_col, b, b_row, count, add);
  }
  for (; vectors; vectors--, out += BLOCK, b += BLOCK) {
    const int64_t done = wide ? tiles<16, 1>(out, out_row, 0, rows, a, a_row, a_col, b, b_row, count, add) : 0;
    tiles<4, 1>(out, out_row, done, rows + 2, a, a_row, a_col, b, b_row, count, add);
  }
}

#ifdef __AVX512F__

#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one only since 12
#define MIX(a, b, ...) __builtin_shuffle(a, b, IntPart{__VA_ARGS__})
#endif

// 16 x 16, from rows `in_row` apart to rows `out_row` apart.
void transpose16(const float* in, int64_t in_row, float* out, int64_t out_row) {
  Vec x[16], y[16];
  for (int i = 0; i < 16; i++) x[i] = vec(in + i * in_row);
  for (int i = 0; i < 8; i++) {  // four times: row i with row i + 8, interleaved
    y[2 * i] = MIX(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    y[2 * i + 1] = MIX(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 16; i++) x[i] = y[i];
    for (int i = 0; i < 8; i++) {
      y[2 * i] = MIX(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] = MIX(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
  for (int i = 0; i < 16; i++) vec(out + i * out_row) = y[i];
}

// Lane i of the result is the sum of all lanes of x[i].
inline Vec sums(const Vec* x) {
  Vec a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = MIX(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           MIX(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    b[i] = MIX(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           MIX(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    c[i] = MIX(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           MIX(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return MIX(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         MIX(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

#undef MIX

#else

void transpose16(const float* in, int64_t in_row, float* out, int64_t out_row) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j * out_row + i] = in[i * in_row + j];
}

inline Vec sums(const Vec* x) {
  alignas(64) float out[BLOCK];
  for (int i = 0; i < BLOCK; i++) {
    Part sum = x[i].part[0];
    for (int part = 1; part < BLOCK / LANES; part++) sum += x[i].part[part];
    out[i] = 0.0f;
    for (int lane = 0; lane < LANES; lane++) out[i] += sum[lane];
  }
  return vec(out);
}

#endif

// Rows of 16 tokens (16, width) -> (width, 16).
void transpose_block(const float* in, int64_t width, float* out) {
  for (int64_t n = 0; n < width; n += BLOCK) transpose16(in + n, width, out + n * BLOCK, BLOCK);
}

void transpose_state(const float* in, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += BLOCK)
    for (int64_t j = 0; j < width; j += BLOCK) transpose16(in + i * width + j, width, out + j * width + i, width);
}

// rows x 16 * vectors, every row times the same channels.
void scale_rows(float* x, const float* factor, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t n = 0; n < width; n += BLOCK) vec(x + i * width + n) *= vec(factor + n);
}

}  // namespace
