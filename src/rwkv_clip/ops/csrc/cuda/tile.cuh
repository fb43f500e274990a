// Algebra of 16 x 16 tiles, one tile per warp.
//
// A lane (g = lane / 4, q = lane % 4) holds eight numbers of a tile, in four blocks b of 8 x 8 and two neighbours e:
//   row g + 8 (b & 1), column 2 q + e + 8 (b >> 1), at index 2 b + e.
// This is what mma.m16n8k16 takes as its first operand and gives as a result, and as second operand it is the transposed
// tile; so values, operands and results all have one layout, and `multiply` is c += a b^T without moving anything.
#pragma once
#include <type_traits>

#include "ptx.cuh"

// Kinds of numbers in global memory. Operands of products are bfloat16, or, for float32, three bfloat16 parts each.
struct Bf16 {};
struct Fp16 {};
struct Fp32 {};

struct Values {  // eight float32 numbers of a tile
  float x[8];
};

template <class Kind>
struct TileOf;  // a tile as operand of products
template <>
struct alignas(16) TileOf<Bf16> {
  using Element = uint16_t;
  static constexpr int PAD = 8;  // elements after a row: rows then start at different banks
  uint32_t x[4];
};
template <>
struct alignas(16) TileOf<Fp32> {
  using Element = float;
  static constexpr int PAD = 4;
  float x[8];
};
template <class Io>
struct OperandOf {
  using Kind = Bf16;
};
template <>
struct OperandOf<Fp32> {
  using Kind = Fp32;
};
template <class Io>
using Tile = TileOf<typename OperandOf<Io>::Kind>;

struct Lane {
  int index, g, q;
};
DEVICE Lane this_lane() {
  int lane = int(threadIdx.x) % 32;
  return {lane, lane / 4, lane % 4};
}

DEVICE constexpr int row_of(Lane lane, int i) { return lane.g + 8 * ((i / 2) & 1); }
DEVICE constexpr int column_of(Lane lane, int i) { return 2 * lane.q + (i & 1) + 8 * (i / 4); }

DEVICE Values filled(float value) {
  Values y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = value;
  return y;
}
DEVICE Values operator*(const Values& a, const Values& b) {
  Values y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = a.x[i] * b.x[i];
  return y;
}
DEVICE void add_product(Values& y, const Values& a, const Values& b) {
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] += a.x[i] * b.x[i];
}

// ---- values <-> operands -----------------------------------------------------------------------------------------

DEVICE void pack(TileOf<Bf16>& y, const Values& v) {
#pragma unroll
  for (int b = 0; b < 4; ++b) y.x[b] = pack_bf16(v.x[2 * b], v.x[2 * b + 1]);
}
DEVICE void pack(TileOf<Fp32>& y, const Values& v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = v.x[i];
}
DEVICE Values unpack(const TileOf<Bf16>& t) {
  Values y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = unpack_bf16(t.x[i / 2], i & 1);
  return y;
}
DEVICE Values unpack(const TileOf<Fp32>& t) {
  Values y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = t.x[i];
  return y;
}
template <class Io>
DEVICE Tile<Io> packed(const Values& v) {
  Tile<Io> y;
  pack(y, v);
  return y;
}

DEVICE TileOf<Bf16> transposed(const TileOf<Bf16>& t) {
  return {transpose_8x8(t.x[0]), transpose_8x8(t.x[2]), transpose_8x8(t.x[1]), transpose_8x8(t.x[3])};
}
DEVICE TileOf<Fp32> transposed(const TileOf<Fp32>& t) {
  Lane lane = this_lane();
  TileOf<Fp32> y;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int b = i / 2, from = b == 1 ? 2 : b == 2 ? 1 : b, source = (2 * lane.q + (i & 1)) * 4 + lane.g / 2;
    float even = shuffle(t.x[2 * from], source), odd = shuffle(t.x[2 * from + 1], source);
    y.x[i] = lane.g & 1 ? odd : even;
  }
  return y;
}

// Element pairs of the block (row g, columns 2 q, 2 q + 1) as one word; a set half keeps an element.
DEVICE uint32_t pair_mask(bool low, bool high) { return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u); }

// The tile with block b reduced to its mask.
DEVICE TileOf<Bf16> masked(const TileOf<Bf16>& t, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  return {t.x[0] & m0, t.x[1] & m1, t.x[2] & m2, t.x[3] & m3};
}
DEVICE TileOf<Fp32> masked(const TileOf<Fp32>& t, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  uint32_t masks[4] = {m0, m1, m2, m3};
  TileOf<Fp32> y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = masks[i / 2] & (i & 1 ? 0xffff0000u : 0xffffu) ? t.x[i] : 0.f;
  return y;
}

// ---- shared memory -----------------------------------------------------------------------------------------------
// `corner` is the tile's first element, `pitch` the distance of rows in elements. All lanes call together.

DEVICE void load_tile(TileOf<Bf16>& t, const uint16_t* corner, int pitch) {
  int lane = this_lane().index, b = lane / 8;
  load_matrices(t.x, corner + (lane % 8 + 8 * (b & 1)) * pitch + 8 * (b >> 1));
}
DEVICE void load_tile_transposed(TileOf<Bf16>& t, const uint16_t* corner, int pitch) {
  int lane = this_lane().index, b = lane / 8;
  load_matrices_transposed(t.x, corner + (lane % 8 + 8 * (b >> 1)) * pitch + 8 * (b & 1));
}
DEVICE void load_tile(TileOf<Fp32>& t, const float* corner, int pitch) {
  Lane lane = this_lane();
#pragma unroll
  for (int i = 0; i < 8; ++i) t.x[i] = load_shared(corner + row_of(lane, i) * pitch + column_of(lane, i));
}
DEVICE void load_tile_transposed(TileOf<Fp32>& t, const float* corner, int pitch) {
  Lane lane = this_lane();
#pragma unroll
  for (int i = 0; i < 8; ++i) t.x[i] = load_shared(corner + column_of(lane, i) * pitch + row_of(lane, i));
}
DEVICE void store_tile(const TileOf<Bf16>& t, uint16_t* corner, int pitch) {
  Lane lane = this_lane();
#pragma unroll
  for (int b = 0; b < 4; ++b)
    store_shared(reinterpret_cast<uint32_t*>(corner + row_of(lane, 2 * b) * pitch + column_of(lane, 2 * b)), t.x[b]);
}
DEVICE void store_tile(const TileOf<Fp32>& t, float* corner, int pitch) {
  Lane lane = this_lane();
#pragma unroll
  for (int i = 0; i < 8; ++i) store_shared(corner + row_of(lane, i) * pitch + column_of(lane, i), t.x[i]);
}

DEVICE float from_element(uint16_t x) { return unpack_bf16(x, 0); }
DEVICE float from_element(float x) { return x; }
DEVICE void to_element(uint16_t& to, float x) { to = uint16_t(pack_bf16(x, 0.f)); }
DEVICE void to_element(float& to, float x) { to = x; }

// ---- products ----------------------------------------------------------------------------------------------------

// c += a b^T
DEVICE void multiply(Values& c, const TileOf<Bf16>& a, const TileOf<Bf16>& b) {
  mma_bf16(c.x, a.x, b.x[0], b.x[2]);
  mma_bf16(c.x + 4, a.x, b.x[1], b.x[3]);
}

// float32 = the sum of three bfloat16 numbers, to 2^-24; of the nine products the three smallest are left out.
DEVICE void split(TileOf<Bf16> parts[3], const TileOf<Fp32>& t) {
  Values rest = unpack(t);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    pack(parts[p], rest);
    Values taken = unpack(parts[p]);
#pragma unroll
    for (int i = 0; i < 8; ++i) rest.x[i] -= taken.x[i];
  }
}
DEVICE void multiply(Values& c, const TileOf<Fp32>& a, const TileOf<Fp32>& b) {
  TileOf<Bf16> as[3], bs[3];
  split(as, a);
  split(bs, b);
#pragma unroll
  for (int total = 2; total >= 0; --total)  // small products first
#pragma unroll
    for (int p = 0; p <= total; ++p) multiply(c, as[p], bs[total - p]);
}
