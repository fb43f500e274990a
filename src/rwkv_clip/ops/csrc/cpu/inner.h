// The pairs of tokens within one block, and the factors of a block's r and k for all other pairs.

#pragma once

#include "vector.h"

namespace {

constexpr int MAX_VECTORS = 8;  // of a head (N <= 128)

// weights[t][s] = sum over channels of r_t k_s (product of w between them), u in its place for t = s.
template <int V>
void inner_weights(const float* r, const float* k, const float* w, const float* u, int64_t rows, float* weights) {
  Vec part[BLOCK][BLOCK] = {};
  for (int64_t s = 0; s < rows; s++) {
    Vec rs[V], ks[V], own = {};
    for (int j = 0; j < V; j++) {
      rs[j] = vec(r + (s * V + j) * BLOCK), ks[j] = vec(k + (s * V + j) * BLOCK);
      own += rs[j] * ks[j] * vec(u + j * BLOCK);
    }
    part[s][s] = own;
    for (int64_t t = s + 1; t < rows; t++) {
      Vec below = {}, above = {};
      for (int j = 0; j < V; j++) {
        below += ks[j] * vec(r + (t * V + j) * BLOCK), above += rs[j] * vec(k + (t * V + j) * BLOCK);
        const Vec factor = vec(w + (t * V + j) * BLOCK);
        ks[j] *= factor, rs[j] *= factor;
      }
      part[t][s] = below, part[s][t] = above;
    }
  }
  for (int64_t t = 0; t < rows; t++) vec(weights + t * BLOCK) = sums(part[t]);
}

void inner_weights(int64_t vectors, const float* r, const float* k, const float* w, const float* u, int64_t rows,
                   float* weights) {
  typedef void (*Form)(const float*, const float*, const float*, const float*, int64_t, float*);
  static const Form forms[MAX_VECTORS] = {inner_weights<1>, inner_weights<2>, inner_weights<3>, inner_weights<4>,
                                          inner_weights<5>, inner_weights<6>, inner_weights<7>, inner_weights<8>};
  forms[vectors - 1](r, k, w, u, rows, weights);
}

// Adds the gradients of the pairs within a block, given gw[t][s], the gradient of their weights.
void inner_backward(const float* r, const float* k, const float* w, const float* u, const float* gw, int64_t rows,
                    int64_t width, float* gr, float* gk, float* glog, float* gu) {
  for (int64_t n = 0; n < width; n += BLOCK) {
    Vec straddling[BLOCK] = {};  // per t: the terms of all pairs (t, earlier than the current s)
    for (int64_t s = 0; s < rows; s++) {
      const Vec rs = vec(r + s * width + n), ks = vec(k + s * width + n), own = gw[s * BLOCK + s] * vec(u + n);
      vec(gu + n) += gw[s * BLOCK + s] * rs * ks;
      Vec grs = vec(gr + s * width + n) + own * ks, gks = vec(gk + s * width + n) + own * rs;
      Vec factor = Vec{} + 1.0f, across = {};
      for (int64_t t = s + 1; t < rows; t++) {
        const Vec below = gw[t * BLOCK + s] * factor, above = gw[s * BLOCK + t] * factor;
        const Vec rt = vec(r + t * width + n), kt = vec(k + t * width + n);
        const Vec to_k = below * rt, to_r = above * kt;
        gks += to_k, grs += to_r;
        vec(gr + t * width + n) += below * ks, vec(gk + t * width + n) += above * rs;
        straddling[t] += to_k * ks + to_r * rs;
        across += t > s + 1 ? straddling[t] : Vec{};
        factor *= vec(w + t * width + n);
      }
      vec(gr + s * width + n) = grs, vec(gk + s * width + n) = gks;
      if (s + 1 < rows) vec(glog + (s + 1) * width + n) += across;
    }
  }
}

// A block's r and k times R (product of w from the block's start) and L (to its end); `whole` = product of all.
struct Scaled {
  float *right, *left, *rr, *rl, *kl, *kr, *whole;
  Scaled(Arena& arena, int64_t rows, int64_t width, int64_t blocks)
      : right(arena.take(rows * width)), left(arena.take(rows * width)), rr(arena.take(rows * width)),
        rl(arena.take(rows * width)), kl(arena.take(rows * width)), kr(arena.take(rows * width)),
        whole(arena.take(blocks * width)) {}
  Scaled at(int64_t block, int64_t width) const {
    Scaled x = *this;
    for (float** p : {&x.right, &x.left, &x.rr, &x.rl, &x.kl, &x.kr}) *p += block * BLOCK * width;
    x.whole += block * width;
    return x;
  }
  void fill(const float* r, const float* k, const float* w, int64_t width) const {
    for (int64_t n = 0; n < width; n += BLOCK) {
      Vec p = Vec{} + 1.0f;
      for (int64_t i = n; i < n + BLOCK * width; i += width) {
        vec(right + i) = p, vec(rr + i) = p * vec(r + i), vec(kr + i) = p * vec(k + i);
        p *= vec(w + i);
      }
      vec(whole + n) = p;
      p = Vec{} + 1.0f;
      for (int64_t i = n + (BLOCK - 1) * width; i >= n; i -= width) {
        vec(left + i) = p, vec(rl + i) = p * vec(r + i), vec(kl + i) = p * vec(k + i);
        p *= vec(w + i);
      }
    }
  }
};

}  // namespace
