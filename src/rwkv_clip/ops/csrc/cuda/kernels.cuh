// Bidirectional WKV6 on tensor cores; the maths is that of ops/wkv/tree.py and ops/wkv/chunked.py.
//
// One block per chunk of a sample and head, one warp per row tile of 16 tokens. Inside a row tile the product tree's
// levels 1, 2, 4, 8 are tile products. Between row tiles i and j the decay is
//     D[t,s] = f_i[t] (product of w over the row tiles between) f_j[s]
// with f = prefix seen from the right row tile and suffix seen from the left one: the partner's rows are staged in shared
// memory scaled by both, own rows take the product between. Chunks meet in states (N x N, kernels summarize and scan) that
// stand for all tokens left and right of them. Every factor is a product of numbers in [0, 1]; nothing overflows, divides
// or cancels.
//
// Forward and backward are one routine with changed roles:
//     z'_t = sum_s A[t,s] z_s,     A[t,s] = sum_n x[t,n] y[s,n] D_n[t,s], u on the diagonal
//     forward         x = r, y = k, z = v  -> y
//     gradient of v   x = k, y = r, z = gy -> gv
//     x'_t = sum_s D[t,s] y_s (zt_t . z_s), u on the diagonal
//     gradient of r   zt = gy, z = v, y = k -> gr        gradient of k   zt = v, z = gy, y = r -> gk
// and the gradient of log w_j is the sum of x x' over all pairs that have j strictly between them.
#pragma once
#include "gradients.cuh"

// Gradient of log w by pairs from the chunks on the left to the chunks on the right, both orders.
template <class Io, int N>
DEVICE void sum_through(const SharedMemory<Io, N>& shared, const Roles<Io>& first, const Roles<Io>& second,
                        const float* w, const TileCoords& at) {
  using Element = typename Tile<Io>::Element;
  const Element *a = first.states + at.chunk * 2 * N * N, *b = second.states + at.chunk * 2 * N * N;
  for (int n = at.row_tile; n < N; n += at.row_tiles) {
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
    if (this_lane().index == 0) store_shared(shared.through + n, sum * whole);
  }
}

template <class Io>
struct Arguments {
  const Raw<Io>*r, *k, *v, *gy;
  const float *w, *u;
  Raw<Io>*y, *gr, *gk, *gv;
  float *gw, *gu;                                // gu: one row of N per block
  const typename Tile<Io>::Element *states, *gradient_states;  // (B H, chunks, 2, N, N) of (k, v) and of (r, gy)
  int tokens, heads, chunks, row_tiles;
};

template <class Io, int N, bool CHUNKED>
DEVICE void forward_block(const Arguments<Io>& a, char* memory) {
  TileCoords at = find_coords<N>(a.tokens, a.heads, a.chunks, a.row_tiles);
  SharedMemory<Io, N> shared;
  SharedMemory<Io, N>::lay_out(shared, memory, a.row_tiles, false, CHUNKED);
  sum_values<Io, N, CHUNKED>(shared, {a.r, a.k, a.v, nullptr, a.states}, a.w, a.u, at, a.y);
}

template <class Io, int N, bool CHUNKED>
DEVICE void backward_block(const Arguments<Io>& a, char* memory) {
  TileCoords at = find_coords<N>(a.tokens, a.heads, a.chunks, a.row_tiles);
  SharedMemory<Io, N> shared;
  SharedMemory<Io, N>::lay_out(shared, memory, a.row_tiles, true, CHUNKED);
  Roles<Io> first = {a.r, a.k, a.v, a.gy, a.states}, second = {a.k, a.r, a.gy, a.v, a.gradient_states};
  fetch_row_tile<Io, N, false>(shared, first, at, CHUNKED);
  stage_row_tile<Io, N, false>(shared, a.w, a.u, at);
  if constexpr (CHUNKED) sum_through<Io, N>(shared, first, second, a.w, at);
  sync_block();
  sum_gradients<Io, N, CHUNKED, true>(shared, first, a.w, a.u, at, a.gr, a.gw);
  sync_block();
  for (int n = threadIdx.x; n < N; n += 32 * at.row_tiles) {
    float sum = 0.f;
    for (int row_tile = 0; row_tile < at.row_tiles; ++row_tile) sum += load_shared(shared.bonus + row_tile * N + n);
    a.gu[at.chunk * N + n] = sum;
  }
  sum_values<Io, N, CHUNKED>(shared, second, a.w, a.u, at, a.gv);
  sum_gradients<Io, N, CHUNKED, false>(shared, second, a.w, a.u, at, a.gk, a.gw);
}

// What a chunk adds to the states on its right and on its left, (B H, chunks, 2, N, N) float32, and its product of w.
template <class Io>
struct SummaryArguments {
  const Raw<Io>*y, *z;
  const float* w;
  float *summaries, *wholes;
  int tokens, heads, chunks, row_tiles;
};

template <class Io, int N>
DEVICE void summarize_block(const SummaryArguments<Io>& a, char* memory) {
  constexpr int PITCH = SharedMemory<Io, N>::PITCH;
  TileCoords at = find_coords<N>(a.tokens, a.heads, a.chunks, a.row_tiles);
  Lane lane = this_lane();
  SharedMemory<Io, N> shared;
  SharedMemory<Io, N>::lay_out(shared, memory, a.row_tiles, false, false);
  fetch_row_tile<Io, N, false>(shared, {a.y, a.y, a.z, nullptr, nullptr}, at, false);
  stage_row_tile<Io, N, false>(shared, a.w, nullptr, at);
  sync_block();
#pragma unroll 1
  for (int tile = at.row_tile; tile < 2 * (N / 16) * (N / 16); tile += at.row_tiles) {
    int side = tile / (N / 16) / (N / 16), rows = tile / (N / 16) % (N / 16) * 16, columns = tile % (N / 16) * 16;
    Values sum = filled(0.f);
#pragma unroll 1
    for (int s = 0; s < at.row_tiles; ++s) {
      int j = side ? at.row_tiles - 1 - s : s;  // the nearest row tile last
      Tile<Io> y, z;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum.x[i] *= load_shared(shared.whole + j * N + rows + row_of(lane, i));
      load_tile_transposed(y, shared.rows(side ? shared.right : shared.left, j) + rows, PITCH);
      load_tile_transposed(z, shared.rows(shared.partner, j) + columns, PITCH);
      multiply(sum, y, z);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      a.summaries[(at.chunk * 2 + side) * N * N + (rows + row_of(lane, i)) * N + columns + column_of(lane, i)] = sum.x[i];
  }
  for (int n = threadIdx.x; n < N; n += 32 * at.row_tiles) {
    float whole = 1.f;
    for (int s = 0; s < at.row_tiles; ++s) whole *= load_shared(shared.whole + s * N + n);
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
