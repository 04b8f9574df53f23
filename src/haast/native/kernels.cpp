// The C ABI of the CPU kernels: matrix products for few rows, tree attention, row-wise operators, decoder layers.
//
// Owns the extern "C" functions, which compute on plain float arrays. Knows nothing of torch or Python.
// Every function is *row independent*: a row's (node's) result has the same bits with any other rows in the batch and
// any number of threads. So each output is one chain of sums, in an order that depends only on its own inputs:
//   linear     y[r][o] = fma over k = 0, 1, 2, ... into one accumulator, then the bias; with block weights the terms
//              are exact integer sums per block
//   attention  scores per slot; sums over the compacted list of unmasked slots, in slot order
// Threads divide the outputs, never the terms of a sum. Strides are in floats, not bytes.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "blocks.h"
#include "draft.h"
#include "half.h"
#include "judge.h"
#include "linear.h"
#include "linear_blocks.h"
#include "measure.h"
#include "pool.h"
#include "rowwise.h"
#include "slots.h"
#include "stack.h"
#include "top.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---------------------------------------------------------------- the C ABI

EXPORT int haast_abi() { return 10; }  // increased with each change of a signature: loading rejects a stale library

EXPORT int haast_features() { return cpu_features(); }  // see cpu.h

EXPORT void haast_limit_path(int at_most) { widest = static_cast<Path>(at_most); }  // enum Path

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

// Bytes of a panel of 16 outputs in a form with blocks.
EXPORT int64_t haast_panel_bytes(int64_t form, int64_t in_features) { return panel_bytes(kForms[form], in_features); }

// The blocks of a GGUF tensor (out_features, bytes of a row), or with `weight` an fp32 matrix to round to Q8_0 -> out
// (ceil(out_features / 16), bytes of a panel), zero padded.
EXPORT void haast_pack_blocks(const uint8_t* blocks, const float* weight, uint8_t* out, int64_t form,
                              int64_t out_features, int64_t in_features, int threads) {
    pack(Packing{static_cast<WeightForm>(form), blocks, weight, out, out_features, in_features}, threads);
}

// Rows `which` (null: 0, 1, 2, ...) of a packed matrix of `rows` rows as fp32 (count, in_features). Returns -1, or the
// index of the first entry of `which` that is no row; then nothing was written.
EXPORT int64_t haast_unpack_rows(const void* packed, int64_t form, const int64_t* which, float* out, int64_t rows,
                                 int64_t count, int64_t in_features, int threads) {
    const int64_t outside = which ? first_outside(which, count, rows) : -1;
    if (outside >= 0) return outside;
    const Rows a{static_cast<WeightForm>(form), packed, which, out, in_features};
    each_row(unpack_rows, &a, count, in_features, threads);
    return -1;
}

// y (rows, out_features) = x (rows, in_features) W^T + bias; `form` as in enum WeightForm.
EXPORT void haast_linear(const float* x, const void* packed, int64_t form, const float* bias, float* y, int64_t rows,
                         int64_t in_features, int64_t out_features, int64_t x_stride, int64_t y_stride, int threads) {
    product(x, x_stride, Weight{packed, bias, in_features, out_features, form, nullptr}, y, y_stride, rows, threads);
}

// Shapes and strides as in struct Attention. Any d works, but only multiples of 8 are fast.
EXPORT void haast_tree_attention_f32(const float* q, const float* k, const float* v, const float* mask, float* out,
                                     int64_t rows, int64_t heads, int64_t kv_heads, int64_t n, int64_t slots, int64_t d,
                                     int64_t q_row, int64_t q_head, int64_t q_node, int64_t k_row, int64_t k_head,
                                     int64_t k_slot, int64_t v_row, int64_t v_head, int64_t v_slot, int64_t mask_row,
                                     int64_t mask_node, float scaling, float softcap, int threads) {
    Attention a{};
    a.q = q, a.k = k, a.v = v, a.mask = mask, a.out = out;
    a.rows = rows, a.heads = heads, a.kv_heads = kv_heads, a.n = n, a.slots = slots, a.d = d;
    a.q_row = q_row, a.q_head = q_head, a.q_node = q_node, a.k_row = k_row, a.k_head = k_head, a.k_slot = k_slot;
    a.v_row = v_row, a.v_head = v_head, a.v_slot = v_slot, a.mask_row = mask_row, a.mask_node = mask_node;
    a.scaling = scaling, a.softcap = softcap;
    attend(a, threads);
}

// y = weight * x / sqrt(mean(x^2) + eps), row by row; (rows, dim) contiguous.
EXPORT void haast_rms_norm_f32(const float* x, const float* weight, float* y, int64_t rows, int64_t dim, float eps,
                               int threads) {
    rms_norm(x, weight, y, rows, dim, eps, threads);
}

// Apply RoPE to the first `heads` heads (of even size d) of every row of x in place; row r uses angle row r % period.
EXPORT void haast_rotate_f32(float* x, const float* cosine, const float* sine, int64_t rows, int64_t heads, int64_t d,
                             int64_t x_stride, int64_t period, int threads) {
    const Rotation a{x, cosine, sine, heads, d, x_stride, period};
    each_row(rotate, &a, rows, heads * d, threads);
}

// y (rows, width) = silu(gate) * up from gate_up (rows, 2 * width): gate first, both contiguous.
EXPORT void haast_swiglu_f32(const float* gate_up, float* y, int64_t rows, int64_t width, int threads) {
    swiglu(gate_up, y, rows, width, threads);
}

// All decoder layers over one tree, see stack.h. Returns a Refusal; if it is not 0, nothing was written.
EXPORT int64_t haast_stack_f32(const Stack* stack, const Pass* pass, int threads) {
    return run_stack(*stack, *pass, threads);
}

// Committed pairs of an EAGLE head, see draft.h. Returns a Refusal; if it is not 0, nothing was written.
EXPORT int64_t haast_commit(const Head* head, const Pairs* pairs, int threads) { return commit(*head, *pairs, threads); }

// One draft of an EAGLE head, see draft.h. Returns the number of nodes of the trees, or minus a Refusal.
EXPORT int64_t haast_draft(const Draft* draft, const Proposal* proposal, int threads) {
    Drafting drafting(*draft, *proposal, threads);
    return drafting.refusal() ? -drafting.refusal() : drafting.run();
}

// Move the accepted nodes of each row to their final slots, see struct Keeping. Returns a Refusal; if it is not 0,
// nothing was moved.
EXPORT int64_t haast_keep(void* store, const int32_t* tables, const int64_t* lengths, const int64_t* path,
                          const int64_t* counts, int64_t lanes, int64_t slots, int64_t bytes, int64_t stride,
                          int64_t block, int64_t shift, int64_t rows, int64_t path_stride, int64_t count_stride,
                          int threads) {
    const BlockTables where{tables, stride, block, shift, slots};
    return keep(Keeping{where, lengths, path, counts, rows, path_stride, count_stride, static_cast<char*>(store), lanes,
                        bytes}, threads);
}

// Verify drafted trees by sampling, see struct Judging.
EXPORT void haast_judge(const float* logits, const int64_t* tokens, const int64_t* parents, const uint8_t* live,
                        const uint8_t* placeholder, const float* temperatures, const double* draws,
                        int64_t* out, int64_t rows, int64_t nodes, int64_t vocab, int64_t width, int threads) {
    judge(Judging{logits, tokens, parents, live, placeholder, temperatures, draws, out, rows, nodes, vocab,
                  width}, threads);
}

// The k <= 64 largest entries of each row of logits (rows, width): log-probabilities and indices, descending.
EXPORT void haast_top(const float* logits, float* logprobs, int64_t* ids, int64_t rows, int64_t width, int64_t k,
                      int threads) {
    top(Top{logits, logprobs, ids, width, k}, rows, threads);
}

// Read `size` bytes once with all threads, split into `pieces` pieces.
EXPORT void haast_read(const uint8_t* bytes, int64_t size, uint64_t* sink, int64_t pieces, int threads) {
    const Reading a{bytes, size, pieces, sink};
#if defined(HAAST_X86)
    pool().run(use_avx() ? read_avx : read_scalar, &a, pieces, 1, threads);
#else
    pool().run(read_scalar, &a, pieces, 1, threads);
#endif
}

// `pieces` times `rounds` rounds of 12 independent multiply-adds; returns their number, with all lanes counted.
EXPORT int64_t haast_multiply(int64_t rounds, float* sink, int64_t pieces, int threads) {
    const Multiplying a{rounds, sink};
    Pool::Work work = multiply_scalar;
#if defined(HAAST_X86)
    work = path() == kAvx512 ? multiply_avx512 : use_avx() ? multiply_avx : multiply_scalar;
#endif
    pool().run(work, &a, pieces, 1, threads);
    return rounds * pieces * kChains * lanes();
}
