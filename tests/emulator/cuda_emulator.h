// A thread block on a CPU: every CUDA thread is a fiber, warp-wide instructions are meeting points of its 32 lanes.
//
// It also watches shared memory, which no GPU does by itself: reading what another thread wrote without a barrier
// between, writing what another one may still read, reading a background copy before it was waited for, leaving the
// allocation, and rows of a matrix load that meet in one bank all end the block with a message. Shared memory starts as NaN.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define DEVICE inline
#define HOST_DEVICE inline
#define __global__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct Index {
  int x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

struct Cell {  // two bytes of shared memory
  int writer = -1, write_block = -1, write_warp = -1;
  int reader = -1, read_block = -1, read_warp = -1;
  bool many_lanes = false, many_warps = false;
};

struct Copy {
  char* to;
  const char* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> copies;
  bool done = false;
};

struct Meeting {
  int arrived = 0;
  long round = 0;
  const void* given[32];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<int> warp_epoch;
  Meeting all;
  int block_epoch = 0, current = 0;
  long idle = 0;
  std::vector<char> shared;
  std::vector<Cell> cells;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string error;
};
inline Block* block = nullptr;

inline void fail(const std::string& what) {
  if (block->error.empty())
    block->error = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  // Leave this fiber for good: exceptions do not cross contexts.
  for (;;) swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void yield() {
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// All 32 lanes come here with their arguments; the last one computes for all.
template <class Args, class Compute>
void meet(Meeting& meeting, int members, int slot, Args* args, Compute compute) {
  if (slot < 32) meeting.given[slot] = args;
  long round = meeting.round;
  if (++meeting.arrived == members) {
    compute(meeting.given);
    meeting.arrived = 0;
    ++meeting.round;
    block->idle = 0;
    return;
  }
  while (meeting.round == round) yield();
}
template <class Args, class Compute>
void meet_warp(Args* args, Compute compute) {
  int lanes = blockDim.x - threadIdx.x / 32 * 32;
  if (lanes < 32) fail("a warp-wide instruction in a warp of fewer than 32 threads");
  meet(block->warps[threadIdx.x / 32], 32, threadIdx.x % 32, args, compute);
}

inline size_t offset_of(const void* pointer, size_t bytes) {
  const char* p = static_cast<const char*>(pointer);
  if (p < block->shared.data() || p + bytes > block->shared.data() + block->shared.size())
    fail("access outside of shared memory");
  return size_t(p - block->shared.data());
}

inline void note_read(const void* pointer, size_t bytes, int thread) {
  size_t begin = offset_of(pointer, bytes) / 2, warp = thread / 32;
  for (size_t c = begin; c < begin + bytes / 2; ++c) {
    Cell& cell = block->cells[c];
    if (cell.writer >= 0 && cell.writer != thread && cell.write_block == block->block_epoch &&
        (cell.writer / 32 != int(warp) || cell.write_warp == block->warp_epoch[warp]))
      fail("reads shared memory that thread " + std::to_string(cell.writer) + " wrote without a barrier between");
    if (cell.read_block != block->block_epoch) cell.many_warps = false, cell.reader = -1;
    if (cell.reader >= 0 && cell.reader / 32 != int(warp)) cell.many_warps = true;
    if (cell.reader < 0 || cell.read_warp != block->warp_epoch[warp] || cell.reader / 32 != int(warp)) cell.many_lanes = false;
    else if (cell.reader != thread) cell.many_lanes = true;
    cell.reader = thread, cell.read_block = block->block_epoch, cell.read_warp = block->warp_epoch[warp];
  }
}

inline void note_write(const void* pointer, size_t bytes, int thread) {
  size_t begin = offset_of(pointer, bytes) / 2;
  int warp = thread / 32;
  for (size_t c = begin; c < begin + bytes / 2; ++c) {
    Cell& cell = block->cells[c];
    bool same_block = cell.write_block == block->block_epoch;
    if (cell.writer >= 0 && cell.writer != thread && same_block &&
        (cell.writer / 32 != warp || cell.write_warp == block->warp_epoch[warp]))
      fail("writes shared memory that thread " + std::to_string(cell.writer) + " wrote without a barrier between");
    if (cell.reader >= 0 && cell.read_block == block->block_epoch &&
        (cell.many_warps || cell.reader / 32 != warp ||
         (cell.read_warp == block->warp_epoch[warp] && (cell.many_lanes || cell.reader != thread))))
      fail("writes shared memory that thread " + std::to_string(cell.reader) + " may still read");
    cell.writer = thread, cell.write_block = block->block_epoch, cell.write_warp = block->warp_epoch[warp];
  }
}

inline void run_fiber() {
  block->body();
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// Run one block of `threads` fibers; returns an error text, empty when all went well.
inline std::string run_block(int index, int threads, size_t shared_bytes, std::function<void()> body) {
  Block b;
  block = &b;
  b.body = std::move(body);
  b.shared.assign(shared_bytes, char(0xff));
  b.cells.resize(shared_bytes / 2 + 1);
  b.fibers.resize(threads);
  b.warps.resize((threads + 31) / 32);
  b.warp_epoch.assign(b.warps.size(), 0);
  blockIdx.x = index, blockDim.x = threads;
  for (Fiber& fiber : b.fibers) {
    fiber.stack.resize(256 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool alive = true; alive && b.error.empty();) {
    alive = false;
    for (int t = 0; t < threads && b.error.empty(); ++t) {
      if (b.fibers[t].done) continue;
      alive = true;
      b.current = t, threadIdx.x = t;
      swapcontext(&b.scheduler, &b.fibers[t].context);
    }
    if (alive && ++b.idle > 10000) b.error = "threads wait for each other forever";
  }
  block = nullptr;
  return b.error;
}

}  // namespace emulator

// ---- the names of ptx.cuh ------------------------------------------------------------------------------------

inline void* dynamic_shared() { return emulator::block->shared.data(); }

inline void sync_block() {
  emulator::meet(emulator::block->all, blockDim.x, 99, (int*)nullptr, [](const void**) {
    ++emulator::block->block_epoch;
    for (int& epoch : emulator::block->warp_epoch) ++epoch;
  });
}
inline void sync_warp() {
  int warp = threadIdx.x / 32, nothing = 0;
  emulator::meet_warp(&nothing, [warp](const void**) { ++emulator::block->warp_epoch[warp]; });
}

template <class T>
T shuffle_from(T value, int source) {
  struct Args {
    T value, result;
    int source;
  } args{value, value, source};
  emulator::meet_warp(&args, [](const void** given) {
    for (int l = 0; l < 32; ++l) {
      Args* a = (Args*)given[l];
      a->result = ((Args*)given[a->source])->value;
    }
  });
  return args.result;
}
inline float shuffle(float value, int lane) { return shuffle_from(value, lane); }
inline float shuffle_xor(float value, int mask) { return shuffle_from(value, (threadIdx.x % 32) ^ mask); }
inline uint32_t shuffle_xor(uint32_t value, int mask) { return shuffle_from(value, (threadIdx.x % 32) ^ mask); }

template <class T>
T load_shared(const T* from) {
  emulator::note_read(from, sizeof(T), threadIdx.x);
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
void store_shared(T* to, T value) {
  emulator::note_write(to, sizeof(T), threadIdx.x);
  std::memcpy(to, &value, sizeof(T));
}
inline float2 load_pair(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 8) emulator::fail("a float2 load that is not aligned");
  return {from[0], from[1]};
}
inline uint32_t load_word(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 4) emulator::fail("a word load that is not aligned");
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

inline void copy_16_async(void* to, const void* from, bool valid) {
  if ((uintptr_t(to) | uintptr_t(from)) % 16) emulator::fail("a 16-byte copy that is not aligned");
  emulator::note_write(to, 16, threadIdx.x);
  emulator::block->fibers[emulator::block->current].copies.push_back({(char*)to, valid ? (const char*)from : nullptr});
}
inline void wait_copies() {
  auto& copies = emulator::block->fibers[emulator::block->current].copies;
  for (auto& copy : copies) {
    emulator::note_write(copy.to, 16, threadIdx.x);
    if (copy.from) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  copies.clear();
}

struct MatrixLoad {
  const void* row;
  uint32_t x[4];
};
inline void load_four_matrices(uint32_t x[4], const void* row, bool transpose) {
  MatrixLoad args{row, {}};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a matrix row that is not aligned to 16 bytes");
  emulator::meet_warp(&args, [transpose](const void** given) {
    int first = int(threadIdx.x) / 32 * 32;
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      bool banks[8] = {};
      for (int r = 0; r < 8; ++r) {
        const void* from = ((MatrixLoad*)given[8 * m + r])->row;
        for (int reader = 0; reader < 32; ++reader)
          if (transpose || reader / 4 == r) emulator::note_read(from, 16, first + reader);
        std::memcpy(matrix[r], from, 16);
        bool& bank = banks[(reinterpret_cast<uintptr_t>(from) - uintptr_t(emulator::block->shared.data())) / 16 % 8];
        if (bank) emulator::fail("rows of a matrix load meet in one bank");
        bank = true;
      }
      for (int l = 0; l < 32; ++l) {
        int g = l / 4, q = l % 4;
        uint16_t low = transpose ? matrix[2 * q][g] : matrix[g][2 * q];
        uint16_t high = transpose ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
        ((MatrixLoad*)given[l])->x[m] = low | uint32_t(high) << 16;
      }
    }
  });
  std::memcpy(x, args.x, 16);
}
inline void load_matrices(uint32_t x[4], const void* row) { load_four_matrices(x, row, false); }
inline void load_matrices_transposed(uint32_t x[4], const void* row) { load_four_matrices(x, row, true); }

inline uint32_t transpose_8x8(uint32_t x) {
  struct Args {
    uint32_t x, y;
  } args{x, 0};
  emulator::meet_warp(&args, [](const void** given) {
    uint16_t matrix[8][8];
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) matrix[l / 4][2 * (l % 4) + e] = uint16_t(((Args*)given[l])->x >> 16 * e);
    for (int l = 0; l < 32; ++l)
      ((Args*)given[l])->y = matrix[2 * (l % 4)][l / 4] | uint32_t(matrix[2 * (l % 4) + 1][l / 4]) << 16;
  });
  return args.y;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t round_bf16(float value) {
  uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline float unpack_bf16(uint32_t x, int half) { return as_float(half ? x & 0xffff0000u : x << 16); }
inline uint32_t pack_fp16(float low, float high) {
  _Float16 pair[2] = {_Float16(low), _Float16(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}
inline float unpack_fp16(uint32_t x, int half) {
  _Float16 pair[2];
  std::memcpy(pair, &x, 4);
  return float(pair[half]);
}

inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  struct Args {
    float* c;
    uint32_t a[4], b[2];
  } args{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::meet_warp(&args, [](const void** given) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const Args& args = *(const Args*)given[l];
      int g = l / 4, q = l % 4;
      for (int e = 0; e < 2; ++e) {
        for (int m = 0; m < 4; ++m) a[g + 8 * (m & 1)][2 * q + e + 8 * (m >> 1)] = unpack_bf16(args.a[m], e);
        for (int m = 0; m < 2; ++m) b[2 * q + e + 8 * m][g] = unpack_bf16(args.b[m], e);
      }
    }
    for (int l = 0; l < 32; ++l) {
      float* c = ((Args*)given[l])->c;
      int g = l / 4, q = l % 4;
      for (int i = 0; i < 4; ++i) {
        int row = g + 8 * (i >> 1), column = 2 * q + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        c[i] += sum;
      }
    }
  });
}
