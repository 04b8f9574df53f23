// Skinny matrix products, tree attention and two row-wise helpers for the CPU.
//
// Owns: arithmetic on plain float arrays behind an extern "C" ABI. Knows nothing of torch or Python.
// Every function is *row independent*: a row's (node's) result has the same bits whatever stands beside it and
// whatever the thread count. So each output is one chain of sums in an order that only its own inputs decide:
//   linear     y[r][o] = fma over k = 0, 1, 2, ... into one accumulator, then + bias
//   attention  scores per slot; sums over the compacted list of unmasked slots, in slot order
// Threads share out whole outputs, never parts of a sum. Strides count floats, not bytes.
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define HAAST_X86 1
#include <immintrin.h>
// Runtime dispatch: only these functions may use AVX2, so the file is built without -march and runs anywhere.
#define AVX static __attribute__((target("avx2,fma,f16c")))
#define AVX_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))
#define AVX512 static __attribute__((target("avx512f,avx2,fma,f16c")))
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kLanes = 16;            // outputs in a panel: two AVX2 registers
constexpr int64_t kMaxGroup = 64;         // query heads per KV head that the fast attention takes
constexpr int64_t kMaxRows = 6;           // 6 rows x 2 registers = 12 accumulators, 2 weights, 1 broadcast: 15 of 16
constexpr int64_t kSerialWork = 1 << 15;  // multiply-adds below which a second thread costs more than it brings
constexpr int64_t kAhead = 1024;          // bytes that the weights are prefetched ahead
constexpr float kMasked = -1e30f;         // mask values up to here (finfo.min and -inf too) hide a slot

enum Path { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

Path widest = kAvx512;  // lowered for tests only: a narrower path on a CPU that has a wider one

int cpu_features() {
#if defined(HAAST_X86)
    __builtin_cpu_init();
    return (__builtin_cpu_supports("avx2") ? 1 : 0) | (__builtin_cpu_supports("fma") ? 2 : 0) |
           (__builtin_cpu_supports("f16c") ? 4 : 0) | (__builtin_cpu_supports("avx512f") ? 8 : 0);
#else
    return 0;
#endif
}

Path path() {
    static const int features = cpu_features();
    static const Path found = (features & 7) != 7 ? kScalar : features & 8 ? kAvx512 : kAvx2;
    return found < widest ? found : widest;
}

bool use_avx() { return path() >= kAvx2; }

void pause() {
#if defined(HAAST_X86)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// ---------------------------------------------------------------- threads

// A job is cut into chunks that the caller and the helpers claim one by one. Unlike an OpenMP team there is no barrier at
// the start: a helper that the machine has no core for (torch's own idle threads spin, other programs run) claims nothing
// and nobody waits for it; the same makes a forked child, which has no helpers, merely slower. Helpers spin for about
// 0.1 ms, the gap between two layers of an eager model, and then sleep.
class Pool {
  public:
    using Work = void (*)(const void* job, int64_t first, int64_t last);

    // Runs work(job, first, last) over [0, items) in pieces of `chunk`.
    void run(Work work, const void* job, int64_t items, int64_t chunk, int threads) {
        const int64_t chunks = (items + chunk - 1) / chunk;
        std::unique_lock<std::mutex> busy(caller_, std::try_to_lock);
        // A second caller (another Python thread) does its job alone instead of queueing for the helpers.
        if (threads <= 1 || chunks <= 1 || chunks >= kClosed || !busy.owns_lock()) return work(job, 0, items);
        hire(threads - 1);
        // Closed while the fields change: a helper that still holds an old ticket cannot claim with half-written fields.
        const uint64_t generation = (ticket_.load() >> 32) + 1;
        ticket_.store(generation << 32 | kClosed);
        work_.store(work), job_.store(job), items_.store(items), chunk_.store(chunk), chunks_.store(chunks);
        helpers_.store(threads - 1), done_.store(0);
        ticket_.store((generation + 1) << 32);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        while (claim()) {}
        for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins)
            if (spins < 4096) pause();
            else std::this_thread::yield();  // a helper lost its core in the middle of a chunk
    }

  private:
    static constexpr int64_t kClosed = 0xffffffff;
    static constexpr int kSpins = 8192;

    // The ticket is (generation, next chunk). A successful exchange proves that the fields read before it belong to this
    // generation: they change only while the ticket is closed, and only after every claimed chunk is done.
    bool claim() {
        uint64_t ticket = ticket_.load();
        for (;;) {
            const int64_t next = static_cast<int64_t>(ticket & 0xffffffff);
            const Work work = work_.load();
            const void* job = job_.load();
            const int64_t items = items_.load(), chunk = chunk_.load();
            if (next >= chunks_.load()) return false;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
            const int64_t first = next * chunk;
            work(job, first, first + chunk < items ? first + chunk : items);
            done_.fetch_add(1, std::memory_order_release);
            return true;
        }
    }

    void hire(int wanted) {
        try {
            for (; hired_ < wanted; ++hired_) std::thread(&Pool::help, this, hired_).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
        }
    }

    void help(int number) {
        for (uint64_t seen = ticket_.load();;) {
            for (int spins = 0; ticket_.load() >> 32 == seen >> 32 && spins < kSpins; ++spins) pause();
            if (ticket_.load() >> 32 == seen >> 32) {
                std::unique_lock<std::mutex> lock(sleep_);
                ++sleepers_;
                wake_.wait(lock, [&] { return ticket_.load() >> 32 != seen >> 32; });
                --sleepers_;
            }
            seen = ticket_.load();
            if (number < helpers_.load())
                while (claim()) {}
        }
    }

    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> ticket_{kClosed};
    std::atomic<Work> work_{nullptr};
    std::atomic<const void*> job_{nullptr};
    std::atomic<int64_t> items_{0}, chunk_{1}, chunks_{0}, done_{0};
    std::atomic<int> helpers_{0}, sleepers_{0};
    int hired_ = 0;
};

Pool& pool() {
    static Pool* const one = new Pool;  // never destroyed: helpers may outlive the library's static objects
    return *one;
}

// Pieces small enough that the last one keeps nobody waiting, and even, for the kernels that take panels in twos.
int64_t chunk_of(int64_t items, int threads) {
    const int64_t chunk = items / (16 * static_cast<int64_t>(threads < 1 ? 1 : threads)) / 2 * 2;
    return chunk < 2 ? 2 : chunk;
}

// ---------------------------------------------------------------- half precision in portable code

float half_to_float(uint16_t h) {
    // Exponents are re-biased by a multiplication, which gets subnormals right as well. Packed weights are finite.
    uint32_t bits = static_cast<uint32_t>(h & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and up rounds to infinity
    if (bits < 0x38800000u) {                        // below 2^-14: subnormal, the addition of 0.5 does the rounding
        float f;
        std::memcpy(&f, &bits, 4);
        f += 0.5f;
        std::memcpy(&bits, &f, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);  // round to nearest, ties to even
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// ---------------------------------------------------------------- linear: portable path

struct Linear {
    const float* x;
    const uint16_t* packed;
    const float* bias;  // may be null
    float* y;
    int64_t rows, in, out, x_stride, y_stride;
};

void linear_scalar(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    std::unique_ptr<float[]> panel(new float[a.in * kLanes]);
    for (int64_t p = first; p < last; ++p) {
        const uint16_t* w = a.packed + p * a.in * kLanes;
        for (int64_t i = 0; i < a.in * kLanes; ++i) panel[i] = half_to_float(w[i]);
        const int64_t valid = a.out - p * kLanes < kLanes ? a.out - p * kLanes : kLanes;
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* x = a.x + r * a.x_stride;
            float acc[kLanes] = {};
            for (int64_t k = 0; k < a.in; ++k)
                for (int64_t l = 0; l < kLanes; ++l) acc[l] += x[k] * panel[k * kLanes + l];
            float* y = a.y + r * a.y_stride + p * kLanes;
            for (int64_t l = 0; l < valid; ++l) y[l] = acc[l] + (a.bias ? a.bias[p * kLanes + l] : 0.0f);
        }
    }
}

// ---------------------------------------------------------------- linear: AVX2 path
#if defined(HAAST_X86)

AVX_INLINE __m256 load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

AVX_INLINE void store_panel(__m256 lo, __m256 hi, float* y, const float* bias, int64_t valid) {
    if (valid >= kLanes) {
        if (bias) {
            lo = _mm256_add_ps(lo, _mm256_loadu_ps(bias));
            hi = _mm256_add_ps(hi, _mm256_loadu_ps(bias + 8));
        }
        _mm256_storeu_ps(y, lo);
        _mm256_storeu_ps(y + 8, hi);
        return;
    }
    float t[kLanes];
    _mm256_storeu_ps(t, lo);
    _mm256_storeu_ps(t + 8, hi);
    for (int64_t l = 0; l < valid; ++l) y[l] = bias ? t[l] + bias[l] : t[l];
}

// R rows by P panels. R and P are compile-time, so that every accumulator lives in a register; one that spills costs
// a factor of 2 to 3. Several panels for few rows: a chain of FMAs has a latency of 4, so 8 chains must be in flight.
template <int R, int P>
AVX void tile(const float* x, int64_t x_stride, const uint16_t* w, int64_t in, float* y, int64_t y_stride,
              const float* bias, int64_t valid) {
    __m256 acc[R][P][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[r][p][0] = acc[r][p][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < in; ++k) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const uint16_t* wk = w + (p * in + k) * kLanes;
            _mm_prefetch(reinterpret_cast<const char*>(wk) + kAhead, _MM_HINT_T0);
            const __m256 lo = load_half(wk), hi = load_half(wk + 8);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256 xv = _mm256_broadcast_ss(x + r * x_stride + k);
                acc[r][p][0] = _mm256_fmadd_ps(xv, lo, acc[r][p][0]);
                acc[r][p][1] = _mm256_fmadd_ps(xv, hi, acc[r][p][1]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
            store_panel(acc[r][p][0], acc[r][p][1], y + r * y_stride + p * kLanes, bias ? bias + p * kLanes : nullptr,
                        valid - p * kLanes);
}

template <int P>
AVX void rows_by_panels(int64_t rows, const float* x, int64_t xs, const uint16_t* w, int64_t in, float* y,
                        int64_t ys, const float* bias, int64_t valid) {
    switch (rows) {
        case 1: return tile<1, P>(x, xs, w, in, y, ys, bias, valid);
        case 2: return tile<2, P>(x, xs, w, in, y, ys, bias, valid);
        case 3: return tile<3, P>(x, xs, w, in, y, ys, bias, valid);
        default: break;
    }
    for (int p = 0; p < P; ++p) {  // 8 or more chains already: one panel at a time keeps within 16 registers
        const uint16_t* wp = w + p * in * kLanes;
        const float* bp = bias ? bias + p * kLanes : nullptr;
        const int64_t vp = valid - p * kLanes;
        if (rows == 4) tile<4, 1>(x, xs, wp, in, y + p * kLanes, ys, bp, vp);
        else if (rows == 5) tile<5, 1>(x, xs, wp, in, y + p * kLanes, ys, bp, vp);
        else tile<6, 1>(x, xs, wp, in, y + p * kLanes, ys, bp, vp);
    }
}

// Row blocks of even size (8 rows are 4 + 4, not 6 + 2): a block of 2 could not fill the FMA pipes.
template <int P>
AVX void all_rows(const Linear& a, const uint16_t* w, int64_t panel) {
    const int64_t blocks = (a.rows + kMaxRows - 1) / kMaxRows, base = a.rows / blocks, longer = a.rows % blocks;
    const float* bias = a.bias ? a.bias + panel * kLanes : nullptr;
    for (int64_t b = 0, r = 0; b < blocks; ++b) {
        const int64_t rows = base + (b < longer ? 1 : 0);
        rows_by_panels<P>(rows, a.x + r * a.x_stride, a.x_stride, w, a.in, a.y + r * a.y_stride + panel * kLanes,
                             a.y_stride, bias, a.out - panel * kLanes);
        r += rows;
    }
}

AVX void linear_avx(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    const int64_t step = a.in * kLanes;
    int64_t p = first;
    if (a.rows == 1)
        for (; p + 4 <= last; p += 4) all_rows<4>(a, a.packed + p * step, p);
    for (; p + 2 <= last; p += 2) all_rows<2>(a, a.packed + p * step, p);
    for (; p < last; ++p) all_rows<1>(a, a.packed + p * step, p);
}

// ---------------------------------------------------------------- linear: AVX-512 path

// A panel is one register, and there are 32 of them. Each output is the same chain of FMAs as on AVX2: the same bits.
template <int R, int P>
AVX512 void tile512(const float* x, int64_t x_stride, const uint16_t* w, int64_t in, float* y, int64_t y_stride,
                    const float* bias, int64_t valid) {
    __m512 acc[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < in; ++k) {
        __m512 wv[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const uint16_t* wk = w + (p * in + k) * kLanes;
            _mm_prefetch(reinterpret_cast<const char*>(wk) + kAhead, _MM_HINT_T0);
            // The masked form with every lane on is the plain instruction; gcc 12 warns of the plain intrinsic.
            wv[p] = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(wk)));
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512 xv = _mm512_set1_ps(x[r * x_stride + k]);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) acc[r][p] = _mm512_fmadd_ps(xv, wv[p], acc[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        const int64_t left = valid - p * kLanes;
        const __mmask16 lanes = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        const __m512 b = bias ? _mm512_maskz_loadu_ps(lanes, bias + p * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            _mm512_mask_storeu_ps(y + r * y_stride + p * kLanes, lanes, bias ? _mm512_add_ps(acc[r][p], b) : acc[r][p]);
    }
}

constexpr int64_t kMaxRows512 = 12;  // 12 rows x 2 panels = 24 accumulators, 2 weights, 1 broadcast: 27 of 32

template <int P>
AVX512 void rows_by_panels512(int64_t rows, const float* x, int64_t xs, const uint16_t* w, int64_t in, float* y,
                              int64_t ys, const float* bias, int64_t valid) {
    switch (rows) {
        case 1: return tile512<1, P>(x, xs, w, in, y, ys, bias, valid);
        case 2: return tile512<2, P>(x, xs, w, in, y, ys, bias, valid);
        case 3: return tile512<3, P>(x, xs, w, in, y, ys, bias, valid);
        case 4: return tile512<4, P>(x, xs, w, in, y, ys, bias, valid);
        case 5: return tile512<5, P>(x, xs, w, in, y, ys, bias, valid);
        case 6: return tile512<6, P>(x, xs, w, in, y, ys, bias, valid);
        case 7: return tile512<7, P>(x, xs, w, in, y, ys, bias, valid);
        case 8: return tile512<8, P>(x, xs, w, in, y, ys, bias, valid);
        case 9: return tile512<9, P>(x, xs, w, in, y, ys, bias, valid);
        case 10: return tile512<10, P>(x, xs, w, in, y, ys, bias, valid);
        case 11: return tile512<11, P>(x, xs, w, in, y, ys, bias, valid);
        default: return tile512<12, P>(x, xs, w, in, y, ys, bias, valid);
    }
}

template <int P>
AVX512 void all_rows512(const Linear& a, const uint16_t* w, int64_t panel) {
    const int64_t blocks = (a.rows + kMaxRows512 - 1) / kMaxRows512, base = a.rows / blocks, longer = a.rows % blocks;
    const float* bias = a.bias ? a.bias + panel * kLanes : nullptr;
    for (int64_t b = 0, r = 0; b < blocks; ++b) {
        const int64_t rows = base + (b < longer ? 1 : 0);
        float* y = a.y + r * a.y_stride + panel * kLanes;
        rows_by_panels512<P>(rows, a.x + r * a.x_stride, a.x_stride, w, a.in, y, a.y_stride, bias,
                             a.out - panel * kLanes);
        r += rows;
    }
}

AVX512 void linear_avx512(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    const int64_t step = a.in * kLanes;
    int64_t p = first;
    if (a.rows == 1)
        for (; p + 8 <= last; p += 8)
            tile512<1, 8>(a.x, a.x_stride, a.packed + p * step, a.in, a.y + p * kLanes, a.y_stride,
                          a.bias ? a.bias + p * kLanes : nullptr, a.out - p * kLanes);
    for (; p + 2 <= last; p += 2) all_rows512<2>(a, a.packed + p * step, p);
    for (; p < last; ++p) all_rows512<1>(a, a.packed + p * step, p);
}

AVX void pack_avx(const float* w, uint16_t* panel, int64_t valid, int64_t in) {
    for (int64_t l = 0; l < valid; ++l)
        for (int64_t k = 0; k < in; ++k) panel[k * kLanes + l] = _cvtss_sh(w[l * in + k], _MM_FROUND_TO_NEAREST_INT);
}

// ---------------------------------------------------------------- vector exp and tanh

// exp by 2^n * e^r with |r| <= ln2 / 2 and a degree-6 polynomial (Cephes expf): about 1 ulp. Inputs below -87.3 give 0.
AVX_INLINE __m256 exp8(__m256 x) {
    const __m256 low = _mm256_set1_ps(-87.33654f);
    const __m256 keep = _mm256_cmp_ps(x, low, _CMP_NLT_UQ);  // NaN stays NaN
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(low, x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(scale)));
}

// tanh (Cephes tanhf): an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
AVX_INLINE __m256 tanh8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), z = _mm256_mul_ps(x, x);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    __m256 p = _mm256_set1_ps(-5.70498872745e-3f);
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(2.06390887954e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-5.37397155531e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(1.33314422036e-1f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-3.33332819422e-1f));
    const __m256 near = _mm256_fmadd_ps(_mm256_mul_ps(p, z), x, x);
    const __m256 e = exp8(_mm256_add_ps(size, size));
    __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
    far = _mm256_or_ps(far, _mm256_and_ps(_mm256_set1_ps(-0.0f), x));
    return _mm256_blendv_ps(near, far, _mm256_cmp_ps(size, _mm256_set1_ps(0.625f), _CMP_GT_OQ));
}

AVX_INLINE float sum8(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

AVX_INLINE float max8(__m256 v) {
    float t[8], best;
    _mm256_storeu_ps(t, v);
    best = t[0];
    for (int i = 1; i < 8; ++i) best = t[i] > best ? t[i] : best;
    return best;
}
#endif  // HAAST_X86

// ---------------------------------------------------------------- tree attention

struct Attention {
    const float *q, *k, *v, *mask;  // mask may be null: every slot is seen
    float* out;                     // (rows, n, heads, d), contiguous
    int64_t rows, heads, kv_heads, n, slots, d;
    int64_t q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot, mask_row, mask_node;
    float scaling, softcap;
    int64_t together;  // heads of one piece of work
};

// One query row of one or more heads that read the same KV head.
struct Query {
    int64_t row, node, head, heads;
    const float* mask;  // (slots), or null
    const int32_t* slot;
    int64_t count;  // unmasked slots
    bool biased;    // some unmasked mask value is not 0
};

// Lists the unmasked slots in slot order, then repeats the last one up to a multiple of 8 (safe to load, never summed).
int64_t compact(const float* mask, int64_t slots, int32_t* slot, bool* biased) {
    int64_t count = 0;
    bool any = false;
    for (int64_t s = 0; s < slots; ++s) {
        const bool seen = !mask || mask[s] > kMasked;
        slot[count] = static_cast<int32_t>(s);
        count += seen;
        any |= seen && mask && mask[s] != 0.0f;
    }
    *biased = any;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

void attend_scalar(const Attention& a, const Query& u, float* p) {
    const int64_t kv = u.head / (a.heads / a.kv_heads);
    for (int64_t h = u.head; h < u.head + u.heads; ++h) {
        const float* q = a.q + u.row * a.q_row + h * a.q_head + u.node * a.q_node;
        float* out = a.out + ((u.row * a.n + u.node) * a.heads + h) * a.d;
        float best = -std::numeric_limits<float>::infinity(), total = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const float* k = a.k + u.row * a.k_row + kv * a.k_head + u.slot[i] * a.k_slot;
            float s = 0.0f;
            for (int64_t c = 0; c < a.d; ++c) s += q[c] * k[c];
            s *= a.scaling;
            if (a.softcap > 0.0f) s = a.softcap * std::tanh(s / a.softcap);
            p[i] = u.biased ? s + u.mask[u.slot[i]] : s;
            best = p[i] > best ? p[i] : best;
        }
        for (int64_t c = 0; c < a.d; ++c) out[c] = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const float* v = a.v + u.row * a.v_row + kv * a.v_head + u.slot[i] * a.v_slot;
            const float e = std::exp(p[i] - best);
            total += e;
            for (int64_t c = 0; c < a.d; ++c) out[c] += e * v[c];
        }
        if (u.count)
            for (int64_t c = 0; c < a.d; ++c) out[c] /= total;
    }
}

#if defined(HAAST_X86)
// The same list as compact(), eight mask values at a time.
AVX int64_t compact_avx(const float* mask, int64_t slots, int32_t* slot, bool* biased) {
    if (!mask) return compact(mask, slots, slot, biased);
    int64_t count = 0, s = 0;
    int any = 0;
    const __m256 limit = _mm256_set1_ps(kMasked), zero = _mm256_setzero_ps();
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (; s + 8 <= slots; s += 8) {
        const __m256 m = _mm256_loadu_ps(mask + s);
        const __m256 seen = _mm256_cmp_ps(m, limit, _CMP_GT_OQ);
        int bits = _mm256_movemask_ps(seen);
        any |= _mm256_movemask_ps(_mm256_and_ps(seen, _mm256_cmp_ps(m, zero, _CMP_NEQ_UQ)));
        if (bits == 255) {
            const __m256i all = _mm256_add_epi32(iota, _mm256_set1_epi32(static_cast<int>(s)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(slot + count), all);
            count += 8;
            continue;
        }
        for (; bits; bits &= bits - 1)
            slot[count++] = static_cast<int32_t>(s) + __builtin_ctz(static_cast<unsigned>(bits));
    }
    for (; s < slots; ++s)
        if (mask[s] > kMasked) {
            slot[count++] = static_cast<int32_t>(s);
            any |= mask[s] != 0.0f;
        }
    *biased = any != 0;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

// Scores of H heads against eight slots, in two halves of four: 4 x H accumulators share the loads of K and q. Every dot
// product is reduced by the same tree of additions, so a score depends neither on its place among the eight nor on H.
template <int H>
AVX_INLINE void dots8(const float* q, int64_t q_head, const float* const* k, int64_t d, float* p, int64_t p_stride) {
    for (int half = 0; half < 8; half += 4) {
        const float *k0 = k[half], *k1 = k[half + 1], *k2 = k[half + 2], *k3 = k[half + 3];
        __m256 acc[H][4];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) acc[h][0] = acc[h][1] = acc[h][2] = acc[h][3] = _mm256_setzero_ps();
        for (int64_t c = 0; c < d; c += 8) {
            const __m256 a = _mm256_loadu_ps(k0 + c), b = _mm256_loadu_ps(k1 + c);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m256 qv = _mm256_loadu_ps(q + h * q_head + c);
                acc[h][0] = _mm256_fmadd_ps(qv, a, acc[h][0]);
                acc[h][1] = _mm256_fmadd_ps(qv, b, acc[h][1]);
                acc[h][2] = _mm256_fmadd_ps(qv, _mm256_loadu_ps(k2 + c), acc[h][2]);
                acc[h][3] = _mm256_fmadd_ps(qv, _mm256_loadu_ps(k3 + c), acc[h][3]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[h][0], acc[h][1]), _mm256_hadd_ps(acc[h][2], acc[h][3]));
            _mm_storeu_ps(p + h * p_stride + half, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
    }
}

// Scores of all heads of the query, eight slots at a time: a key row is read once per KV head.
AVX void scores_avx(const Attention& a, const Query& u, float* p, int64_t p_stride) {
    const float* keys = a.k + u.row * a.k_row + u.head / (a.heads / a.kv_heads) * a.k_head;
    const float* q = a.q + u.row * a.q_row + u.head * a.q_head + u.node * a.q_node;
    for (int64_t i = 0; i < u.count; i += 8) {
        const float* k[8];
        for (int j = 0; j < 8; ++j) k[j] = keys + u.slot[i + j] * a.k_slot;
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3) dots8<3>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
        for (; h < u.heads; ++h) dots8<1>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
    }
    const __m256 scaling = _mm256_set1_ps(a.scaling), cap = _mm256_set1_ps(a.softcap);
    for (int64_t h = 0; h < u.heads; ++h)
        for (int64_t i = 0; i < u.count; i += 8) {
            __m256 s = _mm256_mul_ps(_mm256_loadu_ps(p + h * p_stride + i), scaling);
            if (a.softcap > 0.0f) s = _mm256_mul_ps(cap, tanh8(_mm256_div_ps(s, cap)));
            if (u.biased) {
                const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(u.slot + i));
                s = _mm256_add_ps(s, _mm256_i32gather_ps(u.mask, at, 4));
            }
            _mm256_storeu_ps(p + h * p_stride + i, s);
        }
}

// Scores to unnormalised weights in place; returns their sum. The places after `count` become 0 and add nothing.
AVX float softmax_avx(float* p, int64_t count) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const int64_t whole = (count + 7) / 8 * 8;
    for (int64_t i = count; i < whole; ++i) p[i] = lowest;
    __m256 top = _mm256_set1_ps(lowest), total = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(p + i));
    top = _mm256_set1_ps(max8(top));
    for (int64_t i = 0; i < whole; i += 8) {
        const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(p + i), top));
        _mm256_storeu_ps(p + i, e);
        total = _mm256_add_ps(total, e);
    }
    return sum8(total);
}

// C registers of the head dimension of H heads over the slots [from, to), continuing the sums that stand in out. The
// heads share the loads of V; every sum is one chain in slot order whatever C and H are.
template <int H, int C>
AVX void weigh(const Attention& a, const Query& u, const float* values, const float* p, int64_t p_stride, int64_t from,
               int64_t to, float* out) {
    __m256 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[h][c] = _mm256_loadu_ps(out + h * a.d + c * 8);
    for (int64_t i = from; i < to; ++i) {
        const float* v = values + u.slot[i] * a.v_slot;
        __m256 pv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) pv[h] = _mm256_broadcast_ss(p + h * p_stride + i);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const __m256 vv = _mm256_loadu_ps(v + c * 8);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][c] = _mm256_fmadd_ps(pv[h], vv, acc[h][c]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + h * a.d + c * 8, acc[h][c]);
}

template <int H>
AVX void weigh_heads(const Attention& a, const Query& u, const float* values, const float* p, int64_t p_stride, int64_t from,
                     int64_t to, float* out) {
    constexpr int kWide = H == 1 ? 8 : 4;  // 8 or 12 accumulators
    int64_t c = 0;
    for (; c + kWide * 8 <= a.d; c += kWide * 8) weigh<H, kWide>(a, u, values + c, p, p_stride, from, to, out + c);
    for (; c + 16 <= a.d; c += 16) weigh<H, 2>(a, u, values + c, p, p_stride, from, to, out + c);
    if (c < a.d) weigh<H, 1>(a, u, values + c, p, p_stride, from, to, out + c);
}

AVX void attend_avx(const Attention& a, const Query& u, float* p) {
    constexpr int64_t kBlock = 32;  // 32 value rows of 64 floats are 8 KB: they stay in L1 while the heads take turns
    const int64_t p_stride = (a.slots + 7) / 8 * 8;
    const float* values = a.v + u.row * a.v_row + u.head / (a.heads / a.kv_heads) * a.v_head;
    float* out = a.out + ((u.row * a.n + u.node) * a.heads + u.head) * a.d;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(u.heads * a.d));
    if (!u.count) return;
    scores_avx(a, u, p, p_stride);
    float total[kMaxGroup];
    for (int64_t h = 0; h < u.heads; ++h) total[h] = softmax_avx(p + h * p_stride, u.count);
    for (int64_t i = 0; i < u.count; i += kBlock) {
        const int64_t end = i + kBlock < u.count ? i + kBlock : u.count;
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3)
            weigh_heads<3>(a, u, values, p + h * p_stride, p_stride, i, end, out + h * a.d);
        for (; h < u.heads; ++h) weigh_heads<1>(a, u, values, p + h * p_stride, p_stride, i, end, out + h * a.d);
    }
    for (int64_t h = 0; h < u.heads; ++h) {
        const __m256 t = _mm256_set1_ps(total[h]);
        for (int64_t c = h * a.d; c < (h + 1) * a.d; c += 8)
            _mm256_storeu_ps(out + c, _mm256_div_ps(_mm256_loadu_ps(out + c), t));
    }
}

#endif  // HAAST_X86

// Items are (row, head or group of heads, node), nodes innermost: they read the same K and V.
template <int64_t (*List)(const float*, int64_t, int32_t*, bool*),
          void (*Attend)(const Attention&, const Query&, float*)>
void attend_items(const void* job, int64_t first, int64_t last) {
    const Attention& a = *static_cast<const Attention*>(job);
    const int64_t room = (a.slots + 7) / 8 * 8, per_row = a.heads / a.together;
    std::unique_ptr<int32_t[]> slot(new int32_t[room + 8]);
    std::unique_ptr<float[]> p(new float[room * a.together + 8]);
    for (int64_t item = first; item < last; ++item) {
        const int64_t node = item % a.n, head = item / a.n % per_row * a.together, row = item / a.n / per_row;
        const float* mask = a.mask ? a.mask + row * a.mask_row + node * a.mask_node : nullptr;
        Query u{row, node, head, a.together, mask, slot.get(), 0, false};
        u.count = List(mask, a.slots, slot.get(), &u.biased);
        Attend(a, u, p.get());
    }
}

// ---------------------------------------------------------------- row-wise helpers

struct RowWise {
    const float *x, *weight;  // weight: norms only
    float* y;
    int64_t dim;  // of a row of y
    float eps;
};

void rms_norm_scalar(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float* x = a.x + r * a.dim;
        float sum = 0.0f;
        for (int64_t i = 0; i < a.dim; ++i) sum += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(a.dim) + a.eps);
        for (int64_t i = 0; i < a.dim; ++i) a.y[r * a.dim + i] = a.weight[i] * (x[i] * scale);
    }
}

void swiglu_scalar(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float *gate = a.x + r * 2 * a.dim, *up = gate + a.dim;
        for (int64_t i = 0; i < a.dim; ++i) a.y[r * a.dim + i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}

struct Rotation {
    float* x;  // (tokens, x_stride): `heads` heads of d values from the start of each row
    const float *cosine, *sine;
    int64_t heads, d, x_stride, period;
};

// Rotary embedding in place, halves paired as Llama pairs them; products are rounded before the sum, as torch rounds.
void rotate(const void* job, int64_t first, int64_t last) {
    const Rotation& a = *static_cast<const Rotation*>(job);
    const int64_t half = a.d / 2;
    for (int64_t r = first; r < last; ++r) {
        const float *c = a.cosine + r % a.period * a.d, *s = a.sine + r % a.period * a.d;
        for (int64_t h = 0; h < a.heads; ++h) {
            float *lo = a.x + r * a.x_stride + h * a.d, *hi = lo + half;
            for (int64_t i = 0; i < half; ++i) {
                const float x = lo[i], y = hi[i];
                lo[i] = x * c[i] - y * s[i];
                hi[i] = y * c[half + i] + x * s[half + i];
            }
        }
    }
}

#if defined(HAAST_X86)
AVX void rms_norm_avx(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float* x = a.x + r * a.dim;
        float* y = a.y + r * a.dim;
        __m256 squares = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 8 <= a.dim; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        float sum = sum8(squares);
        for (; i < a.dim; ++i) sum += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(a.dim) + a.eps);
        const __m256 s = _mm256_set1_ps(scale);
        for (i = 0; i + 8 <= a.dim; i += 8) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), s);
            _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(a.weight + i), scaled));
        }
        for (; i < a.dim; ++i) y[i] = a.weight[i] * (x[i] * scale);
    }
}

AVX void swiglu_avx(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (int64_t r = first; r < last; ++r) {
        const float *gate = a.x + r * 2 * a.dim, *up = gate + a.dim;
        float* y = a.y + r * a.dim;
        int64_t i = 0;
        for (; i + 8 <= a.dim; i += 8) {
            const __m256 g = _mm256_loadu_ps(gate + i);
            const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp8(_mm256_xor_ps(g, sign))));
            _mm256_storeu_ps(y + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
        }
        for (; i < a.dim; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}
#endif  // HAAST_X86

#if defined(HAAST_X86)
#define PICK(name) (use_avx() ? name##_avx : name##_scalar)
#define PICK_LINEAR (path() == kAvx512 ? linear_avx512 : PICK(linear))
#else
#define PICK(name) (name##_scalar)
#define PICK_LINEAR PICK(linear)
#endif

}  // namespace

// ---------------------------------------------------------------- the C ABI

EXPORT int haast_abi() { return 3; }  // raised with every change of a signature: a stale library is refused at load

EXPORT int haast_features() { return cpu_features(); }  // 1 AVX2, 2 FMA, 4 F16C, 8 AVX-512 F

EXPORT void haast_limit_path(int at_most) { widest = static_cast<Path>(at_most); }  // 0 portable, 1 AVX2, 2 AVX-512

// w (out_features, in_features) contiguous -> out (ceil(out_features / 16), in_features, 16) fp16, zero padded.
EXPORT void haast_pack_f16(const float* w, uint16_t* out, int64_t out_features, int64_t in_features) {
    for (int64_t o = 0; o < out_features; o += kLanes) {
        const int64_t valid = out_features - o < kLanes ? out_features - o : kLanes;
        uint16_t* panel = out + o * in_features;
        std::memset(panel, 0, sizeof(uint16_t) * static_cast<size_t>(kLanes * in_features));
#if defined(HAAST_X86)
        if (use_avx()) {
            pack_avx(w + o * in_features, panel, valid, in_features);
            continue;
        }
#endif
        for (int64_t l = 0; l < valid; ++l)
            for (int64_t k = 0; k < in_features; ++k)
                panel[k * kLanes + l] = float_to_half(w[(o + l) * in_features + k]);
    }
}

// y (rows, out_features) = x (rows, in_features) W^T + bias; sums in fp32.
EXPORT void haast_linear_f16(const float* x, const uint16_t* packed, const float* bias, float* y, int64_t rows,
                             int64_t in_features, int64_t out_features, int64_t x_stride, int64_t y_stride, int threads) {
    if (rows <= 0 || out_features <= 0) return;
    const Linear a{x, packed, bias, y, rows, in_features, out_features, x_stride, y_stride};
    const int64_t panels = (out_features + kLanes - 1) / kLanes;
    if (rows * in_features * out_features < kSerialWork) threads = 1;
    pool().run(PICK_LINEAR, &a, panels, chunk_of(panels, threads), threads);
}

// Shapes and strides as in struct Attention; d may be any number, but only multiples of 8 are fast.
EXPORT void haast_tree_attention_f32(const float* q, const float* k, const float* v, const float* mask, float* out,
                                     int64_t rows, int64_t heads, int64_t kv_heads, int64_t n, int64_t slots, int64_t d,
                                     int64_t q_row, int64_t q_head, int64_t q_node, int64_t k_row, int64_t k_head,
                                     int64_t k_slot, int64_t v_row, int64_t v_head, int64_t v_slot, int64_t mask_row,
                                     int64_t mask_node, float scaling, float softcap, int threads) {
    if (rows <= 0 || n <= 0) return;
    // Heads of a group go together (they share K and V) unless that leaves too few pieces for the threads.
    const int64_t group = heads / kv_heads;
    const int64_t together = rows * n * kv_heads >= 4 * threads ? group : 1;
    const Attention a{q,     k,      v,      mask,   out,   rows,   heads,  kv_heads, n,         slots,   d,       q_row,
                      q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot,   mask_row,
                      mask_node, scaling, softcap, together};
    Pool::Work work = attend_items<compact, attend_scalar>;
#if defined(HAAST_X86)
    if (use_avx() && d % 8 == 0 && group <= kMaxGroup) work = attend_items<compact_avx, attend_avx>;
#endif
    const int64_t items = rows * n * (heads / together);
    if (items * together * slots * d < kSerialWork) threads = 1;
    const int64_t chunk = items / (8 * static_cast<int64_t>(threads < 1 ? 1 : threads));
    pool().run(work, &a, items, chunk < 1 ? 1 : chunk, threads);
}

// y = weight * x / sqrt(mean(x^2) + eps), row by row; (rows, dim) contiguous.
EXPORT void haast_rms_norm_f32(const float* x, const float* weight, float* y, int64_t rows, int64_t dim, float eps,
                               int threads) {
    const RowWise a{x, weight, y, dim, eps};
    pool().run(PICK(rms_norm), &a, rows, 8, rows * dim < kSerialWork ? 1 : threads);
}

// Rotate the first `heads` heads (of even size d) of every row of x in place; row r takes angle row r % period.
EXPORT void haast_rotate_f32(float* x, const float* cosine, const float* sine, int64_t rows, int64_t heads, int64_t d,
                             int64_t x_stride, int64_t period, int threads) {
    const Rotation a{x, cosine, sine, heads, d, x_stride, period};
    pool().run(rotate, &a, rows, 16, rows * heads * d < kSerialWork ? 1 : threads);
}

// y (rows, width) = silu(gate) * up from gate_up (rows, 2 * width): gate first, both contiguous.
EXPORT void haast_swiglu_f32(const float* gate_up, float* y, int64_t rows, int64_t width, int threads) {
    const RowWise a{gate_up, nullptr, y, width, 0.0f};
    pool().run(PICK(swiglu), &a, rows, 4, rows * width < kSerialWork ? 1 : threads);
}
