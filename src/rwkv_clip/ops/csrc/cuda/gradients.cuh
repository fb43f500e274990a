// The second sum, x'_t = sum_s D[t,s] y_s (zt_t . z_s), and the gradients of w and u that follow from it.
// See kernels.cuh.
#pragma once
#include "values.cuh"

// zt z^T of the row tile against every row tile: the others' tiles go to shared memory, the own one is returned, and its
// diagonal beside it.
template <class Io, int N>
DEVICE Tile<Io> weigh_row_tiles(const SharedMemory<Io, N>& shared, const Tile<Io> (&zt)[N / 16], const TileCoords& at,
                                float diagonal[2]) {
  Lane lane = this_lane();
  Tile<Io> own;
#pragma unroll 1
  for (int j = 0; j < at.row_tiles; ++j) {
    Values a = filled(0.f);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> z;
      load_tile(z, shared.rows(shared.partner, j) + 16 * group, SharedMemory<Io, N>::PITCH);
      multiply(a, zt[group], z);
    }
    if (j != at.row_tile) {
      store_shared(shared.weights(at.row_tile, j - (j > at.row_tile)), packed<Io>(a));
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

// Pairs inside the row tile.
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

// Pairs with the row tiles (and the state) on one side, farthest first: each step lets the sum so far decay by the row
// tile that it passes. What has passed row tile m is what its pairs add to log w there; it is left in `between`.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void add_far(Group& at, const SharedMemory<Io, N>& shared, const Tile<Io> (&zt)[N / 16], const TileCoords& coords,
                    float* between, const Masks& masks, int side) {
  constexpr int PITCH = SharedMemory<Io, N>::PITCH;
  const Values& factor = side ? at.f.suffix : at.f.prefix;
  Values sum = filled(0.f);
  if constexpr (CHUNKED)
#pragma unroll
    for (int inner = 0; inner < N / 16; ++inner) {
      Tile<Io> state;
      load_tile(state, shared.states + (side * N + at.column) * PITCH + 16 * inner, PITCH);
      multiply(sum, zt[inner], state);
    }
  int first = side ? coords.row_tiles - 1 : 0, step = side ? -1 : 1;
#pragma unroll 1
  for (int j = first; j != coords.row_tile; j += step) {
    scale_columns(sum, load_channels(shared.whole + j * N + at.column));
    if (FIRST ? CHUNKED || j != first : CHUNKED && j == first)
      store_channels(between + (coords.row_tile * coords.row_tiles + j) * 16, sum_rows<Io>(at.x * factor * sum));
    Tile<Io> weights = load_shared(shared.weights(coords.row_tile, j - side)), y;
    load_tile_transposed(y, shared.rows(side ? shared.right : shared.left, j) + at.column, PITCH);
    multiply(sum, weights, y);
  }
  sum = sum * factor;
  add_product(at.sum, sum, filled(1.f));
  multiply(at.log, all_tokens<Tile<Io>>(masks, side == 0), transposed(packed<Io>(at.x * sum)));
}

// log w of this row tile by the pairs of other row tiles (and chunks) that enclose it, from what those left in `between`.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void add_enclosing(Group& at, const SharedMemory<Io, N>& shared, const TileCoords& coords,
                          const float* between) {
  Channels total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    // Row tiles i beyond this one, whose pairs reach over it to `side`; nearest or farthest first, as their factors
    // need.
    int own = coords.row_tile, last = coords.row_tiles - 1, step = side ? 1 : -1;
    Channels part = {0.f, 0.f, 0.f, 0.f}, reach = {1.f, 1.f, 1.f, 1.f};
    if constexpr (FIRST) {
      if (!CHUNKED && own == (side ? last : 0)) continue;  // nothing lies beyond it
#pragma unroll 1
      for (int i = side ? 0 : last; i != own; i += step) {
        Channels given = load_channels(between + (i * coords.row_tiles + own) * 16);
        Channels whole = load_channels(shared.whole + i * N + at.column);
#pragma unroll
        for (int c = 0; c < 4; ++c) part.x[c] = part.x[c] * whole.x[c] + given.x[c];
      }
    } else {
      int edge = side ? last : 0;  // the row tile next to the state: its factor is in the given sums already
#pragma unroll 1
      for (int i = edge - step; i >= 0 && i <= last; i -= step) {
        if ((i - own) * -step > 0) {
          Channels given = load_channels(between + (i * coords.row_tiles + edge) * 16);
#pragma unroll
          for (int c = 0; c < 4; ++c) part.x[c] += given.x[c] * reach.x[c];
        }
        Channels whole = load_channels(shared.whole + i * N + at.column);
#pragma unroll
        for (int c = 0; c < 4; ++c) reach.x[c] *= whole.x[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) total.x[c] += part.x[c];
  }
  if constexpr (FIRST && CHUNKED) {
    Channels through = load_channels(shared.through + at.column);
#pragma unroll
    for (int c = 0; c < 4; ++c) total.x[c] += through.x[c];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) at.log.x[i] += total.x[(i & 1) + 2 * (i / 4)];
}

// The second sum, x', from staged row tiles, and its part of the gradients of w and, if FIRST, u.
template <class Io, int N, bool CHUNKED, bool FIRST>
DEVICE void sum_gradients(const SharedMemory<Io, N>& shared, const Roles<Io>& roles, const float* w, const float* u,
                          const TileCoords& coords, Raw<Io>* out, float* gw) {
  Lane lane = this_lane();
  Masks masks = make_masks();
  // Whole rows by way of shared memory, where they fit in: each is then one access of global memory, not eight.
  bool kept = shared.kept_bytes > 0;
  auto *kept_x = shared.kept(coords.row_tile, 0), *kept_y = shared.kept(coords.row_tile, 1);
  sync_warp();  // the first sum has read this memory
  if (kept) {
    copy_row_tile<Io, N>(kept_x, roles.zt, coords);
    copy_row_tile<Io, N>(kept_y, roles.y, coords);
    wait_copies();
    sync_warp();
  }
  Tile<Io> zt[N / 16];
#pragma unroll
  for (int group = 0; group < N / 16; ++group)
    zt[group] = packed<Io>(kept ? load_copied<Io, N>(kept_x, 16 * group)
                                : load_values<Io, N>(roles.zt, coords, 16 * group));
  sync_warp();
  if (kept) copy_row_tile<Io, N>(kept_x, roles.x, coords);
  float diagonal[2];
  Tile<Io> own = weigh_row_tiles<Io, N>(shared, zt, coords, diagonal);
  wait_copies();
  sync_warp();
#pragma unroll 1
  for (int group = 0; group < N / 16; ++group) {
    Group at;
    at.column = 16 * group;
    at.x = kept ? load_copied<Io, N>(kept_x, at.column) : load_values<Io, N>(roles.x, coords, at.column);
    at.y = kept ? load_copied<Io, N>(kept_y, at.column) : load_values<Io, N>(roles.y, coords, at.column);
    Values raw = load_decay<N>(w, coords, at.column, NO_DECAY);
    at.f = first_factors(raw);
    at.log = filled(0.f);
    Values by_bonus;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      by_bonus.x[i] = diagonal[i / 2 & 1] * at.x.x[i] * at.y.x[i];
      at.sum.x[i] = diagonal[i / 2 & 1] * at.y.x[i] * u[coords.head * N + at.column + column_of(lane, i)];
    }
    if constexpr (FIRST) store_channels(shared.bonus + coords.row_tile * N + at.column, sum_rows_exactly(by_bonus));
    float* between = shared.between + (group & 1) * coords.row_tiles * coords.row_tiles * 16;
    add_inside<Io>(at, own, masks);
    add_far<Io, N, CHUNKED, FIRST>(at, shared, zt, coords, between, masks, 0);
    add_far<Io, N, CHUNKED, FIRST>(at, shared, zt, coords, between, masks, 1);
    store_values<Io, N>(out, coords, at.column, at.sum);
    if constexpr (FIRST || CHUNKED) {
      sync_block();
      add_enclosing<Io, N, CHUNKED, FIRST>(at, shared, coords, between);
    }
    // The first pass leaves its part of gw there, and the same thread completes it: d log w / d raw = -exp(raw).
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      int row = coords.row_tile * 16 + row_of(lane, i);
      if (row >= coords.tokens) continue;
      auto* to = reinterpret_cast<float2*>(gw + coords.row0 * N + (long long)row * coords.stride + at.column +
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
