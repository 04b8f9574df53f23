// Quantised weights in blocks: the formats of GGUF files, their layout in panels, and rows of them as fp32.
//
// A block of 32 inputs of one output is w = scale * q - minimum, or scale * (q - zero), where q are 2 to 8 bits. The
// formats differ in the bits, in where scales come from, and in how many inputs share one. A panel holds 16 outputs:
//
//   group of 32 inputs (formats with one fp16 scale per block) or 256 inputs (K formats):
//     16 fp16 scales, then 16 fp16 minimums if the format has them
//     K formats: 16 bytes of scales per 16 or 32 inputs, then as many bytes of minimums if it has them
//     per block of 32 inputs: 64 bytes per bit of q, in the planes below
//
// A plane is one AVX-512 register: byte 4 l + i belongs to output l and to input i of a quad (4 inputs). Quads are
// numbered 0 to 7 in a block.
//   8 bits: 8 planes, plane j holds quad j
//   4 bits: 4 planes, plane j holds quad j in the low half of each byte and quad j + 4 in the high half
//   2 bits: 2 planes, plane j holds quads 4 j to 4 j + 3, two bits each from the lowest on
//   1 bit:  1 plane, bit j belongs to quad j
// 3 bits are 2 + 1, 5 are 4 + 1 and 6 are 4 + 2, with the upper bits in the later planes.
//
// The block formats are those of ggml (gguf-py's quants.py and ggml-common.h describe them).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "half.h"
#include "pool.h"

namespace {

// The numbers are those of `WEIGHT_FORMS` in operators.py.
enum WeightForm : int64_t {
    kHalf = 0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kWeightForms, kSingle = -1
};

struct BlockForm {
    int bits;        // of q
    int group;       // inputs that share an fp16 scale: 32, or 256 with a byte of scale per `shared` inputs
    int shared;      // inputs that share a scale
    bool minimum;    // has minimums
    int zero;        // q of weight 0, for formats without minimums
    int file_bytes;  // of a group of one output in a GGUF file
};

constexpr BlockForm kForms[kWeightForms] = {
    {},
    {4, 32, 32, false, 8, 18},     // Q4_0
    {4, 32, 32, true, 0, 20},      // Q4_1
    {5, 32, 32, false, 16, 22},    // Q5_0
    {5, 32, 32, true, 0, 24},      // Q5_1
    {8, 32, 32, false, 128, 34},   // Q8_0
    {2, 256, 16, true, 0, 84},     // Q2_K
    {3, 256, 16, false, 4, 110},   // Q3_K
    {4, 256, 32, true, 0, 144},    // Q4_K
    {5, 256, 32, true, 0, 176},    // Q5_K
    {6, 256, 16, false, 32, 210},  // Q6_K
};

constexpr int64_t kBlockInputs = 32, kMostGroup = 256, kPlane = 4 * kLanes;

constexpr int64_t scales_bytes(const BlockForm& f) {  // of the head of a group, before the planes
    const int64_t halves = 2 * kLanes * (f.minimum ? 2 : 1);
    return f.group == kBlockInputs ? halves : halves + kLanes * (f.group / f.shared) * (f.minimum ? 2 : 1);
}
constexpr int64_t group_bytes(const BlockForm& f) { return scales_bytes(f) + f.group / kBlockInputs * f.bits * kPlane; }
constexpr int64_t groups_of(const BlockForm& f, int64_t in) { return (in + f.group - 1) / f.group; }
constexpr int64_t panel_bytes(const BlockForm& f, int64_t in) { return groups_of(f, in) * group_bytes(f); }

// One group of one output, in no format.
struct Group {
    uint16_t scale, minimum;       // fp16
    uint8_t scales[16], minimums[16];  // of K formats; Q3_K and Q6_K: int8
    uint8_t q[kMostGroup];
};

// ---------------------------------------------------------------- from a file's blocks

inline uint16_t half_at(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// The 6-bit scales and minimums of Q4_K and Q5_K, from 12 bytes.
inline void scales_of_12(const uint8_t* p, Group* g) {
    for (int j = 0; j < 4; ++j) {
        g->scales[j] = p[j] & 63, g->minimums[j] = p[j + 4] & 63;
        g->scales[j + 4] = static_cast<uint8_t>((p[j + 8] & 15) | (p[j] >> 6) << 4);
        g->minimums[j + 4] = static_cast<uint8_t>((p[j + 8] >> 4) | (p[j + 4] >> 6) << 4);
    }
}

// 32 values of 4 bits, and their fifth bits in `high` (null: 4 bits only).
inline void nibbles(const uint8_t* low, const uint8_t* high, uint8_t* q) {
    for (int i = 0; i < 16; ++i) q[i] = low[i] & 15, q[i + 16] = low[i] >> 4;
    for (int i = 0; high && i < 32; ++i) q[i] = static_cast<uint8_t>(q[i] | (high[i / 8] >> i % 8 & 1) << 4);
}

void read_group(WeightForm form, const uint8_t* p, Group* g) {
    switch (form) {
        case kQ4_0: g->scale = half_at(p); return nibbles(p + 2, nullptr, g->q);
        case kQ4_1: g->scale = half_at(p), g->minimum = half_at(p + 2); return nibbles(p + 4, nullptr, g->q);
        case kQ5_0: g->scale = half_at(p); return nibbles(p + 6, p + 2, g->q);
        case kQ5_1: g->scale = half_at(p), g->minimum = half_at(p + 2); return nibbles(p + 8, p + 4, g->q);
        case kQ8_0:
            g->scale = half_at(p);
            for (int i = 0; i < 32; ++i) g->q[i] = static_cast<uint8_t>(p[2 + i] ^ 0x80);
            return;
        case kQ2_K:
            g->scale = half_at(p + 80), g->minimum = half_at(p + 82);
            for (int j = 0; j < 16; ++j) g->scales[j] = p[j] & 15, g->minimums[j] = p[j] >> 4;
            for (int i = 0; i < 256; ++i) g->q[i] = p[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
            return;
        case kQ3_K:  // 32 bytes of upper bits, 64 of lower bits, 12 of scales
            g->scale = half_at(p + 108);
            for (int j = 0; j < 16; ++j) {
                const int low = p[96 + j % 8] >> j / 8 * 4 & 15, high = p[104 + j % 4] >> j / 4 * 2 & 3;
                g->scales[j] = static_cast<uint8_t>((low | high << 4) - 32);
            }
            for (int i = 0; i < 256; ++i) {
                const int low = p[32 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3, high = p[i % 32] >> i / 32 & 1;
                g->q[i] = static_cast<uint8_t>(low | high << 2);
            }
            return;
        case kQ4_K:
        case kQ5_K: {
            const bool five = form == kQ5_K;
            const uint8_t *low = p + (five ? 48 : 16), *high = p + 16;
            g->scale = half_at(p), g->minimum = half_at(p + 2);
            scales_of_12(p + 4, g);
            for (int i = 0; i < 256; ++i) {
                const int four = low[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
                g->q[i] = static_cast<uint8_t>(five ? four | (high[i % 32] >> i / 32 & 1) << 4 : four);
            }
            return;
        }
        case kQ6_K:
            g->scale = half_at(p + 208);
            std::memcpy(g->scales, p + 192, 16);
            for (int i = 0; i < 256; ++i) {
                const int half = i / 128, low = p[64 * half + i % 64] >> i % 128 / 64 * 4 & 15;
                g->q[i] = static_cast<uint8_t>(low | (p[128 + 32 * half + i % 32] >> i % 128 / 32 * 2 & 3) << 4);
            }
            return;
        default: return;
    }
}

// ---------------------------------------------------------------- panels

// Byte and shift of each bit field of the q of input `k` (in its block) and output `l`. Calls each(byte offset from the
// block's planes, shift in that byte, bits, shift in q).
template <typename Each>
inline void fields(int bits, int64_t k, int64_t l, Each each) {
    const int64_t quad = k / 4, at = 4 * l + k % 4;
    int64_t plane = 0;
    int done = 0;
    if (bits == 8) return each(quad * kPlane + at, 0, 8, 0);
    if (bits >= 4) each(quad % 4 * kPlane + at, static_cast<int>(quad / 4 * 4), 4, 0), plane = 4, done = 4;
    if (bits & 2) each((plane + quad / 4) * kPlane + at, static_cast<int>(quad % 4 * 2), 2, done), plane += 2, done += 2;
    if (bits & 1) each(plane * kPlane + at, static_cast<int>(quad), 1, done);
}

// The 32 q of a block of output `l`.
template <int kBits>
inline void block_of_bits(const uint8_t* planes, int64_t l, uint8_t* q) {
    for (int64_t k = 0; k < kBlockInputs; ++k) {
        int whole = 0;
        fields(kBits, k, l, [&](int64_t byte, int shift, int bits, int to) {
            whole |= (planes[byte] >> shift & ((1 << bits) - 1)) << to;
        });
        q[k] = static_cast<uint8_t>(whole);
    }
}

void block_of(int bits, const uint8_t* planes, int64_t l, uint8_t* q) {
    switch (bits) {
        case 2: return block_of_bits<2>(planes, l, q);
        case 3: return block_of_bits<3>(planes, l, q);
        case 4: return block_of_bits<4>(planes, l, q);
        case 5: return block_of_bits<5>(planes, l, q);
        case 6: return block_of_bits<6>(planes, l, q);
        default: return block_of_bits<8>(planes, l, q);
    }
}

// Writes the planes of a block: q of 16 outputs, 32 inputs each, from input `from` of their groups on.
template <int kBits>
void put_planes(const Group* g, int64_t from, uint8_t* planes) {
    constexpr int kLow = kBits >= 4 && kBits < 8 ? 4 : 0, kTwo = kBits & 2;
    for (int64_t l = 0; l < kLanes; ++l) {
        const uint8_t* q = g[l].q + from;
        uint8_t* to = planes + 4 * l;
        if constexpr (kBits == 8) {
            for (int j = 0; j < 8; ++j) std::memcpy(to + j * kPlane, q + 4 * j, 4);
            continue;
        }
        for (int i = 0; i < 4; ++i) {
            if constexpr (kLow != 0)
                for (int j = 0; j < 4; ++j)
                    to[j * kPlane + i] = static_cast<uint8_t>((q[4 * j + i] & 15) | (q[16 + 4 * j + i] & 15) << 4);
            if constexpr (kTwo != 0)
                for (int j = 0; j < 2; ++j) {
                    int byte = 0;
                    for (int t = 0; t < 4; ++t) byte |= (q[16 * j + 4 * t + i] >> kLow & 3) << 2 * t;
                    to[(kLow + j) * kPlane + i] = static_cast<uint8_t>(byte);
                }
            if constexpr ((kBits & 1) != 0) {
                int byte = 0;
                for (int t = 0; t < 8; ++t) byte |= (q[4 * t + i] >> (kLow + kTwo) & 1) << t;
                to[(kLow + kTwo) * kPlane + i] = static_cast<uint8_t>(byte);
            }
        }
    }
}

// Writes a group of a panel: `g` are the groups of its 16 outputs.
void put_groups(const BlockForm& f, const Group* g, uint8_t* to) {
    const int shares = f.group / f.shared;
    uint8_t* next = to + 2 * kLanes;
    for (int64_t l = 0; l < kLanes; ++l) std::memcpy(to + 2 * l, &g[static_cast<size_t>(l)].scale, 2);
    if (f.minimum) {
        for (int64_t l = 0; l < kLanes; ++l) std::memcpy(next + 2 * l, &g[static_cast<size_t>(l)].minimum, 2);
        next += 2 * kLanes;
    }
    for (int j = 0; f.group > kBlockInputs && j < shares; ++j)
        for (int64_t l = 0; l < kLanes; ++l) {
            next[j * kLanes + l] = g[l].scales[j];
            if (f.minimum) next[(shares + j) * kLanes + l] = g[l].minimums[j];
        }
    auto* put = put_planes<8>;
    switch (f.bits) {
        case 2: put = put_planes<2>; break;
        case 3: put = put_planes<3>; break;
        case 4: put = put_planes<4>; break;
        case 5: put = put_planes<5>; break;
        case 6: put = put_planes<6>; break;
        default: break;
    }
    uint8_t* planes = to + scales_bytes(f);
    for (int64_t k = 0; k < f.group; k += kBlockInputs) put(g, k, planes + k / kBlockInputs * f.bits * kPlane);
}

struct Packing {
    WeightForm form;
    const uint8_t* blocks;  // rows of a GGUF tensor
    const float* weight;    // or (out, in) fp32, which becomes Q8_0
    uint8_t* packed;
    int64_t out, in;
};

// Rounds 32 weights (fewer at the end of a row) as ggml does: the largest magnitude becomes 127.
void round_group(const float* w, int64_t count, Group* g) {
    float most = 0.0f;
    for (int64_t i = 0; i < count; ++i) most = std::fabs(w[i]) > most ? std::fabs(w[i]) : most;
    g->scale = float_to_half(most / 127.0f);
    const float scale = half_to_float(g->scale), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < kBlockInputs; ++i) {
        const float q = i < count ? std::nearbyint(w[i] * inverse) : 0.0f;
        g->q[i] = static_cast<uint8_t>(128 + static_cast<int>(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q));
    }
}

void pack_panels(const void* job, int64_t first, int64_t last) {
    const Packing& a = *static_cast<const Packing*>(job);
    const BlockForm& f = kForms[a.form];
    const int64_t groups = groups_of(f, a.in), bytes = group_bytes(f);
    std::vector<Group> g(kLanes);  // outputs beyond the last stay zero
    for (int64_t p = first; p < last; ++p) {
        const int64_t valid = std::min(kLanes, a.out - p * kLanes);
        if (valid < kLanes) g.assign(kLanes, Group{});
        for (int64_t i = 0; i < groups; ++i) {
            for (int64_t l = 0; l < valid; ++l) {
                const int64_t o = p * kLanes + l, from = i * kBlockInputs;
                if (a.weight) round_group(a.weight + o * a.in + from, std::min(kBlockInputs, a.in - from), &g[static_cast<size_t>(l)]);
                else read_group(a.form, a.blocks + (o * groups + i) * f.file_bytes, &g[static_cast<size_t>(l)]);
            }
            put_groups(f, g.data(), a.packed + (p * groups + i) * bytes);
        }
    }
}

void pack(const Packing& a, int threads) {
    const int64_t panels = (a.out + kLanes - 1) / kLanes;
    pool().run(pack_panels, &a, panels, chunk_of(panels, threads), threads);
}

// ---------------------------------------------------------------- rows of panels

struct Rows {
    WeightForm form;
    const void* packed;
    const int64_t* which;  // (count), or null: 0, 1, 2, ...
    float* out;            // (count, in)
    int64_t in;
};

// One output's weights as fp32, exactly as the GGUF format defines them. kSingle: an fp32 matrix (out, in).
void one_row(WeightForm form, const void* packed, int64_t row, int64_t in, float* out) {
    const int64_t p = row / kLanes, l = row % kLanes;
    if (form == kSingle)
        return void(std::memcpy(out, static_cast<const float*>(packed) + row * in, sizeof(float) * static_cast<size_t>(in)));
    if (form == kHalf) {
        const uint16_t* panel = static_cast<const uint16_t*>(packed) + p * in * kLanes;
        for (int64_t k = 0; k < in; ++k) out[k] = half_to_float(panel[k * kLanes + l]);
        return;
    }
    const BlockForm& f = kForms[form];
    const int shares = f.group / f.shared;
    uint8_t q[kBlockInputs];
    const uint8_t* group = static_cast<const uint8_t*>(packed) + p * panel_bytes(f, in);
    for (int64_t from = 0; from < in; from += f.group, group += group_bytes(f)) {
        const uint8_t *bytes = group + 2 * kLanes * (f.minimum ? 2 : 1), *planes = group + scales_bytes(f);
        const float scale = half_to_float(half_at(group + 2 * l));
        const float minimum = f.minimum ? half_to_float(half_at(group + 2 * (kLanes + l))) : 0.0f;
        for (int64_t share = 0; share < shares && from + share * f.shared < in; ++share) {
            const int64_t first = share * f.shared, count = std::min<int64_t>(f.shared, in - from - first);
            if (first % kBlockInputs == 0) block_of(f.bits, planes + first / kBlockInputs * f.bits * kPlane, l, q);
            const uint8_t* own_q = q + first % kBlockInputs;
            float own = scale, least = minimum;
            if (f.group > kBlockInputs) {
                const uint8_t factor = bytes[share * kLanes + l];
                own *= f.minimum ? static_cast<float>(factor) : static_cast<float>(static_cast<int8_t>(factor));
                if (f.minimum) least *= -static_cast<float>(bytes[(shares + share) * kLanes + l]);
            }
            float* to = out + from + first;
            if (f.minimum)
                for (int64_t k = 0; k < count; ++k) to[k] = own * static_cast<float>(own_q[k]) + least;
            else
                for (int64_t k = 0; k < count; ++k) to[k] = own * static_cast<float>(own_q[k] - f.zero);
        }
    }
}

// The first of `count` row numbers that is not in [0, rows), else -1.
inline int64_t first_outside(const int64_t* which, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; ++i)
        if (which[i] < 0 || which[i] >= rows) return i;
    return -1;
}

void unpack_rows(const void* job, int64_t first, int64_t last) {
    const Rows& a = *static_cast<const Rows*>(job);
    for (int64_t i = first; i < last; ++i) one_row(a.form, a.packed, a.which ? a.which[i] : i, a.in, a.out + i * a.in);
}

}  // namespace
