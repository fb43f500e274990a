// The C interface of the CUDA kernels for one head size, HEAD_SIZE, and one kind of numbers, KIND (Bf16, Fp16, Fp32) of r,
// k, v, y and their gradients; w, u, gw, gu are float32. ops/wkv/cuda.py calls it. No torch, no pybind.
//
// Every call works on the given stream of the current device and returns null, or the text of the launch's error.
// Tensors are contiguous, (B, T, H, N), and aligned to 16 bytes.
#include "kernels.cuh"

static_assert(HEAD_SIZE % 16 == 0 && HEAD_SIZE >= 16 && HEAD_SIZE <= 128, "a multiple of 16, at most 128");

using Io = KIND;
using T = Raw<Io>;
using Element = Tile<Io>::Element;
constexpr int N = HEAD_SIZE;
constexpr int CHUNK_ROW_TILES = 4;

// Variants of the kernels by the most row tiles (warps) of a block: fewer warps may have more registers each. Beyond the
// widest, and where shared memory does not suffice, sequences are cut into chunks.
constexpr int NARROW = 4, MIDDLE = 8, WIDE = N <= 80 ? 13 : 8;

#ifdef WKV6_EMULATE
#define KERNEL_MEMORY char* memory = static_cast<char*>(dynamic_shared())
static std::string emulator_error;
template <class Kernel, class Arguments>
const char* launch(Kernel kernel, long long blocks, int threads, long long shared, void*, Arguments arguments) {
  for (long long b = 0; b < blocks; ++b) {
    emulator_error = emulator::run_block(int(b), threads, size_t(shared), [&] { kernel(arguments); });
    if (!emulator_error.empty()) return emulator_error.c_str();
  }
  return nullptr;
}
#else
#define KERNEL_MEMORY extern __shared__ __align__(128) char memory[]
template <class Kernel, class Arguments>
const char* launch(Kernel kernel, long long blocks, int threads, long long shared, void* stream, Arguments arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <int ROW_TILES, bool CHUNKED>
__global__ void __launch_bounds__(32 * ROW_TILES, ROW_TILES == NARROW && !CHUNKED ? 3 : 1) forward_kernel(Arguments<Io> a) {
  KERNEL_MEMORY;
  forward_block<Io, N, CHUNKED>(a, memory);
}

template <int ROW_TILES, bool CHUNKED>
__global__ void __launch_bounds__(32 * ROW_TILES, ROW_TILES == NARROW && !CHUNKED ? 3 : 1) backward_kernel(Arguments<Io> a) {
  KERNEL_MEMORY;
  backward_block<Io, N, CHUNKED>(a, memory);
}

__global__ void __launch_bounds__(32 * CHUNK_ROW_TILES) summary_kernel(SummaryArguments<Io> a) {
  KERNEL_MEMORY;
  summarize_block<Io, N>(a, memory);
}

struct ScanArguments {
  const float *summaries, *wholes;
  Element* states;
  int chunks;
};
constexpr int SCAN_THREADS = 128;
__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(ScanArguments a) {
  constexpr int BLOCKS = 2 * N * N / SCAN_THREADS;  // per (sample, head)
  int rest = int(blockIdx.x % BLOCKS) * SCAN_THREADS + int(threadIdx.x);
  scan_element<Io, N>(a.summaries, a.wholes, a.states, a.chunks, blockIdx.x / BLOCKS, rest / (N * N), rest % (N * N));
}

static long long shared_bytes(int row_tiles, bool gradient, bool chunked) {
  SharedMemory<Io, N> shared;
  return SharedMemory<Io, N>::lay_out(shared, nullptr, row_tiles, gradient, chunked);
}

extern "C" {

// How a sequence is cut: one block for all of it (chunks = 1), or chunks of `row_tiles` x 16 tokens. Returns whether the
// device's shared memory per block suffices.
int wkv6_plan(int tokens, int gradient, int shared_limit, int* row_tiles, int* chunks) {
  *row_tiles = (tokens + 15) / 16, *chunks = 1;
  if (*row_tiles <= WIDE && shared_bytes(*row_tiles, gradient, false) <= shared_limit) return 1;
  for (*row_tiles = CHUNK_ROW_TILES; *row_tiles > 0; *row_tiles /= 2) {
    *chunks = (tokens + *row_tiles * 16 - 1) / (*row_tiles * 16);
    if (shared_bytes(*row_tiles, gradient, true) <= shared_limit) return 1;
  }
  return 0;
}

// states: of (k, v), by wkv6_states; null without chunks.
const char* wkv6_forward(int samples, int tokens, int heads, int row_tiles, int chunks, const T* r, const T* k, const T* v,
                         const float* w, const float* u, const Element* states, T* y, void* stream) {
  Arguments<Io> a = {};
  a.r = r, a.k = k, a.v = v, a.w = w, a.u = u, a.y = y, a.states = states;
  a.tokens = tokens, a.heads = heads, a.chunks = chunks, a.row_tiles = row_tiles;
  auto kernel = chunks > 1            ? forward_kernel<CHUNK_ROW_TILES, true>
                : row_tiles <= NARROW ? forward_kernel<NARROW, false>
                : row_tiles <= MIDDLE ? forward_kernel<MIDDLE, false>
                                      : forward_kernel<WIDE, false>;
  long long blocks = (long long)samples * heads * chunks;
  return launch(kernel, blocks, 32 * row_tiles, shared_bytes(row_tiles, false, chunks > 1), stream, a);
}

// States of (y, z) at the borders of chunks, (B H, chunks, 2, N, N), bfloat16, or float32 for Fp32. summaries: of the same
// shape, wholes: (B H, chunks, N), both float32 and scratch.
const char* wkv6_states(int samples, int tokens, int heads, int row_tiles, int chunks, const T* y, const T* z, const float* w,
                        float* summaries, float* wholes, Element* states, void* stream) {
  SummaryArguments<Io> a = {y, z, w, summaries, wholes, tokens, heads, chunks, row_tiles};
  long long rows = (long long)samples * heads;
  const char* error = launch(summary_kernel, rows * chunks, 32 * row_tiles, shared_bytes(row_tiles, false, false), stream, a);
  if (error) return error;
  ScanArguments scan = {summaries, wholes, states, chunks};
  return launch(scan_kernel, rows * (2 * N * N / SCAN_THREADS), SCAN_THREADS, 0, stream, scan);
}

// states of (k, v), gradient_states of (r, gy). gu: (B H, chunks, N), to be summed over samples and chunks.
const char* wkv6_backward(int samples, int tokens, int heads, int row_tiles, int chunks, const T* gy, const T* r, const T* k,
                          const T* v, const float* w, const float* u, const Element* states, const Element* gradient_states,
                          T* gr, T* gk, T* gv, float* gw, float* gu, void* stream) {
  Arguments<Io> a = {r, k, v, gy, w, u, nullptr, gr, gk, gv, gw, gu, states, gradient_states,
                     tokens, heads, chunks, row_tiles};
  auto kernel = chunks > 1            ? backward_kernel<CHUNK_ROW_TILES, true>
                : row_tiles <= NARROW ? backward_kernel<NARROW, false>
                : row_tiles <= MIDDLE ? backward_kernel<MIDDLE, false>
                                      : backward_kernel<WIDE, false>;
  long long blocks = (long long)samples * heads * chunks;
  return launch(kernel, blocks, 32 * row_tiles, shared_bytes(row_tiles, true, chunks > 1), stream, a);
}
}
