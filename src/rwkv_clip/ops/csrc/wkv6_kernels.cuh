// Bidirectional WKV6 on tensor cores; the maths is that of ops/tree.py and ops/chunked.py.
//
// One block per chunk of a sample and head, one warp per strip of 16 tokens. Inside a strip the product tree's levels 1, 2,
// 4, 8 are tile products. Between strips i and j the decay is D[t,s] = f_i[t] (product of w over the strips between) f_j[s]
// with f = prefix seen from the right strip and suffix seen from the left one: the partner's rows are published scaled by
// both, own rows take the product between. Chunks meet in states (N x N, kernels summarize and scan) that stand for all
// tokens left and right of them. Every factor is a product of numbers in [0, 1]; nothing overflows, divides or cancels.
//
// Forward and backward are one routine with changed roles:
//     z'_t = sum_s A[t,s] z_s,     A[t,s] = sum_n x[t,n] y[s,n] D_n[t,s], u on the diagonal
//     forward         x = r, y = k, z = v  -> y
//     gradient of v   x = k, y = r, z = gy -> gv
//     x'_t = sum_s D[t,s] y_s (zt_t . z_s), u on the diagonal
//     gradient of r   zt = gy, z = v, y = k -> gr        gradient of k   zt = v, z = gy, y = r -> gk
// and the gradient of log w_j is the sum of x x' over all pairs that have j strictly between them.
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

// ---- the two sums ------------------------------------------------------------------------------------------------

template <class Io>
struct Roles {
  const Raw<Io>*x, *y, *z, *zt;
  const typename Tile<Io>::Element* states;  // (B H, chunks, 2, N, N) of y and z
};

template <class Io, int N, bool SUM>
DEVICE void fetch_strip(const Room<Io, N>& room, const Roles<Io>& roles, const Place& at, bool chunked) {
  copy_strip<Io, N>(room.left, roles.y, at);
  if constexpr (SUM) copy_strip<Io, N>(room.right, roles.x, at);
  copy_strip<Io, N>(room.partner, roles.z, at);
  if (chunked) {
    using Element = typename Tile<Io>::Element;
    constexpr int PER_COPY = 16 / sizeof(Element), COPIES = N / PER_COPY;
    for (int c = threadIdx.x; c < 2 * N * COPIES; c += 32 * at.strips) {
      int side = c / (N * COPIES), row = c / COPIES % N, column = c % COPIES * PER_COPY;
      copy_16_async(room.states + (side * N + row) * Room<Io, N>::PITCH + column,
                    roles.states + at.chunk * 2 * N * N + c * PER_COPY, true);
    }
  }
  wait_copies();
  sync_warp();
  if constexpr (std::is_same_v<Io, Fp16>) {  // operands of products are bfloat16
#pragma unroll 1
    for (int column = 0; column < N; column += 16) {
      Values z = load_copied<Io, N>(room.partner, at, column);
      sync_warp();
      store_tile(packed<Io>(z), room.rows(room.partner, at.strip) + column, Room<Io, N>::PITCH);
    }
    sync_warp();
  }
}

// Publish y, scaled both ways, and the strip's products of w. With SUM, also start the first sum: leave x scaled both ways
// in the room, and return the strip's own tile of A.
template <class Io, int N, bool SUM>
DEVICE Tile<Io> publish_strip(const Room<Io, N>& room, const float* w, const float* u, const Place& at) {
  constexpr int PITCH = Room<Io, N>::PITCH;
  Lane lane = this_lane();
  Values levels[4];
  float bonus[2] = {0.f, 0.f};
#pragma unroll
  for (int l = 0; l < 4; ++l) levels[l] = filled(0.f);
  Values next = load_decay<N>(w, at, 0, NO_DECAY);
#pragma unroll 1
  for (int column = 0; column < N; column += 16) {
    Factors f = first_factors(next);
    if (column + 16 < N) next = load_decay<N>(w, at, column + 16, NO_DECAY);
    Values y = load_copied<Io, N>(room.left, at, column), x;
    if constexpr (SUM) x = load_copied<Io, N>(room.right, at, column);
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      if constexpr (SUM) {
        Values cut = cut_factor(f, l);
        multiply(levels[l], packed<Io>(x * cut), packed<Io>(y * cut));
      }
      double_halves(f, l);
    }
    sync_warp();  // the copied rows are read by all lanes before they are written over
    store_tile(packed<Io>(y * f.suffix), room.rows(room.left, at.strip) + column, PITCH);
    store_tile(packed<Io>(y * f.prefix), room.rows(room.right, at.strip) + column, PITCH);
    store_channels(room.whole + at.strip * N + column, {f.whole.x[0], f.whole.x[1], f.whole.x[4], f.whole.x[5]});
    if constexpr (SUM) {
      store_shared(room.own_tile(at.strip, column / 16), packed<Io>(x * f.prefix));
      store_shared(room.own_tile(at.strip, (N + column) / 16), packed<Io>(x * f.suffix));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        bonus[i / 2 & 1] += x.x[i] * y.x[i] * u[at.head * N + column + column_of(lane, i)];
    }
  }
  Values inside = filled(0.f);
  if constexpr (SUM) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bonus[half] += shuffle_xor(bonus[half], 1);
      bonus[half] += shuffle_xor(bonus[half], 2);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int distance = row_of(lane, i) ^ column_of(lane, i);
      inside.x[i] = distance >= 8   ? levels[3].x[i]
                    : distance >= 4 ? levels[2].x[i]
                    : distance >= 2 ? levels[1].x[i]
                    : distance == 1 ? levels[0].x[i]
                                    : bonus[i / 2 & 1];
    }
  }
  return packed<Io>(inside);
}

// z' of the strip: other strips to the left (SIDE 0, nearest first) or to the right (SIDE 1), then the state beyond them.
template <class Io, int N, bool CHUNKED>
DEVICE void add_side(Values (&sum)[N / 16], const Room<Io, N>& room, const Place& at, int side) {
  constexpr int PITCH = Room<Io, N>::PITCH;
  Channels reach[N / 16];  // product of w over the strips between
#pragma unroll
  for (int group = 0; group < N / 16; ++group) reach[group] = {1.f, 1.f, 1.f, 1.f};
  const Tile<Io>* mine = room.own_tile(at.strip, side * (N / 16));
  int step = side ? 1 : -1;
#pragma unroll 1
  for (int j = at.strip + step; j >= 0 && j < at.strips; j += step) {
    const auto* y = room.rows(side ? room.right : room.left, j);
    Values a = filled(0.f);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> other;
      load_tile(other, y + 16 * group, PITCH);
      Values own = unpack(load_shared(mine + group * 32));
      scale_columns(own, reach[group]);
      multiply(a, packed<Io>(own), other);
      Channels whole = load_channels(room.whole + j * N + 16 * group);
#pragma unroll
      for (int c = 0; c < 4; ++c) reach[group].x[c] *= whole.x[c];
    }
    Tile<Io> weights = packed<Io>(a);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> z;
      load_tile_transposed(z, room.rows(room.partner, j) + 16 * group, PITCH);
      multiply(sum[group], weights, z);
    }
  }
  if constexpr (CHUNKED)
#pragma unroll
    for (int inner = 0; inner < N / 16; ++inner) {
      Values own = unpack(load_shared(mine + inner * 32));
      scale_columns(own, reach[inner]);
      Tile<Io> scaled = packed<Io>(own);
#pragma unroll
      for (int group = 0; group < N / 16; ++group) {
        Tile<Io> state;
        load_tile_transposed(state, room.states + (side * N + 16 * inner) * PITCH + 16 * group, PITCH);
        multiply(sum[group], scaled, state);
      }
    }
}

// The first sum, z'. The room is published on return; blocks meet once inside.
template <class Io, int N, bool CHUNKED>
DEVICE void sum_values(const Room<Io, N>& room, const Roles<Io>& roles, const float* w, const float* u, const Place& at,
                       Raw<Io>* out) {
  fetch_strip<Io, N, true>(room, roles, at, CHUNKED);
  Tile<Io> inside = publish_strip<Io, N, true>(room, w, u, at);
  sync_warp();
  Values sum[N / 16];
#pragma unroll
  for (int group = 0; group < N / 16; ++group) {
    Tile<Io> z;
    load_tile_transposed(z, room.rows(room.partner, at.strip) + 16 * group, Room<Io, N>::PITCH);
    sum[group] = filled(0.f);
    multiply(sum[group], inside, z);
  }
  sync_block();
  add_side<Io, N, CHUNKED>(sum, room, at, 0);
  add_side<Io, N, CHUNKED>(sum, room, at, 1);
#pragma unroll
  for (int group = 0; group < N / 16; ++group) store_values<Io, N>(out, at, 16 * group, sum[group]);
}

// zt z^T of the strip against every strip: the others' tiles go to the room, the own one is returned, its diagonal beside it.
template <class Io, int N>
DEVICE Tile<Io> weigh_strips(const Room<Io, N>& room, const Tile<Io> (&zt)[N / 16], const Place& at, float diagonal[2]) {
  Lane lane = this_lane();
  Tile<Io> own;
#pragma unroll 1
  for (int j = 0; j < at.strips; ++j) {
    Values a = filled(0.f);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> z;
      load_tile(z, room.rows(room.partner, j) + 16 * group, Room<Io, N>::PITCH);
      multiply(a, zt[group], z);
    }
    if (j != at.strip) {
      store_shared(room.own_tile(at.strip, j - (j > at.strip)), packed<Io>(a));
      continue;
    }
    pack(own, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float low = a.x[half ? 6 : 0], high = a.x[half ? 7 : 1];
      diagonal[half] = shuffle(lane.g & 1 ? high : low, lane.g * 4 + lane.g / 2);
    }
  }
  return own;
}

// What one group of 16 channels carries through the second sum.
struct Group {
  Values x, y, sum, log;  // sum: x', log: gradient of log w
  Factors f;
  int column;
};

// Pairs inside the strip.
template <class Io>
DEVICE void add_inside(Group& at, const Tile<Io>& own, const Masks& masks) {
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    Values cut = cut_factor(at.f, l), part = filled(0.f);
    multiply(part, level_pairs(own, masks, l), transposed(packed<Io>(at.y * cut)));
    part = part * cut;
    add_product(at.sum, part, filled(1.f));
    if (l > 0) multiply(at.log, tokens_ahead<Tile<Io>>(masks, l), transposed(packed<Io>(at.x * part)));
    double_halves(at.f, l);
  }
}

// Pairs with the strips (and the state) on one side, farthest first: each step lets the sum so far decay by the strip that
// it passes. What has passed strip m is its pairs' share of log w there; for `between` it is left in the room.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void add_far(Group& at, const Room<Io, N>& room, const Tile<Io> (&zt)[N / 16], const Place& place, float* between,
                    const Masks& masks, int side) {
  constexpr int PITCH = Room<Io, N>::PITCH;
  const Values& factor = side ? at.f.suffix : at.f.prefix;
  Values sum = filled(0.f);
  if constexpr (CHUNKED)
#pragma unroll
    for (int inner = 0; inner < N / 16; ++inner) {
      Tile<Io> state;
      load_tile(state, room.states + (side * N + at.column) * PITCH + 16 * inner, PITCH);
      multiply(sum, zt[inner], state);
    }
  int first = side ? place.strips - 1 : 0, step = side ? -1 : 1;
#pragma unroll 1
  for (int j = first; j != place.strip; j += step) {
    scale_columns(sum, load_channels(room.whole + j * N + at.column));
    if (FIRST ? CHUNKED || j != first : CHUNKED && j == first)
      store_channels(between + (place.strip * place.strips + j) * 16, sum_rows(at.x * factor * sum));
    Tile<Io> weights = load_shared(room.own_tile(place.strip, j - side)), y;
    load_tile_transposed(y, room.rows(side ? room.right : room.left, j) + at.column, PITCH);
    multiply(sum, weights, y);
  }
  sum = sum * factor;
  add_product(at.sum, sum, filled(1.f));
  multiply(at.log, all_tokens<Tile<Io>>(masks, side == 0), transposed(packed<Io>(at.x * sum)));
}

// log w of this strip by the pairs of other strips (and chunks) that enclose it, from what those left in `between`.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void add_enclosing(Group& at, const Room<Io, N>& room, const Place& place, const float* between) {
  Channels total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    // Strips i beyond this one, whose pairs reach over it to `side`; nearest or farthest first, as their factors need.
    int own = place.strip, last = place.strips - 1, step = side ? 1 : -1;
    Channels part = {0.f, 0.f, 0.f, 0.f}, reach = {1.f, 1.f, 1.f, 1.f};
    if constexpr (FIRST) {
      if (!CHUNKED && own == (side ? last : 0)) continue;  // nothing lies beyond it
#pragma unroll 1
      for (int i = side ? 0 : last; i != own; i += step) {
        Channels given = load_channels(between + (i * place.strips + own) * 16);
        Channels whole = load_channels(room.whole + i * N + at.column);
#pragma unroll
        for (int c = 0; c < 4; ++c) part.x[c] = part.x[c] * whole.x[c] + given.x[c];
      }
    } else {
      int edge = side ? last : 0;  // the strip next to the state: its factor is in the given sums already
#pragma unroll 1
      for (int i = edge - step; i >= 0 && i <= last; i -= step) {
        if ((i - own) * -step > 0) {
          Channels given = load_channels(between + (i * place.strips + edge) * 16);
#pragma unroll
          for (int c = 0; c < 4; ++c) part.x[c] += given.x[c] * reach.x[c];
        }
        Channels whole = load_channels(room.whole + i * N + at.column);
#pragma unroll
        for (int c = 0; c < 4; ++c) reach.x[c] *= whole.x[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) total.x[c] += part.x[c];
  }
  if constexpr (FIRST && CHUNKED) {
    Channels through = load_channels(room.through + at.column);
#pragma unroll
    for (int c = 0; c < 4; ++c) total.x[c] += through.x[c];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) at.log.x[i] += total.x[(i & 1) + 2 * (i / 4)];
}

// The second sum, x', in a published room, and its part of the gradients of w and, if FIRST, u.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void sum_gradients(const Room<Io, N>& room, const Roles<Io>& roles, const float* w, const float* u, const Place& place,
                          Raw<Io>* out, float* gw) {
  Lane lane = this_lane();
  Masks masks = make_masks();
  Tile<Io> zt[N / 16];
#pragma unroll
  for (int group = 0; group < N / 16; ++group) zt[group] = packed<Io>(load_values<Io, N>(roles.zt, place, 16 * group));
  float diagonal[2];
  Tile<Io> own = weigh_strips<Io, N>(room, zt, place, diagonal);
#pragma unroll 1
  for (int group = 0; group < N / 16; ++group) {
    Group at;
    at.column = 16 * group;
    at.x = load_values<Io, N>(roles.x, place, at.column);
    at.y = load_values<Io, N>(roles.y, place, at.column);
    at.f = first_factors(load_decay<N>(w, place, at.column, NO_DECAY));
    at.log = filled(0.f);
    Values by_bonus;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      by_bonus.x[i] = diagonal[i / 2 & 1] * at.x.x[i] * at.y.x[i];
      at.sum.x[i] = diagonal[i / 2 & 1] * at.y.x[i] * u[place.head * N + at.column + column_of(lane, i)];
    }
    if constexpr (FIRST) store_channels(room.bonus + place.strip * N + at.column, sum_rows(by_bonus));
    float* between = room.between + (group & 1) * place.strips * place.strips * 16;
    add_inside<Io>(at, own, masks);
    add_far<Io, N, CHUNKED, FIRST>(at, room, zt, place, between, masks, 0);
    add_far<Io, N, CHUNKED, FIRST>(at, room, zt, place, between, masks, 1);
    store_values<Io, N>(out, place, at.column, at.sum);
    if constexpr (FIRST || CHUNKED) {
      sync_block();
      add_enclosing<Io, N, CHUNKED, FIRST>(at, room, place, between);
    }
    // The first pass leaves its part of gw there, and the same thread completes it: d log w / d raw = -exp(raw).
    Values raw = load_decay<N>(w, place, at.column, 0.f);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      int row = place.strip * 16 + row_of(lane, i);
      if (row >= place.tokens) continue;
      auto* to = reinterpret_cast<float2*>(gw + place.row0 * N + (long long)row * place.stride + at.column +
                                           column_of(lane, i));
      float2 pair = {at.log.x[i], at.log.x[i + 1]};
      if constexpr (!FIRST) {
        float2 before = *to;
        pair.x = (pair.x + before.x) * (raw.x[i] > MAX_RAW_DECAY ? 0.f : -expf(raw.x[i]));
        pair.y = (pair.y + before.y) * (raw.x[i + 1] > MAX_RAW_DECAY ? 0.f : -expf(raw.x[i + 1]));
      }
      *to = pair;
    }
  }
}

// Gradient of log w by pairs from the chunks on the left to the chunks on the right, both orders.
template <class Io, int N>
DEVICE void sum_through(const Room<Io, N>& room, const Roles<Io>& first, const Roles<Io>& second, const float* w,
                        const Place& at) {
  using Element = typename Tile<Io>::Element;
  const Element *a = first.states + at.chunk * 2 * N * N, *b = second.states + at.chunk * 2 * N * N;
  for (int n = at.strip; n < N; n += at.strips) {
    float sum = 0.f, whole = 1.f;
    for (int i = this_lane().index; i < 2 * N; i += 32) {
      int side = i / N, j = i % N;
      sum += from_element(a[(side * N + n) * N + j]) * from_element(b[((1 - side) * N + n) * N + j]);
    }
    for (int t = this_lane().index; t < at.tokens; t += 32)
      whole *= expf(-expf(fminf(w[at.row0 * N + (long long)t * at.stride + n], MAX_RAW_DECAY)));
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      sum += shuffle_xor(sum, mask);
      whole *= shuffle_xor(whole, mask);
    }
    if (this_lane().index == 0) store_shared(room.through + n, sum * whole);
  }
}

// ---- kernels -----------------------------------------------------------------------------------------------------

template <class Io>
struct Arguments {
  const Raw<Io>*r, *k, *v, *gy;
  const float *w, *u;
  Raw<Io>*y, *gr, *gk, *gv;
  float *gw, *gu;                                // gu: one row of N per block
  const typename Tile<Io>::Element *states, *gradient_states;  // (B H, chunks, 2, N, N) of (k, v) and of (r, gy)
  int tokens, heads, chunks, strips;
};

template <class Io, int N, bool CHUNKED>
DEVICE void forward_block(const Arguments<Io>& a, char* memory) {
  Place at = find_place<N>(a.tokens, a.heads, a.chunks, a.strips);
  Room<Io, N> room;
  Room<Io, N>::lay_out(room, memory, a.strips, false, CHUNKED);
  sum_values<Io, N, CHUNKED>(room, {a.r, a.k, a.v, nullptr, a.states}, a.w, a.u, at, a.y);
}

template <class Io, int N, bool CHUNKED>
DEVICE void backward_block(const Arguments<Io>& a, char* memory) {
  Place at = find_place<N>(a.tokens, a.heads, a.chunks, a.strips);
  Room<Io, N> room;
  Room<Io, N>::lay_out(room, memory, a.strips, true, CHUNKED);
  Roles<Io> first = {a.r, a.k, a.v, a.gy, a.states}, second = {a.k, a.r, a.gy, a.v, a.gradient_states};
  fetch_strip<Io, N, false>(room, first, at, CHUNKED);
  publish_strip<Io, N, false>(room, a.w, a.u, at);
  if constexpr (CHUNKED) sum_through<Io, N>(room, first, second, a.w, at);
  sync_block();
  sum_gradients<Io, N, CHUNKED, true>(room, first, a.w, a.u, at, a.gr, a.gw);
  sync_block();
  for (int n = threadIdx.x; n < N; n += 32 * at.strips) {
    float sum = 0.f;
    for (int strip = 0; strip < at.strips; ++strip) sum += load_shared(room.bonus + strip * N + n);
    a.gu[at.chunk * N + n] = sum;
  }
  sum_values<Io, N, CHUNKED>(room, second, a.w, a.u, at, a.gv);
  sum_gradients<Io, N, CHUNKED, false>(room, second, a.w, a.u, at, a.gk, a.gw);
}

// What a chunk adds to the states on its right and on its left, (B H, chunks, 2, N, N) float32, and its product of w.
template <class Io>
struct SummaryArguments {
  const Raw<Io>*y, *z;
  const float* w;
  float *summaries, *wholes;
  int tokens, heads, chunks, strips;
};

template <class Io, int N>
DEVICE void summarize_block(const SummaryArguments<Io>& a, char* memory) {
  constexpr int PITCH = Room<Io, N>::PITCH;
  Place at = find_place<N>(a.tokens, a.heads, a.chunks, a.strips);
  Lane lane = this_lane();
  Room<Io, N> room;
  Room<Io, N>::lay_out(room, memory, a.strips, false, false);
  fetch_strip<Io, N, false>(room, {a.y, a.y, a.z, nullptr, nullptr}, at, false);
  publish_strip<Io, N, false>(room, a.w, nullptr, at);
  sync_block();
#pragma unroll 1
  for (int tile = at.strip; tile < 2 * (N / 16) * (N / 16); tile += at.strips) {
    int side = tile / (N / 16) / (N / 16), rows = tile / (N / 16) % (N / 16) * 16, columns = tile % (N / 16) * 16;
    Values sum = filled(0.f);
#pragma unroll 1
    for (int s = 0; s < at.strips; ++s) {
      int j = side ? at.strips - 1 - s : s;  // the nearest strip last
      Tile<Io> y, z;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum.x[i] *= load_shared(room.whole + j * N + rows + row_of(lane, i));
      load_tile_transposed(y, room.rows(side ? room.right : room.left, j) + rows, PITCH);
      load_tile_transposed(z, room.rows(room.partner, j) + columns, PITCH);
      multiply(sum, y, z);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      a.summaries[(at.chunk * 2 + side) * N * N + (rows + row_of(lane, i)) * N + columns + column_of(lane, i)] = sum.x[i];
  }
  for (int n = threadIdx.x; n < N; n += 32 * at.strips) {
    float whole = 1.f;
    for (int s = 0; s < at.strips; ++s) whole *= load_shared(room.whole + s * N + n);
    a.wholes[at.chunk * N + n] = whole;
  }
}

// Summaries -> the states that enter each chunk from the left and from the right. One thread per number of a state.
template <class Io, int N>
DEVICE void scan_element(const float* summaries, const float* wholes, typename Tile<Io>::Element* states, int chunks,
                         long long row, int side, int element) {
  float state = 0.f;
  for (int i = 0; i < chunks; ++i) {
    long long chunk = row * chunks + (side ? chunks - 1 - i : i), at = (chunk * 2 + side) * N * N + element;
    to_element(states[at], state);
    state = wholes[chunk * N + element / N] * state + summaries[at];
  }
}
