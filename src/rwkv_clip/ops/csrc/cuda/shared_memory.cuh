// The shared memory of a block, per-channel tables in it, and the masks of the product tree's levels.
#pragma once
#include "row_tile.cuh"

// ---- shared memory of a block ------------------------------------------------------------------------------------

template <class Io, int N>
struct SharedMemory {  // of one block
  using Element = typename Tile<Io>::Element;
  static constexpr int PITCH = N + Tile<Io>::PAD;

  Element* left;      // [16 row tiles][PITCH]: y scaled by suffix, for row tiles to the right
  Element* right;     // the same scaled by prefix, for row tiles to the left
  Element* partner;   // z
  Element* states;    // [2][N][PITCH]: the state from the left, from the right; with chunks only
  float* whole;       // [row tiles][N]: product of w over a row tile
  float* bonus;       // [row tiles][N]: a row tile's part of gu
  float* through;     // [N]: gradient of log w by the pairs that enclose the chunk
  float* between;     // [2][row tiles][row tiles][16]: what pairs of row tile i add to log w of row tile m, before the
                      //   factors between
  char* own;          // [row tiles][own_bytes]: what a warp keeps for itself, in turn:
                      //   first sum: x scaled by prefix, then by suffix, 2 N / 16 tiles
                      //   second sum: x and y as they are, 2 [16][PITCH], if they fit in; then zt z^T against the other
                      //   row tiles
  int own_bytes, kept_bytes;
  static constexpr int TILE_BYTES = 32 * sizeof(Tile<Io>), MOST_KEPT = 8;  // row tiles: shared memory ends there

  // Lays it out from `base`; returns its size. A null base only measures.
  HOST_DEVICE static long long lay_out(SharedMemory& shared, char* base, int row_tiles, bool gradient, bool chunked) {
    char* at = base;
    auto take = [&](auto*& pointer, long long count) {
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<T*>(at);
      at += (count * (long long)sizeof(T) + 15) / 16 * 16;
    };
    take(shared.left, 16 * row_tiles * PITCH);
    take(shared.right, 16 * row_tiles * PITCH);
    take(shared.partner, 16 * row_tiles * PITCH);
    if (chunked) take(shared.states, 2 * N * PITCH);
    take(shared.whole, row_tiles * N);
    if (gradient) {
      take(shared.bonus, row_tiles * N);
      take(shared.through, N);
      take(shared.between, 2 * row_tiles * row_tiles * 16);
    }
    bool keeps = gradient && row_tiles <= MOST_KEPT && sizeof(Element) == 2;
    shared.kept_bytes = keeps ? 2 * 16 * PITCH * sizeof(Element) : 0;
    int first = N / 8 * TILE_BYTES, second = gradient ? shared.kept_bytes + (row_tiles - 1) * TILE_BYTES : 0;
    shared.own_bytes = first > second ? first : second;
    take(shared.own, (long long)row_tiles * shared.own_bytes);
    return at - base;
  }
  DEVICE char* own_memory(int row_tile) const { return own + row_tile * own_bytes; }
  DEVICE Tile<Io>* scaled(int row_tile, int tile) const {  // this lane's part
    return reinterpret_cast<Tile<Io>*>(own_memory(row_tile) + tile * TILE_BYTES) + this_lane().index;
  }
  DEVICE Tile<Io>* weights(int row_tile, int tile) const {
    return reinterpret_cast<Tile<Io>*>(own_memory(row_tile) + kept_bytes + tile * TILE_BYTES) + this_lane().index;
  }
  DEVICE Element* kept(int row_tile, int which) const {
    return reinterpret_cast<Element*>(own_memory(row_tile)) + which * 16 * PITCH;
  }
  DEVICE Element* rows(Element* buffer, int row_tile) const { return buffer + row_tile * 16 * PITCH; }
};

// Four numbers of a per-channel table: those of the lane's columns.
struct Channels {
  float x[4];
};
DEVICE Channels load_channels(const float* table) {
  Lane lane = this_lane();
  float2 left = load_shared(reinterpret_cast<const float2*>(table + 2 * lane.q));
  float2 right = load_shared(reinterpret_cast<const float2*>(table + 2 * lane.q + 8));
  return {left.x, left.y, right.x, right.y};
}
DEVICE void scale_columns(Values& v, const Channels& by) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v.x[i] *= by.x[(i & 1) + 2 * (i / 4)];
}
// Sums over the tile's 16 rows, in every lane: exact, by shuffles, or on the tensor cores, from numbers rounded as operands.
DEVICE Channels sum_rows_exactly(const Values& v) {
  Channels y;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    int i = (c & 1) + 4 * (c >> 1);
    y.x[c] = v.x[i] + v.x[i + 2];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) y.x[c] += shuffle_xor(y.x[c], mask);
  }
  return y;
}
template <class Io>
DEVICE Channels sum_rows(const Values& v) {
  Values sums = filled(0.f);
  multiply(sums, packed<Io>(filled(1.f)), transposed(packed<Io>(v)));
  return {sums.x[0], sums.x[1], sums.x[4], sums.x[5]};
}
DEVICE void store_channels(float* table, const Channels& v) {
  Lane lane = this_lane();
  if (lane.g) return;
  store_shared(reinterpret_cast<float2*>(table + 2 * lane.q), float2{v.x[0], v.x[1]});
  store_shared(reinterpret_cast<float2*>(table + 2 * lane.q + 8), float2{v.x[2], v.x[3]});
}

// ---- level masks -------------------------------------------------------------------------------------------------

struct Masks {
  uint32_t level[3];  // pairs of an 8 x 8 diagonal block that level 1, 2, 4 cuts
  uint32_t ahead[2];  // tokens beyond the row's, seen from the cut, in halves of 2 and 4
  uint32_t later, earlier;
};
DEVICE Masks make_masks() {
  Lane lane = this_lane();
  int g = lane.g, s = 2 * lane.q;
  Masks m;
#pragma unroll
  for (int l = 0; l < 3; ++l) m.level[l] = pair_mask((g ^ s) >> l == 1, (g ^ (s + 1)) >> l == 1);
#pragma unroll
  for (int l = 1; l < 3; ++l) {
    bool right = g >> l & 1, low = s >> l == g >> l, high = (s + 1) >> l == g >> l;
    m.ahead[l - 1] = pair_mask(low && (right ? s > g : s < g), high && (right ? s + 1 > g : s + 1 < g));
  }
  m.later = pair_mask(s > g, s + 1 > g);
  m.earlier = pair_mask(s < g, s + 1 < g);
  return m;
}

template <class T>
DEVICE T level_pairs(const T& tile, const Masks& m, int level) {
  return level == 3 ? masked(tile, 0, ~0u, ~0u, 0) : masked(tile, m.level[level], 0, 0, m.level[level]);
}
template <class T>
DEVICE T tokens_ahead(const Masks& m, int level) {
  T ones;
  pack(ones, filled(1.f));
  return level == 3 ? masked(ones, m.earlier, 0, 0, m.later) : masked(ones, m.ahead[level - 1], 0, 0, m.ahead[level - 1]);
}
template <class T>
DEVICE T all_tokens(const Masks& m, bool later) {
  T ones;
  pack(ones, filled(1.f));
  return later ? masked(ones, m.later, 0, ~0u, m.later) : masked(ones, m.earlier, ~0u, 0, m.earlier);
}
