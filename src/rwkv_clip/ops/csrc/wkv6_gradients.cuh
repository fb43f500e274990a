// The second sum, x'_t = sum_s D[t,s] y_s (zt_t . z_s), and the gradients of w and u that follow from it.
// wkv6_kernels.cuh says what for.
#pragma once
#include "wkv6_values.cuh"

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
      store_shared(room.weights(at.strip, j - (j > at.strip)), packed<Io>(a));
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
      store_channels(between + (place.strip * place.strips + j) * 16, sum_rows<Io>(at.x * factor * sum));
    Tile<Io> weights = load_shared(room.weights(place.strip, j - side)), y;
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
  // Whole rows by way of the room, where it has a place for them: each is then one access of global memory, not eight.
  bool kept = room.kept_bytes > 0;
  auto *kept_x = room.kept(place.strip, 0), *kept_y = room.kept(place.strip, 1);
  sync_warp();  // the first sum's reads of the place
  if (kept) {
    copy_strip<Io, N>(kept_x, roles.zt, place);
    copy_strip<Io, N>(kept_y, roles.y, place);
    wait_copies();
    sync_warp();
  }
  Tile<Io> zt[N / 16];
#pragma unroll
  for (int group = 0; group < N / 16; ++group)
    zt[group] = packed<Io>(kept ? load_copied<Io, N>(kept_x, 16 * group) : load_values<Io, N>(roles.zt, place, 16 * group));
  sync_warp();
  if (kept) copy_strip<Io, N>(kept_x, roles.x, place);
  float diagonal[2];
  Tile<Io> own = weigh_strips<Io, N>(room, zt, place, diagonal);
  wait_copies();
  sync_warp();
#pragma unroll 1
  for (int group = 0; group < N / 16; ++group) {
    Group at;
    at.column = 16 * group;
    at.x = kept ? load_copied<Io, N>(kept_x, at.column) : load_values<Io, N>(roles.x, place, at.column);
    at.y = kept ? load_copied<Io, N>(kept_y, at.column) : load_values<Io, N>(roles.y, place, at.column);
    Values raw = load_decay<N>(w, place, at.column, NO_DECAY);
    at.f = first_factors(raw);
    at.log = filled(0.f);
    Values by_bonus;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      by_bonus.x[i] = diagonal[i / 2 & 1] * at.x.x[i] * at.y.x[i];
      at.sum.x[i] = diagonal[i / 2 & 1] * at.y.x[i] * u[place.head * N + at.column + column_of(lane, i)];
    }
    if constexpr (FIRST) store_channels(room.bonus + place.strip * N + at.column, sum_rows_exactly(by_bonus));
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
