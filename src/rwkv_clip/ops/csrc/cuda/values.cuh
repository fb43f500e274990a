// The first sum, z'_t = sum_s A[t,s] z_s, and what both sums need: row tiles staged in shared memory. See kernels.cuh.
#pragma once
#include "shared_memory.cuh"

template <class Io>
struct Roles {
  const Raw<Io>*x, *y, *z, *zt;
  const typename Tile<Io>::Element* states;  // (B H, chunks, 2, N, N) of y and z
};

template <class Io, int N, bool SUM>
DEVICE void fetch_row_tile(const SharedMemory<Io, N>& shared, const Roles<Io>& roles, const TileCoords& at,
                           bool chunked) {
  copy_row_tile<Io, N>(shared.rows(shared.left, at.row_tile), roles.y, at);
  if constexpr (SUM) copy_row_tile<Io, N>(shared.rows(shared.right, at.row_tile), roles.x, at);
  copy_row_tile<Io, N>(shared.rows(shared.partner, at.row_tile), roles.z, at);
  if (chunked) {
    using Element = typename Tile<Io>::Element;
    constexpr int PER_COPY = 16 / sizeof(Element), COPIES = N / PER_COPY;
    for (int c = threadIdx.x; c < 2 * N * COPIES; c += 32 * at.row_tiles) {
      int side = c / (N * COPIES), row = c / COPIES % N, column = c % COPIES * PER_COPY;
      copy_16_async(shared.states + (side * N + row) * SharedMemory<Io, N>::PITCH + column,
                    roles.states + at.chunk * 2 * N * N + c * PER_COPY, true);
    }
  }
  wait_copies();
  sync_warp();
  if constexpr (std::is_same_v<Io, Fp16>) {  // operands of products are bfloat16
#pragma unroll 1
    for (int column = 0; column < N; column += 16) {
      Values z = load_copied<Io, N>(shared.rows(shared.partner, at.row_tile), column);
      sync_warp();
      store_tile(packed<Io>(z), shared.rows(shared.partner, at.row_tile) + column, SharedMemory<Io, N>::PITCH);
    }
    sync_warp();
  }
}

// Stage y, scaled both ways, and the row tile's products of w in shared memory. With SUM, also start the first sum: leave
// x scaled both ways there, too, and return the row tile's own tile of A.
template <class Io, int N, bool SUM>
DEVICE Tile<Io> stage_row_tile(const SharedMemory<Io, N>& shared, const float* w, const float* u, const TileCoords& at) {
  constexpr int PITCH = SharedMemory<Io, N>::PITCH;
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
    Values y = load_copied<Io, N>(shared.rows(shared.left, at.row_tile), column), x;
    if constexpr (SUM) x = load_copied<Io, N>(shared.rows(shared.right, at.row_tile), column);
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      if constexpr (SUM) {
        Values cut = cut_factor(f, l);
        multiply(levels[l], packed<Io>(x * cut), packed<Io>(y * cut));
      }
      double_halves(f, l);
    }
    sync_warp();  // the copied rows are read by all lanes before they are written over
    store_tile(packed<Io>(y * f.suffix), shared.rows(shared.left, at.row_tile) + column, PITCH);
    store_tile(packed<Io>(y * f.prefix), shared.rows(shared.right, at.row_tile) + column, PITCH);
    store_channels(shared.whole + at.row_tile * N + column, {f.whole.x[0], f.whole.x[1], f.whole.x[4], f.whole.x[5]});
    if constexpr (SUM) {
      store_shared(shared.scaled(at.row_tile, column / 16), packed<Io>(x * f.prefix));
      store_shared(shared.scaled(at.row_tile, (N + column) / 16), packed<Io>(x * f.suffix));
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

// z' of the row tile: other row tiles on the left (side 0) or on the right (side 1), nearest first, then the state beyond.
template <class Io, int N, bool CHUNKED>
DEVICE void add_side(Values (&sum)[N / 16], const SharedMemory<Io, N>& shared, const TileCoords& at, int side) {
  constexpr int PITCH = SharedMemory<Io, N>::PITCH;
  Channels reach[N / 16];  // product of w over the row tiles between
#pragma unroll
  for (int group = 0; group < N / 16; ++group) reach[group] = {1.f, 1.f, 1.f, 1.f};
  const Tile<Io>* mine = shared.scaled(at.row_tile, side * (N / 16));
  int step = side ? 1 : -1;
#pragma unroll 1
  for (int j = at.row_tile + step; j >= 0 && j < at.row_tiles; j += step) {
    const auto* y = shared.rows(side ? shared.right : shared.left, j);
    Values a = filled(0.f);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> other;
      load_tile(other, y + 16 * group, PITCH);
      Values own = unpack(load_shared(mine + group * 32));
      scale_columns(own, reach[group]);
      multiply(a, packed<Io>(own), other);
      Channels whole = load_channels(shared.whole + j * N + 16 * group);
#pragma unroll
      for (int c = 0; c < 4; ++c) reach[group].x[c] *= whole.x[c];
    }
    Tile<Io> weights = packed<Io>(a);
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {
      Tile<Io> z;
      load_tile_transposed(z, shared.rows(shared.partner, j) + 16 * group, PITCH);
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
        load_tile_transposed(state, shared.states + (side * N + 16 * inner) * PITCH + 16 * group, PITCH);
        multiply(sum[group], scaled, state);
      }
    }
}

// The first sum, z'. All row tiles are staged on return; the block synchronises once inside.
template <class Io, int N, bool CHUNKED>
DEVICE void sum_values(const SharedMemory<Io, N>& shared, const Roles<Io>& roles, const float* w, const float* u,
                       const TileCoords& at, Raw<Io>* out) {
  fetch_row_tile<Io, N, true>(shared, roles, at, CHUNKED);
  Tile<Io> inside = stage_row_tile<Io, N, true>(shared, w, u, at);
  sync_warp();
  Values sum[N / 16];
#pragma unroll
  for (int group = 0; group < N / 16; ++group) {
    Tile<Io> z;
    load_tile_transposed(z, shared.rows(shared.partner, at.row_tile) + 16 * group, SharedMemory<Io, N>::PITCH);
    sum[group] = filled(0.f);
    multiply(sum[group], inside, z);
  }
  sync_block();
  add_side<Io, N, CHUNKED>(sum, shared, at, 0);
  add_side<Io, N, CHUNKED>(sum, shared, at, 1);
#pragma unroll
  for (int group = 0; group < N / 16; ++group) store_values<Io, N>(out, at, 16 * group, sum[group]);
}

