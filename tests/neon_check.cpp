// The NEON products against the portable ones, and row independence; run on ARM or under an emulator (test_neon.py).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

extern "C" {
int haast_features();
void haast_limit_path(int);
void haast_pack_f16(const float*, uint16_t*, int64_t, int64_t);
void haast_pack_i8(const float*, int8_t*, float*, int64_t, int64_t);
void haast_linear(const float*, const void*, const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int);
}

int main() {
    if (!(haast_features() & 16)) return std::puts("no NEON"), 2;
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    int cases = 0;
    for (const int64_t in : {1, 7, 64, 129})
        for (const int64_t out : {1, 15, 16, 50, 131})
            for (const int64_t rows : {1, 2, 5, 6, 7, 13, 24})
                for (const bool eight : {false, true}) {
                    std::vector<float> w(in * out), x(rows * in), bias(out), scale(out), fast(rows * out), slow(rows * out);
                    for (auto* values : {&w, &x, &bias})
                        for (float& value : *values) value = normal(random);
                    const int64_t size = (out + 15) / 16 * 16 * in;
                    std::vector<uint16_t> half(size);
                    std::vector<int8_t> bytes(size);
                    haast_pack_f16(w.data(), half.data(), out, in);
                    haast_pack_i8(w.data(), bytes.data(), scale.data(), out, in);
                    const void* packed = eight ? static_cast<const void*>(bytes.data()) : half.data();
                    const float* factors = eight ? scale.data() : nullptr;
                    haast_limit_path(2);
                    haast_linear(x.data(), packed, factors, bias.data(), fast.data(), rows, in, out, in, out, 2);
                    haast_limit_path(0);
                    haast_linear(x.data(), packed, factors, bias.data(), slow.data(), rows, in, out, in, out, 1);
                    haast_limit_path(2);
                    for (int64_t i = 0; i < rows * out; ++i)
                        if (!(std::fabs(fast[i] - slow[i]) < 1e-4f * (1 + std::fabs(slow[i]))))
                            return std::printf("%ld x %ld, %ld rows: %g, not %g\n", (long)out, (long)in, (long)rows,
                                               fast[i], slow[i]), 1;
                    std::vector<float> alone(out);
                    for (int64_t r = 0; r < rows; ++r) {
                        haast_linear(x.data() + r * in, packed, factors, bias.data(), alone.data(), 1, in, out, in, out, 1);
                        for (int64_t o = 0; o < out; ++o)
                            if (alone[o] != fast[r * out + o]) return std::printf("row %ld depends on others\n", (long)r), 1;
                    }
                    ++cases;
                }
    std::printf("%d cases agree\n", cases);
    return 0;
}
