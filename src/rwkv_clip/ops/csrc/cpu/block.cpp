// Pointwise parts of an RWKV block on a CPU: token shift with mixing, group norm with gate, squared ReLU, sigmoid gate.
//
// Plain functions on raw pointers, one pass over memory each, sums and products in float32, values in float32 or bfloat16,
// weights and their gradients in float32. Loops are written for the compiler's vectoriser; threads split tokens, and every
// sum over tokens is taken per thread in a fixed order, so results are the same bits for the same number of threads.

#include <vector>

#include "numbers.h"

namespace {

inline float sigmoid(float x) {
    float y = -x;
    y = y < -87.0f ? -87.0f : (y > 88.0f ? 88.0f : y);
    const auto e = split_exponential<int32_t>(y);
    return 1.0f / (1.0f + (e.series * e.rest * e.rest + e.rest + 1.0f) * e.power);
}

// Shapes of the mixing kernels, and where the parts of a token's heads come from: a grid of height x width tokens (a text
// line has height 1), `count` of them, out of `tokens` per sample; the rest is not shifted.
struct Shift {
    long mixtures, batch, tokens, width, count, channels, heads, parts;

    // The token that part `part` of token `t` looks at (`sign` = 1), or that looks at it (`sign` = -1); -1: none.
    long neighbour(long t, long part, long sign) const {
        if (t >= count) return t;
        if (part < 2) {
            long column = t % width + (part == 0 ? -sign : sign);
            return column < 0 || column >= width ? -1 : t - t % width + column;
        }
        long other = t + (part == 2 ? -sign : sign) * width;
        return other < 0 || other >= count ? -1 : other;
    }

    // out[c] = rows[neighbour of t for c's part][c], zero where there is none. rows: one sample.
    template <class T>
    void gather(const T* rows, long t, long sign, T* out) const {
        long size = channels / heads / parts;
        for (long part = 0; part < parts; part++) {
            long from = neighbour(t, part, sign);
            for (long head = 0; head < heads; head++) {
                long start = (head * parts + part) * size;
                if (from < 0)
                    std::memset(out + start, 0, size * sizeof(T));
                else
                    std::memcpy(out + start, rows + from * channels + start, size * sizeof(T));
            }
        }
    }
};

// outs[j] = x + (shifted x - x) * (coefficients[j] + offsets[j])
template <class T>
void mix(const T* x, const float* coefficients, const T* offsets, T** outs, const Shift* shift, long threads) {
    const Shift s = *shift;
    const long c = s.channels, rows = s.batch * s.tokens, count = s.mixtures;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> next(c);
        std::vector<float> buffer(2 * c);
        float *own = buffer.data(), *step = own + c;
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const T* here = x + row * c;
            s.gather(x + (row - row % s.tokens) * c, row % s.tokens, 1, next.data());
#pragma omp simd
            for (long i = 0; i < c; i++) {
                own[i] = load(here[i]);
                step[i] = load(next[i]) - own[i];
            }
            for (long j = 0; j < count; j++) {
                const float* coefficient = coefficients + j * c;
                const T* offset = offsets + (j * rows + row) * c;
                T* out = outs[j] + row * c;
                if (offsets)
#pragma omp simd
                    for (long i = 0; i < c; i++) store(out[i], own[i] + step[i] * (coefficient[i] + load(offset[i])));
                else
#pragma omp simd
                    for (long i = 0; i < c; i++) store(out[i], own[i] + step[i] * coefficient[i]);
            }
        }
    }
}

// gx, gcoefficients (mixtures, C) float32 and, with offsets, goffsets. scratch: 2 * batch * tokens * C floats.
template <class T>
void mix_backward(const T** grads, const T* x, const float* coefficients, const T* offsets, T* gx,
                  float* gcoefficients, T* goffsets, float* scratch, const Shift* shift, long threads) {
    const Shift s = *shift;
    const long c = s.channels, rows = s.batch * s.tokens, count = s.mixtures;
    float *towards = scratch, *kept = scratch + rows * c;  // what goes to the neighbour and what stays
    std::vector<float> partial(threads * count * c);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> next(c);
        std::vector<float> step(c), moved(c);
#pragma omp for schedule(static)
        for (long part = 0; part < threads; part++) {
            float* sums = partial.data() + part * count * c;
            for (long row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
                const T* here = x + row * c;
                float *to = towards + row * c, *stay = kept + row * c;
                s.gather(x + (row - row % s.tokens) * c, row % s.tokens, 1, next.data());
#pragma omp simd
                for (long i = 0; i < c; i++) {
                    step[i] = load(next[i]) - load(here[i]);
                    to[i] = stay[i] = 0;
                }
                for (long j = 0; j < count; j++) {
                    const T* grad = grads[j] + row * c;
                    const float* coefficient = coefficients + j * c;
                    float* sum = sums + j * c;
                    if (offsets) {
                        const T* offset = offsets + (j * rows + row) * c;
                        T* goffset = goffsets + (j * rows + row) * c;
#pragma omp simd
                        for (long i = 0; i < c; i++) {
                            float g = load(grad[i]), part_moved = g * (coefficient[i] + load(offset[i]));
                            to[i] += part_moved;
                            stay[i] += g - part_moved;
                            sum[i] += g * step[i];
                            store(goffset[i], g * step[i]);
                        }
                    } else {
#pragma omp simd
                        for (long i = 0; i < c; i++) {
                            float g = load(grad[i]);
                            to[i] += g * coefficient[i];
                            stay[i] += g - g * coefficient[i];
                            sum[i] += g * step[i];
                        }
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            s.gather(towards + (row - row % s.tokens) * c, row % s.tokens, -1, moved.data());
#pragma omp simd
            for (long i = 0; i < c; i++) store(gx[row * c + i], kept[row * c + i] + moved[i]);
        }
    }
    std::memset(gcoefficients, 0, count * c * sizeof(float));
    for (long part = 0; part < threads; part++)
        for (long i = 0; i < count * c; i++) gcoefficients[i] += partial[part * count * c + i];
}

// Mean and 1 / standard deviation of n values; x is also left as floats in `values`.
template <class T>
inline void moments(const T* x, long n, float eps, float* values, float& mean, float& scale) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) {
        values[i] = load(x[i]);
        sum += values[i];
    }
    mean = sum / n;
#pragma omp simd reduction(+ : square)
    for (long i = 0; i < n; i++) square += (values[i] - mean) * (values[i] - mean);
    scale = 1.0f / __builtin_sqrtf(square / n + eps);
}

// out = (group norm of y over every head) * silu(gate)
template <class T>
void norm_gate(const T* y, const T* gate, const float* weight, const float* bias, T* out, long rows, long heads, long n,
               float eps, long threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> values(n);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            for (long head = 0; head < heads; head++) {
                long start = (row * heads + head) * n;
                const float *w = weight + head * n, *b = bias + head * n;
                const T* g = gate + start;
                T* o = out + start;
                float mean, scale;
                moments(y + start, n, eps, values.data(), mean, scale);
#pragma omp simd
                for (long i = 0; i < n; i++) {
                    float z = load(g[i]);
                    store(o[i], ((values[i] - mean) * scale * w[i] + b[i]) * z * sigmoid(z));
                }
            }
    }
}

template <class T>
void norm_gate_backward(const T* grad, const T* y, const T* gate, const float* weight, const float* bias, T* gy, T* ggate,
                        float* gweight, float* gbias, long rows, long heads, long n, float eps, long threads) {
    const long c = heads * n;
    std::vector<float> partial(threads * 2 * c);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < threads; part++) {
        float* sums = partial.data() + part * 2 * c;
        std::vector<float> values(n), inner(n);
        for (long row = rows * part / threads; row < rows * (part + 1) / threads; row++)
            for (long head = 0; head < heads; head++) {
                long start = row * c + head * n;
                const float *w = weight + head * n, *b = bias + head * n;
                float *gw = sums + head * n, *gb = sums + c + head * n;
                float mean, scale, first = 0, second = 0;
                moments(y + start, n, eps, values.data(), mean, scale);
#pragma omp simd reduction(+ : first, second)
                for (long i = 0; i < n; i++) {
                    float hat = (values[i] - mean) * scale, z = load(gate[start + i]), s = sigmoid(z);
                    float g = load(grad[start + i]), gnorm = g * z * s;
                    store(ggate[start + i], g * (hat * w[i] + b[i]) * s * (1 + z * (1 - s)));
                    gw[i] += gnorm * hat;
                    gb[i] += gnorm;
                    values[i] = hat;
                    inner[i] = gnorm * w[i];
                    first += inner[i];
                    second += inner[i] * hat;
                }
                first /= n, second /= n;
#pragma omp simd
                for (long i = 0; i < n; i++) store(gy[start + i], scale * (inner[i] - first - values[i] * second));
            }
    }
    std::memset(gweight, 0, c * sizeof(float));
    std::memset(gbias, 0, c * sizeof(float));
    for (long part = 0; part < threads; part++)
        for (long i = 0; i < c; i++) {
            gweight[i] += partial[part * 2 * c + i];
            gbias[i] += partial[part * 2 * c + c + i];
        }
}

template <class T>
void relu_square(const T* x, T* out, long size, long threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) {
        float value = load(x[i]);
        value = value < 0 ? 0 : value;  // a NaN stays one
        store(out[i], value * value);
    }
}

template <class T>
void relu_square_backward(const T* grad, const T* x, T* gx, long size, long threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) {
        float value = load(x[i]);
        store(gx[i], 2 * (value < 0 ? 0 : value) * load(grad[i]));
    }
}

template <class T>
void sigmoid_gate(const T* gate, const T* x, T* out, long size, long threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) store(out[i], sigmoid(load(gate[i])) * load(x[i]));
}

template <class T>
void sigmoid_gate_backward(const T* grad, const T* gate, const T* x, T* ggate, T* gx, long size, long threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) {
        float s = sigmoid(load(gate[i])), g = load(grad[i]);
        store(gx[i], g * s);
        store(ggate[i], g * load(x[i]) * s * (1 - s));
    }
}

}  // namespace

// The address of a kernel for float32 or bfloat16 values, by the kernel's name.
#define EXPORT(NAME) \
    extern "C" void* find_##NAME(long narrow) { \
        return narrow ? reinterpret_cast<void*>(NAME<bf16>) : reinterpret_cast<void*>(NAME<float>); \
    }

EXPORT(mix)
EXPORT(mix_backward)
EXPORT(norm_gate)
EXPORT(norm_gate_backward)
EXPORT(relu_square)
EXPORT(relu_square_backward)
EXPORT(sigmoid_gate)
EXPORT(sigmoid_gate_backward)
