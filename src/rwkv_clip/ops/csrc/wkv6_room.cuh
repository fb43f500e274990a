// The shared memory of a block, per-channel tables in it, and the masks of the product tree's levels.
#pragma once
#include "wkv6_strip.cuh"

// ---- shared memory of a block ------------------------------------------------------------------------------------

template <class Io, int N>
struct Room {
  using Element = typename Tile<Io>::Element;
  static constexpr int PITCH = N + Tile<Io>::PAD;

  Element* left;      // [16 strips][PITCH]: y scaled by suffix, for strips to the right
  Element* right;     // the same scaled by prefix, for strips to the left
  Element* partner;   // z
  Element* states;    // [2][N][PITCH]: the state from the left, from the right; with chunks only
  float* whole;       // [strips][N]: product of w over a strip
  float* bonus;       // [strips][N]: a strip's part of gu
  float* through;     // [N]: gradient of log w by the pairs that enclose the chunk
  float* between;     // [2][strips][strips][16]: what pairs of strip i add to log w of strip m, before the factors between
  Tile<Io>* own;      // [strips][own_tiles][32 lanes]: operands that each lane keeps for itself, see own_tile
  int own_tiles;

  // Lays the room out from `base`; returns its size. A null base only measures.
  HOST_DEVICE static long long lay_out(Room& room, char* base, int strips, bool gradient, bool chunked) {
    char* at = base;
    auto take = [&](auto*& pointer, long long count) {
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<T*>(at);
      at += (count * (long long)sizeof(T) + 15) / 16 * 16;
    };
    take(room.left, 16 * strips * PITCH);
    take(room.right, 16 * strips * PITCH);
    take(room.partner, 16 * strips * PITCH);
    if (chunked) take(room.states, 2 * N * PITCH);
    take(room.whole, strips * N);
    if (gradient) {
      take(room.bonus, strips * N);
      take(room.through, N);
      take(room.between, 2 * strips * strips * 16);
    }
    room.own_tiles = gradient && strips - 1 > N / 8 ? strips - 1 : N / 8;
    take(room.own, strips * room.own_tiles * 32);
    return at - base;
  }
  // First sum: x scaled by prefix, N / 16 tiles, then by suffix. Second sum: zt z^T against the other strips.
  DEVICE Tile<Io>* own_tile(int strip, int tile) const { return own + (strip * own_tiles + tile) * 32 + this_lane().index; }
  DEVICE Element* rows(Element* buffer, int strip) const { return buffer + strip * 16 * PITCH; }
};

// Four numbers of a per-channel table, for the lane's columns; `spread` lays them over a tile's values.
struct Channels {
  float x[4];
};
DEVICE int channel_of(Lane lane, int c) { return 2 * lane.q + (c & 1) + 8 * (c >> 1); }
DEVICE Channels load_channels(const float* table) {
  Lane lane = this_lane();
  Channels y;
#pragma unroll
  for (int c = 0; c < 4; ++c) y.x[c] = load_shared(table + channel_of(lane, c));
  return y;
}
DEVICE void scale_columns(Values& v, const Channels& by) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v.x[i] *= by.x[(i & 1) + 2 * (i / 4)];
}
// Sum over the tile's 16 rows, in every lane.
DEVICE Channels sum_rows(const Values& v) {
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
DEVICE void store_channels(float* table, const Channels& v) {
  Lane lane = this_lane();
  if (lane.g == 0)
#pragma unroll
    for (int c = 0; c < 4; ++c) store_shared(table + channel_of(lane, c), v.x[c]);
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
