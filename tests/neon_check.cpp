// The NEON products against the portable ones, and row independence; run on ARM or under an emulator (test_neon.py).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
int haast_features();
void haast_limit_path(int);
int64_t haast_panel_bytes(int64_t, int64_t);
void haast_pack_f16(const float*, uint16_t*, int64_t, int64_t);
void haast_pack_blocks(const uint8_t*, const float*, uint8_t*, int64_t, int64_t, int64_t, int);
void haast_linear(const float*, const void*, int64_t, const float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int);
}

// Bytes of a file's block and its inputs, and where its fp16 numbers are (-1: no second one), by WeightForm.
struct FileBlock {
    int bytes, inputs, first, second;
};
constexpr FileBlock kFileBlocks[] = {{}, {18, 32, 0, -1}, {20, 32, 0, 2}, {22, 32, 0, -1}, {24, 32, 0, 2}, {34, 32, 0, -1},
                                     {84, 256, 80, 82}, {110, 256, 108, -1}, {144, 256, 0, 2}, {176, 256, 0, 2},
                                     {210, 256, 208, -1}};

int main() {
    const int features = haast_features();
    if (!(features & 16)) return std::puts("no NEON"), 2;
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    int cases = 0;
    for (int form = 0; form <= 10; ++form)
        for (const int64_t in : {1, 7, 64, 129, 256, 768}) {
            const FileBlock& block = kFileBlocks[form];
            if (form == 0 ? in > 129 : in % block.inputs != 0) continue;
            for (const int64_t out : {1, 15, 16, 50})
                for (const int64_t rows : {1, 2, 5, 6, 7, 13}) {
                    std::vector<float> w(in * out), x(rows * in), bias(out), fast(rows * out), slow(rows * out), alone(out);
                    for (auto* values : {&w, &x, &bias})
                        for (float& value : *values) value = normal(random);
                    std::vector<uint8_t> packed((out + 15) / 16 * (form ? haast_panel_bytes(form, in) : 32 * in));
                    if (form) {
                        std::vector<uint8_t> file(out * in / block.inputs * block.bytes);
                        for (uint8_t& byte : file) byte = static_cast<uint8_t>(random());
                        for (size_t at = 0; at < file.size(); at += block.bytes)
                            for (const int half : {block.first, block.second})
                                if (half >= 0) file[at + half + 1] = 0x14;  // about 0.001
                        haast_pack_blocks(file.data(), nullptr, packed.data(), form, out, in, 1);
                    } else {
                        haast_pack_f16(w.data(), reinterpret_cast<uint16_t*>(packed.data()), out, in);
                    }
                    const auto multiply = [&](int path, const float* from, float* to, int64_t count, int threads) {
                        haast_limit_path(path);
                        haast_linear(from, packed.data(), form, bias.data(), to, count, in, out, in, out, threads);
                    };
                    multiply(0, x.data(), slow.data(), rows, 1);
                    for (const int path : {1, 2}) {
                        multiply(path, x.data(), fast.data(), rows, 2);
                        for (int64_t i = 0; i < rows * out; ++i) {
                            const float most = form ? 0.0f : 1e-4f * (1 + std::fabs(slow[i]));  // blocks: the same bits
                            if (!(std::fabs(fast[i] - slow[i]) <= most))
                                return std::printf("form %d, path %d, %ld x %ld, %ld rows: %g, not %g\n", form, path,
                                                   (long)out, (long)in, (long)rows, fast[i], slow[i]), 1;
                        }
                        for (int64_t r = 0; r < rows; ++r) {
                            multiply(path, x.data() + r * in, alone.data(), 1, 1);
                            if (std::memcmp(alone.data(), fast.data() + r * out, sizeof(float) * out) != 0)
                                return std::printf("row %ld depends on others\n", (long)r), 1;
                        }
                    }
                    ++cases;
                }
        }
    std::printf("%d cases agree%s\n", cases, features & 128 ? ", with dot products" : "");
    return 0;
}
