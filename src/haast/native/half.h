// Half precision in portable code.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

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


}  // namespace
