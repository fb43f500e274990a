// The C interface of the CUDA kernels for one head size, HEAD_SIZE; ops/cuda.py calls it. No torch, no pybind.
//
// Every call works on the given stream of the current device and returns null, or the text of the launch's error.
// kind: 0 bfloat16, 1 float16, 2 float32 for r, k, v, y and their gradients; w, u, gw, gu are float32. Tensors are
// contiguous, (B, T, H, N), and aligned to 16 bytes.
#include "wkv6_kernels.cuh"

#ifndef HEAD_SIZE
#error "HEAD_SIZE must be defined: a multiple of 16, at most 128"
#endif
static_assert(HEAD_SIZE % 16 == 0 && HEAD_SIZE >= 16 && HEAD_SIZE <= 128);

constexpr int N = HEAD_SIZE;
constexpr int MAX_STRIPS = N <= 80 ? 13 : 8;  // of an unchunked block: registers and shared memory end there
constexpr int CHUNK_STRIPS = 4;

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

template <class Io, bool CHUNKED>
__global__ void __launch_bounds__(32 * (CHUNKED ? CHUNK_STRIPS : MAX_STRIPS)) forward_kernel(Arguments<Io> a) {
  KERNEL_MEMORY;
  forward_block<Io, N, CHUNKED>(a, memory);
}

template <class Io, bool CHUNKED>
__global__ void __launch_bounds__(32 * (CHUNKED ? CHUNK_STRIPS : MAX_STRIPS)) backward_kernel(Arguments<Io> a) {
  KERNEL_MEMORY;
  backward_block<Io, N, CHUNKED>(a, memory);
}

template <class Io>
__global__ void __launch_bounds__(32 * CHUNK_STRIPS) summary_kernel(SummaryArguments<Io> a) {
  KERNEL_MEMORY;
  summarize_block<Io, N>(a, memory);
}

template <class Io>
struct ScanArguments {
  const float *summaries, *wholes;
  typename Tile<Io>::Element* states;
  int chunks;
};
constexpr int SCAN_THREADS = 128;
template <class Io>
__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(ScanArguments<Io> a) {
  constexpr int BLOCKS = 2 * N * N / SCAN_THREADS;  // per (sample, head)
  int rest = int(blockIdx.x % BLOCKS) * SCAN_THREADS + int(threadIdx.x);
  scan_element<Io, N>(a.summaries, a.wholes, a.states, a.chunks, blockIdx.x / BLOCKS, rest / (N * N), rest % (N * N));
}

template <class Io>
long long shared_bytes(int strips, bool gradient, bool chunked) {
  Room<Io, N> room;
  return Room<Io, N>::lay_out(room, nullptr, strips, gradient, chunked);
}

// Call `f` with the kind's tag.
template <class F>
auto with_kind(int kind, F f) {
  return kind == 0 ? f(Bf16{}) : kind == 1 ? f(Fp16{}) : f(Fp32{});
}

extern "C" {

// The way through a sequence: one block for all of it (chunks = 1), or chunks of `strips` x 16 tokens. Returns whether the
// device's shared memory per block suffices.
int wkv6_plan(int kind, int tokens, int gradient, int shared_limit, int* strips, int* chunks) {
  return with_kind(kind, [&](auto io) {
    using Io = decltype(io);
    *strips = (tokens + 15) / 16, *chunks = 1;
    if (*strips <= MAX_STRIPS && shared_bytes<Io>(*strips, gradient, false) <= shared_limit) return 1;
    for (*strips = CHUNK_STRIPS; *strips > 0; *strips /= 2) {
      *chunks = (tokens + *strips * 16 - 1) / (*strips * 16);
      if (shared_bytes<Io>(*strips, gradient, true) <= shared_limit) return 1;
    }
    return 0;
  });
}

const char* wkv6_forward(int kind, int samples, int tokens, int heads, int strips, int chunks, const void* r, const void* k,
                         const void* v, const float* w, const float* u, const void* states, void* y, void* stream) {
  return with_kind(kind, [&](auto io) {
    using Io = decltype(io);
    using T = Raw<Io>;
    Arguments<Io> a = {};
    a.r = (const T*)r, a.k = (const T*)k, a.v = (const T*)v, a.w = w, a.u = u, a.y = (T*)y;
    a.states = (const typename Tile<Io>::Element*)states;
    a.tokens = tokens, a.heads = heads, a.chunks = chunks, a.strips = strips;
    auto kernel = chunks > 1 ? forward_kernel<Io, true> : forward_kernel<Io, false>;
    return launch(kernel, (long long)samples * heads * chunks, 32 * strips, shared_bytes<Io>(strips, false, chunks > 1), stream, a);
  });
}

// States of (y, z) at the borders of chunks. summaries: float32 (B H, chunks, 2, N, N), wholes: float32 (B H, chunks, N),
// both scratch; states: as summaries, in bfloat16, or float32 for kind 2.
const char* wkv6_states(int kind, int samples, int tokens, int heads, int strips, int chunks, const void* y, const void* z,
                        const float* w, float* summaries, float* wholes, void* states, void* stream) {
  return with_kind(kind, [&](auto io) {
    using Io = decltype(io);
    using T = Raw<Io>;
    SummaryArguments<Io> a = {(const T*)y, (const T*)z, w, summaries, wholes, tokens, heads, chunks, strips};
    long long rows = (long long)samples * heads;
    const char* error = launch(summary_kernel<Io>, rows * chunks, 32 * strips, shared_bytes<Io>(strips, false, false), stream, a);
    if (error) return error;
    ScanArguments<Io> scan = {summaries, wholes, (typename Tile<Io>::Element*)states, chunks};
    return launch(scan_kernel<Io>, rows * (2 * N * N / SCAN_THREADS), SCAN_THREADS, 0, stream, scan);
  });
}

// gu: float32 (B H, chunks, N), to be summed over samples and chunks.
const char* wkv6_backward(int kind, int samples, int tokens, int heads, int strips, int chunks, const void* gy, const void* r,
                          const void* k, const void* v, const float* w, const float* u, const void* states,
                          const void* gradient_states, void* gr, void* gk, void* gv, float* gw, float* gu, void* stream) {
  return with_kind(kind, [&](auto io) {
    using Io = decltype(io);
    using T = Raw<Io>;
    using E = typename Tile<Io>::Element;
    Arguments<Io> a = {};
    a.r = (const T*)r, a.k = (const T*)k, a.v = (const T*)v, a.gy = (const T*)gy, a.w = w, a.u = u;
    a.gr = (T*)gr, a.gk = (T*)gk, a.gv = (T*)gv, a.gw = gw, a.gu = gu;
    a.states = (const E*)states, a.gradient_states = (const E*)gradient_states;
    a.tokens = tokens, a.heads = heads, a.chunks = chunks, a.strips = strips;
    auto kernel = chunks > 1 ? backward_kernel<Io, true> : backward_kernel<Io, false>;
    return launch(kernel, (long long)samples * heads * chunks, 32 * strips, shared_bytes<Io>(strips, true, chunks > 1), stream, a);
  });
}
}
