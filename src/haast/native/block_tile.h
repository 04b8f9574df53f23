// The shape of a product with block weights, for one instruction set; linear_blocks.h includes it once for each.
//
// The including namespace defines ISA_FN and ISA_INLINE (attributes of functions), kWidth (32-bit lanes of a vector),
// kNarrow (whether products are first summed in 16 bits), and the types and operators used here: Ints, Floats, zero,
// load, either, field, dot, dot_narrow, widen, start, to_float, mul, fma, minus_fma, halves, bytes, signed_bytes,
// splat, store. No include guard and no namespace of its own.

constexpr int kParts = static_cast<int>(kLanes) / kWidth;  // vectors that make a panel

// The q of one quad of inputs, a byte for each input and output; not negative.
template <int kBits, int kQuad>
ISA_INLINE Ints quad_of(const uint8_t* planes) {
    constexpr int kLow = kBits >= 4 ? 4 : 0, kTwo = kBits & 2;
    if constexpr (kBits == 8) {
        return load(planes + kQuad * kPlane);
    } else {
        Ints q = zero();
        if constexpr (kLow != 0) q = field<kQuad / 4 * 4, 0, 15>(load(planes + kQuad % 4 * kPlane));
        if constexpr (kTwo != 0)
            q = either(q, field<kQuad % 4 * 2, kLow, 3>(load(planes + (kLow + kQuad / 4) * kPlane)));
        if constexpr ((kBits & 1) != 0) q = either(q, field<kQuad, kLow + kTwo, 1>(load(planes + (kLow + kTwo) * kPlane)));
        return q;
    }
}

// Adds the products of quads kStep, kStep + 1, ... of the inputs that share a scale: all 8 of a block (in an order that
// unpacks both halves of a byte together), or the 4 of its half kHalf.
template <int kBits, int kShared, int kHalf, int R, int P, int kStep>
ISA_INLINE void quads(const uint8_t* const (&planes)[P], const int8_t* x, Ints (&sums)[R][P], Ints (&narrow)[R][P]) {
    if constexpr (kStep < kShared / 4) {
        constexpr int kQuad = kShared == kBlockInputs ? kStep / 2 + kStep % 2 * 4 : kHalf * 4 + kStep;
        // How many products of two fit into 16 bits; 0: sums of 32 bits at once.
        constexpr int kFit = !kNarrow || kBits == 8 ? 0 : kBits <= 4 ? 8 : kBits == 5 ? 4 : 2;
        constexpr bool kLast = kFit != 0 && (kStep % (kFit + !kFit) == kFit - 1 || kStep == kShared / 4 - 1);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const Ints q = quad_of<kBits, kQuad>(planes[p]);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const int8_t* four = x + r * kBlockInputs + kQuad * 4;
                if constexpr (kFit == 0) sums[r][p] = dot<kBits>(sums[r][p], q, four);
                else if constexpr (kStep % kFit == 0) narrow[r][p] = dot_narrow(q, four);
                else narrow[r][p] = add_narrow(narrow[r][p], dot_narrow(q, four));
            }
        }
        if constexpr (kLast)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) sums[r][p] = widen(sums[r][p], narrow[r][p]);
        quads<kBits, kShared, kHalf, R, P, kStep + 1>(planes, x, sums, narrow);
    }
}

// The inputs that share a scale: their exact integer products, then the scales of weight and row, and the minimum.
template <WeightForm kForm, int kHalf, int R, int P>
ISA_INLINE void share(const uint8_t* const (&planes)[P], const uint8_t* const (&scales)[P], const Floats (&scale)[P],
                      const Floats (&minimum)[P], const int8_t* x, const float* row_scales, const int32_t* row_sums,
                      Floats (&acc)[R][P]) {
    constexpr BlockForm f = kForms[kForm];
    constexpr bool kSuper = f.group > kBlockInputs;
    Ints sums[R][P], narrow[R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            if constexpr (f.minimum) sums[r][p] = zero();
            else sums[r][p] = start<f.bits>(row_sums + r);
        }
    quads<f.bits, f.shared, kHalf, R, P, 0>(planes, x, sums, narrow);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
        Floats own = scale[p], least = minimum[p];
        if constexpr (kSuper) {
            const uint8_t* at = scales[p] + kHalf * kLanes;
            own = mul(own, f.minimum ? bytes(at) : signed_bytes(at));
            if constexpr (f.minimum) least = mul(least, bytes(at + f.group / f.shared * kLanes));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            acc[r][p] = fma(mul(to_float(sums[r][p]), own), splat(row_scales + r), acc[r][p]);
            if constexpr (f.minimum) {
                const Floats sum = splat(reinterpret_cast<const float*>(row_sums + r));
                acc[r][p] = kSuper ? minus_fma(least, sum, acc[r][p]) : fma(least, sum, acc[r][p]);
            }
        }
    }
}

// R rows by P vectors of outputs, from vector `first` on. R and P are constants, so that sums stay in registers.
template <WeightForm kForm, int R, int P>
ISA_FN void tile(const Blocks& a, const RowBlocks& x, int64_t row, int64_t first) {
    constexpr BlockForm f = kForms[kForm];
    constexpr int64_t kGroup = group_bytes(f), kHead = 2 * kLanes * (f.minimum ? 2 : 1), kSums = kBlockInputs / f.shared;
    const int64_t groups = groups_of(f, a.in);
    const uint8_t* group[P];
    int64_t part[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
        group[p] = static_cast<const uint8_t*>(a.packed) + (first + p) / kParts * groups * kGroup;
        part[p] = kParts == 1 ? 0 : (first + p) % kParts * kWidth;
    }
    const int64_t blocks = groups * (f.group / kBlockInputs);
    const int8_t* q = x.q + row * blocks * kBlockInputs;
    const float* row_scales = x.scales + row * blocks;
    const int32_t* row_sums = x.sums + row * blocks * kSums;
    Floats acc[R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[r][p] = none();
    for (int64_t g = 0; g < groups; ++g) {
        Floats scale[P], minimum[P];
        const uint8_t *planes[P], *scales[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            scale[p] = halves(group[p] + 2 * part[p]);
            minimum[p] = f.minimum ? halves(group[p] + 2 * (kLanes + part[p])) : scale[p];
            scales[p] = group[p] + kHead + part[p];
            planes[p] = group[p] + scales_bytes(f) + 4 * part[p];
            group[p] += kGroup;
        }
        for (int b = 0; b < f.group / kBlockInputs; ++b) {
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p)
                for (int line = 0; line < f.bits; ++line)
                    __builtin_prefetch(planes[p] + line * kPlane + kAhead);
            share<kForm, 0, R, P>(planes, scales, scale, minimum, q, row_scales, row_sums, acc);
            if constexpr (kSums == 2)
                share<kForm, 1, R, P>(planes, scales, scale, minimum, q, row_scales, row_sums + R, acc);
            q += R * kBlockInputs, row_scales += R, row_sums += R * kSums;
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) planes[p] += f.bits * kPlane, scales[p] += kSums * kLanes;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const int64_t o = (first + p) * kWidth;
            store(acc[r][p], a.bias ? a.bias + o : nullptr, a.y + (row + r) * a.y_stride + o, a.out - o);
        }
}

// A tile of `count` rows, at most `R`: the counts are tried from the largest on.
template <WeightForm kForm, int R, int P>
ISA_FN void rows(const Blocks& a, const RowBlocks& x, int64_t row, int64_t count, int64_t first) {
    if (count == R) return tile<kForm, R, P>(a, x, row, first);
    if constexpr (R > 1) rows<kForm, R - 1, P>(a, x, row, count, first);
}

// Panels `first` to `last`, every row.
template <WeightForm kForm>
void panels(const void* job, int64_t first_panel, int64_t last_panel) {
    const BlockProduct& product = *static_cast<const BlockProduct*>(job);
    const Blocks& a = *product.a;
    int64_t first = first_panel * kParts;
    const int64_t last = last_panel * kParts;
    if (a.rows == 1)  // a panel at a time, so that its lines are read once, and in one stream
        for (; first < last; first += kParts) tile<kForm, 1, kParts>(a, *product.x, 0, first);
    for (; first < last; ++first)
        row_blocks(a.rows, kMostRows, [&](int64_t row, int64_t count) {
            rows<kForm, kMostRows, 1>(a, *product.x, row, count, first);
        });
}

inline Pool::Work work_of(WeightForm form) {
    switch (form) {
        case kQ4_0: return panels<kQ4_0>;
        case kQ4_1: return panels<kQ4_1>;
        case kQ5_0: return panels<kQ5_0>;
        case kQ5_1: return panels<kQ5_1>;
        case kQ8_0: return panels<kQ8_0>;
        case kQ2_K: return panels<kQ2_K>;
        case kQ3_K: return panels<kQ3_K>;
        case kQ4_K: return panels<kQ4_K>;
        case kQ5_K: return panels<kQ5_K>;
        default: return panels<kQ6_K>;
    }
}
