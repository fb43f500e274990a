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
  char* own;          // [strips][own_bytes]: what a warp keeps for itself, in turn:
                      //   first sum: x scaled by prefix, then by suffix, 2 N / 16 tiles
                      //   second sum: x and y as they are, 2 [16][PITCH], if there is room; then zt z^T against the other strips
  int own_bytes, kept_bytes;
  static constexpr int TILE_BYTES = 32 * sizeof(Tile<Io>), MOST_KEPT = 8;  // strips: shared memory ends there

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
    bool keeps = gradient && strips <= MOST_KEPT && sizeof(Element) == 2;
    room.kept_bytes = keeps ? 2 * 16 * PITCH * sizeof(Element) : 0;
    int first = N / 8 * TILE_BYTES, second = gradient ? room.kept_bytes + (strips - 1) * TILE_BYTES : 0;
    room.own_bytes = first > second ? first : second;
    take(room.own, (long long)strips * room.own_bytes);
    return at - base;
  }
  DEVICE char* own_place(int strip) const { return own + strip * own_bytes; }
  DEVICE Tile<Io>* scaled(int strip, int tile) const {  // this lane's part
    return reinterpret_cast<Tile<Io>*>(own_place(strip) + tile * TILE_BYTES) + this_lane().index;
  }
  DEVICE Tile<Io>* weights(int strip, int tile) const {
    return reinterpret_cast<Tile<Io>*>(own_place(strip) + kept_bytes + tile * TILE_BYTES) + this_lane().index;
  }
  DEVICE Element* kept(int strip, int which) const {
    return reinterpret_cast<Element*>(own_place(strip)) + which * 16 * PITCH;
  }
  DEVICE Element* rows(Element* buffer, int strip) const { return buffer + strip * 16 * PITCH; }
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
