// Verification of drafted trees by sampling, where the token is the most likely one or the inverse CDF of a draw.
//
// Owns the tree walk of engine/verify.py (whose torch path is the reference) for requests whose tokens depend only on
// logits and a draw. Reads only nodes on the accepted path. Sampling is row independent like all kernels: the sums over
// a distribution have a fixed order, by blocks of kBlock entries, for any number of threads and any CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu.h"
#include "pool.h"
#include "rowwise.h"
#include "vector_math.h"

namespace {

constexpr int64_t kBlock = 256;  // entries per partial sum or maximum
constexpr int kSide = 8;         // partial sums within a block

struct Judging {
    const float* logits;                // (rows, nodes, vocab)
    const int64_t *tokens, *parents;    // (rows, nodes)
    const uint8_t *live, *placeholder;  // (rows, nodes); placeholder may be null
    const float* temperatures;          // (rows); 0 takes the most likely token
    const double* draws;                // (rows, width): one per depth, for the token after a node at it
    int64_t* out;                       // (rows, 1 + 3 * width): count, path, tokens, preferred; see core.Verdict
    int64_t rows, nodes, vocab, width;
};

// exp of x <= 0 as 2^n * e^r, |r| <= ln2 / 2, by a polynomial; relative error a few 1e-16; 0 below -708. Without fused
// multiply-adds, so that all code paths give the same bits.
double exp_of(double x) {
    const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
    const double moved = x * 1.4426950408889634 + shift;
    const double n = moved - shift;
    const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = kExp[0];
    for (int i = 1; i < 14; ++i) p = p * r + kExp[i];
    uint64_t bits;
    std::memcpy(&bits, &moved, sizeof bits);
    bits = (bits + 1023) << 52;  // shifts the constant's own bits out
    double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -708.0 ? 0.0 : p * scale;
}

struct Scores {
    const float* x;  // (count)
    int64_t count;
    float temperature;  // 1 does not change them
    double top;         // the largest of x / temperature
    double* sums;       // per block: sum of exp(x / temperature - top)
    float* maxima;      // per block; NaN if the block has a NaN
};

float maximum_scalar(const float* x, int64_t count) {
    float best = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        if (std::isnan(x[i])) return NAN;
        best = x[i] > best ? x[i] : best;
    }
    return best;
}

void weights_scalar(const Scores& a, int64_t first, int64_t count, double* weights) {
    for (int64_t i = 0; i < count; ++i)
        weights[i] = exp_of(static_cast<double>(a.x[first + i] / a.temperature) - a.top);
}

#if defined(HAAST_X86)
AVX float maximum_avx(const float* x, int64_t count) {
    __m256 best = _mm256_set1_ps(-INFINITY), strange = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        best = _mm256_max_ps(v, best);
        strange = _mm256_or_ps(strange, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    if (_mm256_movemask_ps(strange)) return NAN;
    const float top = max8(best), rest = maximum_scalar(x + i, count - i);
    return rest <= top ? top : rest;
}

AVX void weights_avx(const Scores& a, int64_t first, int64_t count, double* weights) {
    const __m128 temperature = _mm_set1_ps(a.temperature);
    const __m256d top = _mm256_set1_pd(a.top);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const __m256d scores = _mm256_cvtps_pd(_mm_div_ps(_mm_loadu_ps(a.x + first + i), temperature));
        _mm256_storeu_pd(weights + i, exp4(_mm256_sub_pd(scores, top)));
    }
    weights_scalar(a, first + i, count - i, weights + i);
}
#endif

void block_weights(const Scores& a, int64_t block, double* weights) {
    const int64_t first = block * kBlock, count = a.count - first < kBlock ? a.count - first : kBlock;
    PICK(weights)(a, first, count, weights);
    for (int64_t i = count; i < kBlock; ++i) weights[i] = 0.0;
}

// Item = block.
void find_maxima(const void* job, int64_t first, int64_t last) {
    const Scores& a = *static_cast<const Scores*>(job);
    for (int64_t b = first; b < last; ++b) {
        const int64_t at = b * kBlock;
        a.maxima[b] = PICK(maximum)(a.x + at, a.count - at < kBlock ? a.count - at : kBlock);
    }
}

void find_sums(const void* job, int64_t first, int64_t last) {
    const Scores& a = *static_cast<const Scores*>(job);
    double weights[kBlock];
    for (int64_t b = first; b < last; ++b) {
        double lanes[kSide] = {0};
        block_weights(a, b, weights);
        for (int64_t i = 0; i < kBlock; i += kSide)
            for (int l = 0; l < kSide; ++l) lanes[l] += weights[i + l];
        a.sums[b] = 0.0;
        for (double lane : lanes) a.sums[b] += lane;
    }
}

class Chooser {
  public:
    Chooser(int64_t vocab, int threads)
        : vocab_(vocab),
          blocks_((vocab + kBlock - 1) / kBlock),
          threads_(vocab < kSerialWork ? 1 : threads),
          sums_(new double[blocks_]),
          maxima_(new float[blocks_]) {}

    // At temperature 0 the first of the largest logits, where NaN counts as largest. Above 0 the entry that `draw` in
    // [0, 1) selects, or -1 if no entry is possible.
    int64_t choose(const float* x, float temperature, double draw) {
        Scores a{x, vocab_, temperature, 0.0, sums_.get(), maxima_.get()};
        run(find_maxima, a, 1);  // waking a second thread takes longer than reading it alone
        int64_t top = 0;
        for (int64_t b = 1; b < blocks_ && !std::isnan(maxima_[top]); ++b)
            if (!(maxima_[b] <= maxima_[top])) top = b;
        if (temperature == 0.0f) return likeliest(x, top);
        a.top = static_cast<double>(maxima_[top] / temperature);
        run(find_sums, a, threads_);
        return drawn(a, draw);
    }

  private:
    void run(Pool::Work work, const Scores& a, int threads) {
        pool().run(work, &a, blocks_, chunk_of(blocks_, threads), threads);
    }

    int64_t likeliest(const float* x, int64_t block) const {
        const float top = maxima_[block];
        int64_t i = block * kBlock;
        while (std::isnan(top) ? !std::isnan(x[i]) : x[i] != top) ++i;
        return i;
    }

    // The first entry whose cumulative weight exceeds the point. If rounding puts the point at the end of the range,
    // the last entry with a weight above 0.
    int64_t drawn(const Scores& a, double draw) const {
        double total = 0.0, before = 0.0, weights[kBlock];
        for (int64_t b = 0; b < blocks_; ++b) total += sums_[b];
        if (std::isnan(total)) return -1;
        const double point = draw * total;
        int64_t block = 0, found = -1;
        while (block < blocks_ && !(before + sums_[block] > point)) before += sums_[block++];
        if (block == blocks_) while (!(sums_[--block] > 0.0)) {}
        block_weights(a, block, weights);
        for (int64_t i = 0; i < kBlock && !(before > point && found >= 0); ++i) {
            before += weights[i];
            if (weights[i] > 0.0) found = block * kBlock + i;
        }
        return found;
    }

    int64_t vocab_, blocks_;
    int threads_;
    std::unique_ptr<double[]> sums_;
    std::unique_ptr<float[]> maxima_;
};

// Walks one row's tree: samples the token at a node, goes to the first child with this token, and so on.
void judge_row(const Judging& a, int64_t row, int threads) {
    Chooser chooser(a.vocab, threads);
    const int64_t *tokens = a.tokens + row * a.nodes, *parents = a.parents + row * a.nodes;
    const uint8_t* live = a.live + row * a.nodes;
    const uint8_t* barred = a.placeholder ? a.placeholder + row * a.nodes : nullptr;
    int64_t* out = a.out + row * (1 + 3 * a.width);
    int64_t *path = out + 1, *chosen = path + a.width, *preferred = chosen + a.width;
    int64_t node = 0, depth = 0;
    for (int64_t next = 0; next >= 0 && depth < a.width; ++depth, node = next) {
        const int64_t at = row * a.nodes + node;
        const double draw = a.draws[row * a.width + depth];
        const int64_t choice = chooser.choose(a.logits + at * a.vocab, a.temperatures[row], draw);
        int64_t first = -1;
        next = -1;
        for (int64_t j = node + 1; j < a.nodes && next < 0; ++j) {
            if (parents[j] != node || !live[j] || (barred && barred[j])) continue;
            if (first < 0) first = j;
            if (tokens[j] == choice) next = j;
        }
        path[depth] = node, chosen[depth] = choice;
        preferred[depth] = first < 0 ? -1 : tokens[first] == choice;
    }
    out[0] = depth;
    for (; depth < a.width; ++depth) path[depth] = 0, chosen[depth] = 0, preferred[depth] = -1;
}

void judge_rows(const void* job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) judge_row(*static_cast<const Judging*>(job), row, 1);
}

void judge(const Judging& a, int threads) {
    if (a.rows == 1) return judge_row(a, 0, threads);
    pool().run(judge_rows, &a, a.rows, 1, threads);
}

}  // namespace
