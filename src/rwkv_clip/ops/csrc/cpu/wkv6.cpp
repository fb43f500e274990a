// Bidirectional WKV6 on a CPU, forward and backward, float32 inside. Maths: ops/wkv/reference.py and ops/wkv/tree.py.
//
// Tokens go in blocks of 16, the width of a vector. Within a block every pair (t, s) gets its decay as a running
// product, channel by channel. Between two blocks the decay splits at the borders, r_t R_t . (product of the blocks
// between) . L_s k_s with R, L the products of w from the block's start and to its end, so that a pair of blocks is a
// 16 x 16 matrix product. Sequences longer than about twice the head size replace the pairs of blocks by N x N states
// that pass from block to block (linear in T). As in the product tree all factors are products of numbers in [0, 1] and
// every gradient is a plain sum: nothing overflows, divides or cancels.
//
// One sample and head is one task of a thread; results do not depend on the number of threads.

#include "backward.h"
#include "forward.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

// Numbers below 1e-38, which strong decays make, count as zero for the life of this object: they would be slow.
struct FlushTiny {
#ifdef __SSE__
  const unsigned before = _mm_getcsr();
  FlushTiny() { _mm_setcsr(before | 0x8040); }
  ~FlushTiny() { _mm_setcsr(before); }
#endif
};

template <class Work, class Run>
void each_head(const Shape& s, float* scratch, int64_t threads, const Run& run) {
  Arena count{nullptr};
  Work(count, s);
#pragma omp parallel num_threads(static_cast<int>(std::min(threads, s.b * s.h)))
  {
    const FlushTiny flush;
#ifdef _OPENMP
    Arena arena{scratch + omp_get_thread_num() * count.used};
#else
    Arena arena{scratch};
#endif
    Work work(arena, s);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.b * s.h; i++) run(work, i / s.h, i % s.h);
  }
}

}  // namespace

extern "C" {

// Floats of scratch memory that every thread needs; the memory starts at a multiple of 64 bytes.
int64_t wkv6_forward_scratch(const Shape* s) {
  Arena count{nullptr};
  Forward(count, *s);
  return count.used;
}

int64_t wkv6_backward_scratch(const Shape* s) {
  Arena count{nullptr};
  Backward(count, *s);
  return count.used;
}

// in: r, k, v, w; u (H, N) float32.
void wkv6_forward(const Shape* s, const View* in, const float* u, const View* y, float* scratch, int64_t threads) {
  each_head<Forward>(*s, scratch, threads,
                     [&](Forward& work, int64_t b, int64_t h) { work.run(*s, in, u, *y, b, h); });
}

// in: gy, r, k, v, w; out: gr, gk, gv, gw; gu (B, H, N) float32, one row per sample and head.
void wkv6_backward(const Shape* s, const View* in, const float* u, const View* out, float* gu, float* scratch,
                   int64_t threads) {
  each_head<Backward>(*s, scratch, threads,
                      [&](Backward& work, int64_t b, int64_t h) { work.run(*s, in, u, out, gu, b, h); });
}
}
