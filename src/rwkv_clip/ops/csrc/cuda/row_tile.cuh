// What a warp does with its row tile of 16 tokens: its coordinates, decay factors, rows to and from global memory.
#pragma once
#include "tile.cuh"

constexpr float MAX_RAW_DECAY = 80.f;  // as in ops/wkv/reference.py: keeps 0 * inf away, changes no result
constexpr float NO_DECAY = -1e30f;     // exp(-exp(.)) = 1, the factor of tokens that do not exist

// A chunk of tokens of one sample and head, one row tile per warp. Tensors are (B, T, H, N).
struct TileCoords {
  long long row0;  // index of the chunk's first token's row of N numbers
  long long head;  // index of the head's row in u
  long long chunk; // index of (sample, head, chunk)
  int stride;      // numbers from one token to the next
  int tokens;      // of the chunk that exist; what comes after reads as r = k = v = 0, factor 1
  int row_tile, row_tiles;
};

template <int N>
DEVICE TileCoords find_coords(int tokens, int heads, int chunks, int row_tiles) {
  long long block = blockIdx.x, chunk = block % chunks, sample = block / chunks / heads, head = block / chunks % heads;
  int first = int(chunk) * row_tiles * 16, left = tokens - first;
  TileCoords at;
  at.row0 = (sample * tokens + first) * heads + head;
  at.head = head;
  at.chunk = block;
  at.stride = heads * N;
  at.tokens = left < row_tiles * 16 ? left : row_tiles * 16;
  at.row_tile = int(threadIdx.x) / 32;
  at.row_tiles = row_tiles;
  return at;
}

// ---- decay factors -----------------------------------------------------------------------------------------------
// At level l the row tile is cut into halves of 2^l tokens. prefix: product of w over [start of its half, token); suffix:
// over (token, end of its half]; whole: over the half. After level 3 halves are the row tile.

struct Factors {
  Values prefix, suffix, whole;
};

DEVICE bool in_right_half(Lane lane, int i, int level) { return row_of(lane, i) >> level & 1; }

DEVICE Values cut_factor(const Factors& f, int level) {
  Lane lane = this_lane();
  Values y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = in_right_half(lane, i, level) ? f.prefix.x[i] : f.suffix.x[i];
  return y;
}

DEVICE void double_halves(Factors& f, int level) {
  Lane lane = this_lane();
  Values other;
#pragma unroll
  for (int i = 0; i < 8; ++i) other.x[i] = level < 3 ? shuffle_xor(f.whole.x[i], 4 << level) : f.whole.x[i ^ 2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bool right = in_right_half(lane, i, level);
    f.prefix.x[i] *= right ? other.x[i] : 1.f;
    f.suffix.x[i] *= right ? 1.f : other.x[i];
    f.whole.x[i] *= other.x[i];
  }
}

// Raw decay of the row tile's 16 channels from `column`; rows after the end read as `outside`.
template <int N>
DEVICE Values load_decay(const float* w, const TileCoords& at, int column, float outside) {
  Lane lane = this_lane();
  Values y;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    int row = at.row_tile * 16 + row_of(lane, i);
    bool valid = row < at.tokens;
    float2 pair = {outside, outside};
    if (valid) pair = load_pair(w + at.row0 * N + (long long)row * at.stride + column + column_of(lane, i));
    y.x[i] = pair.x;
    y.x[i + 1] = pair.y;
  }
  return y;
}

DEVICE Factors first_factors(const Values& raw_decay) {
  Factors f;
  f.prefix = f.suffix = filled(1.f);
#pragma unroll
  for (int i = 0; i < 8; ++i) f.whole.x[i] = expf(-expf(fminf(raw_decay.x[i], MAX_RAW_DECAY)));
  return f;
}

// ---- global memory -----------------------------------------------------------------------------------------------

DEVICE float2 unpack_word(Bf16, uint32_t word) { return {unpack_bf16(word, 0), unpack_bf16(word, 1)}; }
DEVICE float2 unpack_word(Fp16, uint32_t word) { return {unpack_fp16(word, 0), unpack_fp16(word, 1)}; }
DEVICE uint32_t pack_word(Bf16, float low, float high) { return pack_bf16(low, high); }
DEVICE uint32_t pack_word(Fp16, float low, float high) { return pack_fp16(low, high); }

template <class Io>
struct RawOf {
  using Type = uint16_t;
};
template <>
struct RawOf<Fp32> {
  using Type = float;
};
template <class Io>
using Raw = typename RawOf<Io>::Type;

// 16 channels of the row tile, straight to registers.
template <class Io, int N>
DEVICE Values load_values(const Raw<Io>* from, const TileCoords& at, int column) {
  Lane lane = this_lane();
  Values y;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    int row = at.row_tile * 16 + row_of(lane, i);
    float2 pair = {0.f, 0.f};
    if (row < at.tokens) {
      const Raw<Io>* p = from + at.row0 * N + (long long)row * at.stride + column + column_of(lane, i);
      if constexpr (sizeof(Raw<Io>) == 2)
        pair = unpack_word(Io{}, load_word(p));
      else
        pair = load_pair(p);
    }
    y.x[i] = pair.x;
    y.x[i + 1] = pair.y;
  }
  return y;
}

// 16 channels of the row tile to global memory, in whole sectors of 32 bytes: 16-bit lanes trade one word with their
// neighbour, so that two of them hold the row's left eight columns and two its right ones.
template <class Io, int N>
DEVICE void store_values(Raw<Io>* to, const TileCoords& at, int column, const Values& v) {
  Lane lane = this_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = at.row_tile * 16 + lane.g + 8 * half;
    Raw<Io>* p = to + at.row0 * N + (long long)row * at.stride + column;
    const float *left = v.x + 2 * half, *right = v.x + 4 + 2 * half;
    if constexpr (sizeof(Raw<Io>) == 2) {
      uint32_t l = pack_word(Io{}, left[0], left[1]), r = pack_word(Io{}, right[0], right[1]);
      bool odd = lane.q & 1;
      uint32_t got = shuffle_xor(odd ? l : r, 1);
      uint2 words = odd ? uint2{got, r} : uint2{l, got};
      if (row < at.tokens) *reinterpret_cast<uint2*>(p + (odd ? 8 + 2 * (lane.q - 1) : 2 * lane.q)) = words;
    } else if (row < at.tokens) {
      *reinterpret_cast<float2*>(p + 2 * lane.q) = {left[0], left[1]};
      *reinterpret_cast<float2*>(p + 8 + 2 * lane.q) = {right[0], right[1]};
    }
  }
}

// The row tile's 16 rows to `rows` in shared memory, in the background, zeros after the end.
template <class Io, int N>
DEVICE void copy_row_tile(void* rows, const Raw<Io>* from, const TileCoords& at) {
  constexpr int PER_COPY = 16 / sizeof(Raw<Io>), PITCH = N + Tile<Io>::PAD, COPIES = N / PER_COPY;
  for (int c = this_lane().index; c < 16 * COPIES; c += 32) {
    int row = c / COPIES, token = at.row_tile * 16 + row, column = c % COPIES * PER_COPY;
    bool valid = token < at.tokens;
    const Raw<Io>* p = from + at.row0 * N + (valid ? (long long)token * at.stride + column : 0);
    copy_16_async(static_cast<Raw<Io>*>(rows) + row * PITCH + column, p, valid);
  }
}

// A tile of rows as copy_row_tile left them.
template <class Io, int N>
DEVICE Values load_copied(const void* rows, int column) {
  Tile<Io> t;
  load_tile(t, static_cast<const typename Tile<Io>::Element*>(rows) + column, N + Tile<Io>::PAD);
  if constexpr (sizeof(Raw<Io>) == 2) {
    Values y;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      float2 pair = unpack_word(Io{}, t.x[b]);
      y.x[2 * b] = pair.x;
      y.x[2 * b + 1] = pair.y;
    }
    return y;
  } else {
    return unpack(t);
  }
}
