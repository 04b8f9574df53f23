// All of Llama's decoder layers in one call.
//
// Runs the operators of pre-norm layers with RoPE, grouped-query attention and SwiGLU over a tree of nodes after each
// row's cached past. Uses the same operators as the single kernels, so a node's result has the same bits as with layers
// called one by one, and depends only on the node's own path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "linear_blocks.h"
#include "pool.h"
#include "rowwise.h"
#include "slots.h"

namespace {

// A packed matrix of weights. One made of parts in several forms is a list of them: outputs of `next` follow its own.
struct Weight {
    const void* packed;
    const float* bias;  // (out), may be null
    int64_t in, out, form;  // WeightForm; kSingle only for embeddings
    const Weight* next;
};

inline int64_t outputs_of(const Weight& w) { return w.out + (w.next ? outputs_of(*w.next) : 0); }

struct Layer {
    const float* input_norm;       // (hidden), or null: no norm before attention
    Weight qkv;                    // queries, keys and values of all heads, in this order
    const float *q_norm, *k_norm;  // (d), or null: norms of each head before RoPE
    Weight o;
    const float* post_norm;  // (hidden)
    Weight gate_up, down;
    int64_t window;  // sliding window in positions; 0: none
};

struct Stack {
    const Layer* layers;
    int64_t layer_count, hidden, heads, kv_heads, d, inner;
    float eps, scaling;
    const float* final_norm;  // (hidden), or null
};

struct Pass {
    float* states;                    // (rows, n, hidden), the embeddings; overwritten
    float* output;                    // (rows, n, hidden), after the final norm if there is one
    float* const* captured;           // (layer_count + 1), null for layers not captured; may be null: none
    const float *cosine, *sine;       // (angles, d)
    const int64_t* positions;         // (rows, n), each below `angles`
    const int64_t* flight_positions;  // (rows, flight)
    const int64_t* past;              // (rows): logical slots that all nodes of a row attend to
    const uint8_t* seen;              // (rows, n, flight)
    void* cache;                      // (2 * layers: key, value, ...; kv_heads, slots, d), in format `form`
    BlockTables blocks;               // (rows, ...)
    int64_t rows, n, flight, angles;
    Form form;
};

struct Store {
    const Stack* stack;
    const Pass* pass;
    const Slots* places;
    const Layer* layer;
    float* qkv;
    void *keys, *values;
};

void norm_head(float* x, const float* weight, int64_t d, float eps) {
    const RowWise job{x, weight, x, d, eps};
    PICK(rms_norm)(&job, 0, 1);
}

// Applies RoPE to queries in place and to keys while storing them in the cache; one item is a token (row, node).
template <typename E>
void store_tokens(const void* job, int64_t first, int64_t last) {
    const Store& a = *static_cast<const Store*>(job);
    const Stack& s = *a.stack;
    const Pass& p = *a.pass;
    const int64_t rotated = s.heads + s.kv_heads, width = (rotated + s.kv_heads) * s.d;
    for (int64_t t = first; t < last; ++t) {
        const int64_t row = t / p.n, slot = a.places->of_row(row)[p.past[row] + p.flight - p.n + t % p.n];
        float* own = a.qkv + t * width;
        if (a.layer->q_norm)
            for (int64_t h = 0; h < s.heads; ++h) norm_head(own + h * s.d, a.layer->q_norm, s.d, s.eps);
        if (a.layer->k_norm)
            for (int64_t h = s.heads; h < rotated; ++h) norm_head(own + h * s.d, a.layer->k_norm, s.d, s.eps);
        const Rotation turn{own, p.cosine + p.positions[t] * s.d, p.sine + p.positions[t] * s.d, rotated, s.d, width, 1};
        rotate(&turn, 0, 1);
        for (int64_t h = 0; h < s.kv_heads; ++h) {
            const int64_t at = (h * p.blocks.slots + slot) * s.d;
            narrow(own + (s.heads + h) * s.d, static_cast<E*>(a.keys) + at, s.d);
            narrow(own + (rotated + h) * s.d, static_cast<E*>(a.values) + at, s.d);
        }
    }
}

struct Residual {
    float* states;
    const float *change, *weight;
    float* normed;
    int64_t dim;
    float eps;
};

// states += change (if not null), then the norm of the sum (if requested).
void add_and_norm(const void* job, int64_t first, int64_t last) {
    const Residual& a = *static_cast<const Residual*>(job);
    if (a.change)
        for (int64_t i = first * a.dim; i < last * a.dim; ++i) a.states[i] += a.change[i];
    if (!a.normed) return;
    if (a.weight) {
        const RowWise norm{a.states, a.weight, a.normed, a.dim, a.eps};
        PICK(rms_norm)(&norm, first, last);
    } else {
        std::memcpy(a.normed + first * a.dim, a.states + first * a.dim,
                    sizeof(float) * static_cast<size_t>((last - first) * a.dim));
    }
}

void residual(float* states, const float* change, const float* weight, float* normed, int64_t rows, int64_t dim,
              float eps, int threads) {
    const Residual a{states, change, weight, normed, dim, eps};
    each_row(add_and_norm, &a, rows, dim, threads);
}

// y (rows, y_stride) = x (rows, x_stride) W^T + bias, for every part of the weight.
void product(const float* x, int64_t x_stride, const Weight& weight, float* y, int64_t y_stride, int64_t rows,
             int threads) {
    for (const Weight* w = &weight; w; y += w->out, w = w->next)
        if (w->form == kHalf) {
            const auto* packed = static_cast<const uint16_t*>(w->packed);
            multiply(Linear{x, packed, w->bias, y, rows, w->in, w->out, x_stride, y_stride}, threads);
        } else {
            const auto form = static_cast<WeightForm>(w->form);
            multiply_blocks(Blocks{x, w->packed, w->bias, y, rows, w->in, w->out, x_stride, y_stride, form}, threads);
        }
}

void product(const float* x, const Weight& w, float* y, int64_t rows, int threads) {
    product(x, w.in, w, y, outputs_of(w), rows, threads);
}

// Per row the first logical slot that any node attends to, if every layer has a window; else empty: all are read.
std::vector<int64_t> first_seen(const Stack& s, const int64_t* positions, int64_t rows, int64_t n) {
    int64_t widest = 0;
    for (int64_t l = 0; l < s.layer_count; ++l) {
        if (!s.layers[l].window) return {};
        widest = std::max(widest, s.layers[l].window);
    }
    std::vector<int64_t> first(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t lowest = *std::min_element(positions + r * n, positions + (r + 1) * n);
        first[static_cast<size_t>(r)] = std::max<int64_t>(0, lowest - widest + 1);
    }
    return first;
}

// `places` are the physical slots of p.blocks, for the past and at least p.flight slots after it.
void run_layers(const Stack& s, const Pass& p, const Slots& places, int threads) {
    const int64_t tokens = p.rows * p.n, rotated = s.heads + s.kv_heads, width = (rotated + s.kv_heads) * s.d;
    const int64_t wide = s.hidden > s.heads * s.d ? s.hidden : s.heads * s.d;
    const std::unique_ptr<float[]> scratch(new float[tokens * (2 * wide + width + 3 * s.inner)]);
    float *normed = scratch.get(), *change = normed + tokens * wide, *qkv = change + tokens * wide;
    float *gates = qkv + tokens * width, *active = gates + tokens * 2 * s.inner;
    const int64_t lane = s.kv_heads * p.blocks.slots * s.d * (p.form == kF32 ? 4 : 2);  // bytes of one layer's keys
    const Pool::Work keep = p.form == kF16    ? store_tokens<F16>
                            : p.form == kBF16 ? store_tokens<BF16>
                                              : store_tokens<float>;
    const size_t bytes = sizeof(float) * static_cast<size_t>(tokens * s.hidden);
    const float* pending = nullptr;  // output of the previous layer that is not added yet
    for (int64_t l = 0; l < s.layer_count; ++l) {
        const Layer& layer = s.layers[l];
        char *keys = static_cast<char*>(p.cache) + 2 * l * lane, *values = keys + lane;
        residual(p.states, pending, layer.input_norm, normed, tokens, s.hidden, s.eps, threads);
        if (p.captured && p.captured[l]) std::memcpy(p.captured[l], p.states, bytes);
        product(normed, layer.qkv, qkv, tokens, threads);
        const Store store{&s, &p, &places, &layer, qkv, keys, values};
        each_row(keep, &store, tokens, width, threads);
        Attention a{};
        a.q = qkv, a.k = keys, a.v = values, a.out = normed, a.form = p.form;
        a.rows = p.rows, a.heads = s.heads, a.kv_heads = s.kv_heads, a.n = p.n, a.d = s.d;
        a.q_row = p.n * width, a.q_head = s.d, a.q_node = width;
        a.k_head = a.v_head = p.blocks.slots * s.d, a.k_slot = a.v_slot = s.d;
        a.scaling = s.scaling, a.places = &places, a.past = p.past, a.seen = p.seen, a.flight = p.flight;
        a.window = layer.window, a.positions = p.positions, a.flight_positions = p.flight_positions;
        for (int64_t row = 0; row < p.rows; ++row)
            if (p.past[row] + p.flight > a.slots) a.slots = p.past[row] + p.flight;
        attend(a, threads);
        product(normed, layer.o, change, tokens, threads);
        residual(p.states, change, layer.post_norm, normed, tokens, s.hidden, s.eps, threads);
        product(normed, layer.gate_up, gates, tokens, threads);
        swiglu(gates, active, tokens, s.inner, threads);
        product(active, layer.down, change, tokens, threads);
        pending = change;
    }
    residual(p.states, pending, s.final_norm, p.output, tokens, s.hidden, s.eps, threads);
    if (p.captured && p.captured[s.layer_count]) std::memcpy(p.captured[s.layer_count], p.output, bytes);
}

// Checks the values in the arrays before anything is written, so that Python need not read them.
Refusal run_stack(const Stack& s, const Pass& p, int threads) {
    const int64_t tokens = p.rows * p.n;
    if (tokens <= 0) return kFine;
    for (int64_t t = 0; t < tokens; ++t)
        if (p.positions[t] < 0 || p.positions[t] >= p.angles) return kFewAngles;
    const std::vector<int64_t> first = first_seen(s, p.positions, p.rows, p.n);
    const Slots places(p.blocks, p.past, first.empty() ? nullptr : first.data(), p.rows, p.flight);
    if (!places.refusal()) run_layers(s, p, places, threads);
    return places.refusal();
}

}  // namespace
