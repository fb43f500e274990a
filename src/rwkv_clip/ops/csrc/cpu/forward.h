// Forward pass of one sample and head.

#pragma once

#include "inner.h"

namespace {

// y += the pairs of blocks on one side: step -1 reads blocks to the left (rs = r R, kt = (k L)^T), +1 to the right.
void cross_forward(const Shape& s, int64_t step, const float* rs, const float* kt, const float* v, const float* whole,
                   float* query, float* weights, float* y) {
  const int64_t width = s.width(), block = BLOCK * width;
  for (int64_t i = 0; i < s.blocks(); i++) {
    std::copy_n(rs + i * block, block, query);
    for (int64_t j = i + step; j >= 0 && j < s.blocks(); j += step) {
      if (j != i + step) scale_rows(query, whole + (j - step) * width, s.rows(i), width);
      product(weights, BLOCK, s.rows(i), 1, query, width, 1, kt + j * block, BLOCK, width, false);
      product(y + i * block, width, s.rows(i), s.vectors(), weights, BLOCK, 1, v + j * block, width, s.rows(j), true);
    }
  }
}

// state (width x width, row i scaled by w_i) = whole . state + k^T v of one block.
void advance(float* state, const float* whole, const float* k, const float* v, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < width; i++)
    for (int64_t n = 0; n < width; n += BLOCK) vec(state + i * width + n) *= whole[i];
  product(state, width, width, width / BLOCK, k, 1, width, v, width, rows, true);
}

struct Forward {
  float *r, *k, *v, *w, *u, *y, *weights, *query, *state, *right, *left;
  Scaled scaled;
  Forward(Arena& arena, const Shape& s)
      : r(arena.take(s.size())), k(arena.take(s.size())), v(arena.take(s.size())), w(arena.take(s.size())),
        u(arena.take(s.width())), y(arena.take(s.size())), weights(arena.take(BLOCK * BLOCK)),
        query(arena.take(BLOCK * s.width())), state(arena.take(s.pairwise() ? 0 : s.width() * s.width())),
        right(arena.take(s.pairwise() ? s.size() : 0)), left(arena.take(s.pairwise() ? s.size() : 0)),
        scaled(arena, s.pairwise() ? s.blocks() * BLOCK : BLOCK, s.width(), s.pairwise() ? s.blocks() : 1) {}

  void pairs(const Shape& s) {
    const int64_t width = s.width(), block = BLOCK * width;
    for (int64_t i = 0; i < s.blocks(); i++) {
      const Scaled x = scaled.at(i, width);
      x.fill(r + i * block, k + i * block, w + i * block, width);
      transpose_block(x.kl, width, left + i * block);
      transpose_block(x.kr, width, right + i * block);
    }
    cross_forward(s, -1, scaled.rr, left, v, scaled.whole, query, weights, y);
    cross_forward(s, 1, scaled.rl, right, v, scaled.whole, query, weights, y);
  }

  void states(const Shape& s) {
    const int64_t width = s.width(), block = BLOCK * width, last = s.blocks() - 1;
    for (const bool forwards : {true, false}) {
      std::fill_n(state, width * width, 0.0f);
      for (int64_t step = 0; step <= last; step++) {
        const int64_t i = forwards ? step : last - step;
        scaled.fill(r + i * block, k + i * block, w + i * block, width);
        if (step)
          product(y + i * block, width, s.rows(i), s.vectors(), forwards ? scaled.rr : scaled.rl, width, 1, state,
                  width, width, true);
        if (step < last)
          advance(state, scaled.whole, forwards ? scaled.kl : scaled.kr, v + i * block, s.rows(i), width);
      }
    }
  }

  void run(const Shape& s, const View* in, const float* all_u, const View& out, int64_t b, int64_t h) {
    const int64_t block = BLOCK * s.width();
    load(in[0], s, b, h, 0.0f, r), load(in[1], s, b, h, 0.0f, k), load(in[2], s, b, h, 0.0f, v);
    load_decay(in[3], s, b, h, w, nullptr);
    std::fill(std::copy_n(all_u + h * s.n, s.n, u), u + s.width(), 0.0f);
    for (int64_t i = 0; i < s.blocks(); i++) {
      inner_weights(s.vectors(), r + i * block, k + i * block, w + i * block, u, s.rows(i), weights);
      product(y + i * block, s.width(), s.rows(i), s.vectors(), weights, BLOCK, 1, v + i * block, s.width(), s.rows(i),
              false);
    }
    s.pairwise() ? pairs(s) : states(s);
    store(y, s, b, h, out);
  }
};

}  // namespace
