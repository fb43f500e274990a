// Backward pass of one sample and head: recomputes the weights of all pairs, keeps nothing from the forward pass.

#pragma once

#include "inner.h"

namespace {

constexpr int SEGMENT = 4;  // blocks between two kept states

struct Backward {
  float *r, *k, *v, *gy, *w, *log_w, *u;           // inputs, packed
  float *gr, *gk, *gv, *glog, *gu;                 // gradients of r, k, v, log w, u
  float *grr, *grl, *gkl, *gkr, *over;             // of scaled.rr, .rl, .kl, .kr, and of log scaled.whole
  float *weights, *gweights, *query, *gquery, *between;  // of one pair of blocks
  float *right, *left, *vt;                        // transposed k R, k L, v
  float *kv_left, *kv_right, *ry_left, *ry_right;  // states, see states()
  float *turned, *kept, *segment;
  Scaled scaled;

  Backward(Arena& arena, const Shape& s)
      : scaled(arena, s.pairwise() ? s.blocks() * BLOCK : BLOCK, s.width(), s.pairwise() ? s.blocks() : 1) {
    const int64_t block = BLOCK * s.width(), square = s.width() * s.width(), local = s.pairwise() ? s.size() : block;
    for (float** p : {&r, &k, &v, &gy, &w, &log_w, &gr, &gk, &gv, &glog}) *p = arena.take(s.size());
    for (float** p : {&grr, &grl, &gkl, &gkr, &right, &left, &vt}) *p = arena.take(local);
    for (float** p : {&weights, &gweights}) *p = arena.take(BLOCK * BLOCK);
    for (float** p : {&query, &gquery}) *p = arena.take(block);
    for (float** p : {&u, &gu, &between}) *p = arena.take(s.width());
    over = arena.take(s.blocks() * s.width());
    if (s.pairwise()) return;
    for (float** p : {&kv_left, &kv_right, &ry_left, &ry_right, &turned}) *p = arena.take(square);
    segment = arena.take(SEGMENT * 2 * square);
    kept = arena.take((s.blocks() + SEGMENT - 1) / SEGMENT * 2 * square);
  }

  // The pairs of blocks on one side, as cross_forward: rs, ks, kt are r R, k L, (k L)^T for step -1, else r L, k R, ..
  void cross(const Shape& s, int64_t step, const float* rs, const float* ks, const float* kt, float* grs, float* gks) {
    const int64_t width = s.width(), block = BLOCK * width, vectors = s.vectors();
    for (int64_t i = 0; i < s.blocks(); i++) {
      const int64_t rows = s.rows(i);
      std::copy_n(rs + i * block, block, query);
      std::fill_n(between, width, 1.0f);
      for (int64_t j = i + step; j >= 0 && j < s.blocks(); j += step) {
        if (j != i + step) {
          scale_rows(query, scaled.whole + (j - step) * width, rows, width);
          scale_rows(between, scaled.whole + (j - step) * width, 1, width);
        }
        product(weights, BLOCK, rows, 1, query, width, 1, kt + j * block, BLOCK, width, false);
        product(gweights, BLOCK, rows, 1, gy + i * block, width, 1, vt + j * block, BLOCK, width, false);
        product(gv + j * block, width, s.rows(j), vectors, weights, 1, BLOCK, gy + i * block, width, rows, true);
        product(gks + j * block, width, s.rows(j), vectors, gweights, 1, BLOCK, query, width, rows, true);
        product(gquery, width, rows, vectors, gweights, BLOCK, 1, ks + j * block, width, s.rows(j), false);
        for (int64_t n = 0; n < width; n += BLOCK) {
          Vec terms = {};
          for (int64_t t = n; t < n + rows * width; t += width) {
            terms += vec(query + t) * vec(gquery + t);
            vec(grs + i * block + t) += vec(gquery + t) * vec(between + n);
          }
          for (int64_t inside = j - step; inside != i; inside -= step) vec(over + inside * width + n) += terms;
        }
      }
    }
  }

  void pairs(const Shape& s) {
    const int64_t width = s.width(), block = BLOCK * width;
    for (float* x : {grr, grl, gkl, gkr, gv}) std::fill_n(x, s.size(), 0.0f);
    std::fill_n(over, s.blocks() * width, 0.0f);
    for (int64_t i = 0; i < s.blocks(); i++) {
      const Scaled x = scaled.at(i, width);
      x.fill(r + i * block, k + i * block, w + i * block, width);
      transpose_block(x.kl, width, left + i * block);
      transpose_block(x.kr, width, right + i * block);
      transpose_block(v + i * block, width, vt + i * block);
    }
    cross(s, -1, scaled.rr, scaled.kl, left, grr, gkl);
    cross(s, 1, scaled.rl, scaled.kr, right, grl, gkr);
    for (int64_t i = 0; i < s.blocks(); i++) {
      const int64_t at = i * block;
      finish(s, i, scaled.at(i, width), vt + at, grr + at, grl + at, gkl + at, gkr + at);
    }
  }

  // state = whole . state + x^T z of block i; kept transposed, (channel of x, channel of z), decays along z.
  void advance(const Shape& s, int64_t i, float* state, const float* x, const float* z) const {
    const int64_t width = s.width();
    scale_rows(state, scaled.whole, width, width);
    product(state, width, width, s.vectors(), x + i * BLOCK * width, 1, width, z, width, s.rows(i), true);
  }

  // Four states pass by: sums of v k^T over the tokens to the left and to the right of a block, which its r reads, and
  // of gy r^T, which its k and v get their gradients from. One pass to the right keeps those of the left per SEGMENT
  // blocks; the pass to the left restores them segment by segment, with the other two beside.
  void states(const Shape& s) {
    const int64_t width = s.width(), block = BLOCK * width, square = width * width;
    const auto fill = [&](int64_t i) { scaled.fill(r + i * block, k + i * block, w + i * block, width); };
    for (float* x : {kv_left, kv_right, ry_left, ry_right}) std::fill_n(x, square, 0.0f);
    for (int64_t i = 0; i < s.blocks(); i++) {
      if (i % SEGMENT == 0) {
        float* place = kept + i / SEGMENT * 2 * square;
        std::copy_n(ry_left, square, std::copy_n(kv_left, square, place));
      }
      fill(i);
      advance(s, i, kv_left, v, scaled.kl);
      advance(s, i, ry_left, gy, scaled.rl);
    }
    for (int64_t first = (s.blocks() - 1) / SEGMENT * SEGMENT; first >= 0; first -= SEGMENT) {
      const int64_t end = std::min<int64_t>(first + SEGMENT, s.blocks());
      std::copy_n(kept + first / SEGMENT * 2 * square, 2 * square, segment);
      for (int64_t i = first; i + 1 < end; i++) {
        float* next = segment + (i + 1 - first) * 2 * square;
        std::copy_n(next - 2 * square, 2 * square, next);
        fill(i);
        advance(s, i, next, v, scaled.kl);
        advance(s, i, next + square, gy, scaled.rl);
      }
      for (int64_t i = end - 1; i >= first; i--) {
        fill(i);
        from_states(s, i, segment + (i - first) * 2 * square, segment + ((i - first) * 2 + 1) * square);
        advance(s, i, kv_right, v, scaled.kr);
        advance(s, i, ry_right, gy, scaled.rr);
      }
    }
  }

  // Everything of block i, given what has been summed on both of its sides.
  void from_states(const Shape& s, int64_t i, const float* kv_before, const float* ry_before) {
    const int64_t width = s.width(), rows = s.rows(i), vectors = s.vectors();
    const float *gyi = gy + i * BLOCK * width, *vi = v + i * BLOCK * width;
    float* gvi = gv + i * BLOCK * width;
    product(grr, width, rows, vectors, gyi, width, 1, kv_before, width, width, false);
    product(grl, width, rows, vectors, gyi, width, 1, kv_right, width, width, false);
    product(gkl, width, rows, vectors, vi, width, 1, ry_right, width, width, false);
    product(gkr, width, rows, vectors, vi, width, 1, ry_before, width, width, false);
    transpose_state(ry_right, width, turned);
    product(gvi, width, rows, vectors, scaled.kl, width, 1, turned, width, width, false);
    transpose_state(ry_before, width, turned);
    product(gvi, width, rows, vectors, scaled.kr, width, 1, turned, width, width, true);
    for (int64_t n = 0; n < width; n += BLOCK) {
      Vec sum = {};
      for (int64_t j = n; j < width * width; j += width)
        sum += vec(kv_before + j) * vec(ry_right + j) + vec(kv_right + j) * vec(ry_before + j);
      vec(over + i * width + n) = sum * vec(scaled.whole + n);
    }
    transpose_block(vi, width, vt);
    finish(s, i, scaled, vt, grr, grl, gkl, gkr);
  }

  // Adds the pairs within block i and takes the factors off the gradients of the pairs across its borders.
  void finish(const Shape& s, int64_t i, const Scaled& x, const float* vt, const float* grr, const float* grl,
              const float* gkl, const float* gkr) {
    const int64_t width = s.width(), rows = s.rows(i), at = i * BLOCK * width;
    product(gweights, BLOCK, rows, 1, gy + at, width, 1, vt, BLOCK, width, false);
    inner_weights(s.vectors(), r + at, k + at, w + at, u, rows, weights);
    product(gv + at, width, rows, s.vectors(), weights, 1, BLOCK, gy + at, width, rows, true);
    for (int64_t n = 0; n < width; n += BLOCK) {
      // A decay lies inside the pairs that enter its block from the left and end after it, that enter from the right
      // and end before it, and that straddle the whole block.
      Vec entering = vec(over + i * width + n);
      for (int64_t t = n + (rows - 1) * width; t >= n; t -= width) {
        vec(glog + at + t) = entering;
        entering += vec(x.rr + t) * vec(grr + t) + vec(x.kr + t) * vec(gkr + t);
      }
      entering = Vec{};
      for (int64_t t = n; t < n + rows * width; t += width) {
        vec(glog + at + t) += entering;
        entering += vec(x.rl + t) * vec(grl + t) + vec(x.kl + t) * vec(gkl + t);
        vec(gr + at + t) = vec(grr + t) * vec(x.right + t) + vec(grl + t) * vec(x.left + t);
        vec(gk + at + t) = vec(gkl + t) * vec(x.left + t) + vec(gkr + t) * vec(x.right + t);
      }
    }
    inner_backward(r + at, k + at, w + at, u, gweights, rows, width, gr + at, gk + at, glog + at, gu);
    for (int64_t t = at; t < at + rows * width; t += BLOCK) vec(glog + t) *= vec(log_w + t);  // d log w / d raw = log w
  }

  // in: gy, r, k, v, w; out: gr, gk, gv, gw; gu of this sample and head alone.
  void run(const Shape& s, const View* in, const float* all_u, const View* out, float* all_gu, int64_t b, int64_t h) {
    load(in[0], s, b, h, 0.0f, gy), load(in[1], s, b, h, 0.0f, r), load(in[2], s, b, h, 0.0f, k);
    load(in[3], s, b, h, 0.0f, v);
    load_decay(in[4], s, b, h, w, log_w);
    std::fill(std::copy_n(all_u + h * s.n, s.n, u), u + s.width(), 0.0f);
    std::fill_n(gu, s.width(), 0.0f);
    s.pairwise() ? pairs(s) : states(s);
    store(gr, s, b, h, out[0]), store(gk, s, b, h, out[1]), store(gv, s, b, h, out[2]), store(glog, s, b, h, out[3]);
    std::copy_n(gu, s.n, all_gu + (b * s.h + h) * s.n);
  }
};

}  // namespace
