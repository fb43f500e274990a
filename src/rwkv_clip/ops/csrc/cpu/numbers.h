// Numbers that both CPU kernels compute with: bfloat16 and the exponential function.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void store(float& out, float x) { out = x; }
// Rounds to nearest, ties to even; a NaN stays one.
inline void store(bf16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// exp(x) = (1 + rest + rest^2 series) power, to about one unit in the last place: power is 2^n, the rest the polynomial of
// Cephes (expf.c). Float and Int: numbers or vectors of GCC and clang. For -88 <= x <= 88; NaN stays NaN. Users multiply
// out themselves: the order of the products is part of their results' last bit.
template <class Float>
struct Exponential {
  Float rest, series, power;
};
template <class Int, class Float>
inline Exponential<Float> split_exponential(Float x) {
  const Float magic = Float{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Float shifted = x * 1.44269504f + magic;
  const Float n = shifted - magic;
  const Float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Float power;
  std::memcpy(&power, &bits, sizeof power);
  return {rest, series, power};
}

}  // namespace
