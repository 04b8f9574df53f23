// Block tables: physical slots of a row in the shared KV pool, and moving accepted nodes to their final slots.
//
// Logical slot i of a row (0 is its first token's) is physical slot table[(i + shift) / block] * block + (i + shift) %
// block of the store. Knows nothing of keys, values or layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "pool.h"

namespace {

struct BlockTables {
    const int32_t* tables;  // (rows, stride): blocks of the store
    int64_t stride, block;  // block: slots per block
    int64_t shift;          // number of slots of a table before logical slot 0
    int64_t slots;          // slots of the whole store
};

// Reason why a call did nothing. native/stack.py has the same enum.
enum Refusal : int64_t { kFine = 0, kFewAngles = 1, kShortTable = 2, kStrangeBlock = 3, kStrangeToken = 4 };

// The physical slots of a forward, computed once for all layers and threads.
class Slots {
  public:
    // For the past of each row and `behind` slots after it. `first` (rows): logical slots before these are not read, so
    // their blocks may be missing; null: all are read.
    Slots(const BlockTables& t, const int64_t* past, const int64_t* first, int64_t rows, int64_t behind) {
        for (int64_t r = 0; r < rows; ++r) {
            if (past[r] < 0 || past[r] + behind + t.shift > t.stride * t.block) refusal_ = kShortTable;
            stride_ = std::max(stride_, past[r] + behind);
        }
        if (refusal_) return;
        slots_.reset(new int32_t[rows * stride_]);
        for (int64_t r = 0; r < rows; ++r) {
            const int32_t* table = t.tables + r * t.stride;
            int32_t* own = slots_.get() + r * stride_;
            const int64_t count = past[r] + behind;
            for (int64_t i = first ? first[r] : 0; i < count;) {
                const int64_t at = i + t.shift, inside = at % t.block, b = table[at / t.block];
                if (b < 0 || (b + 1) * t.block > t.slots) {
                    refusal_ = kStrangeBlock;
                    return;
                }
                const int64_t run = std::min(t.block - inside, count - i);
                const int32_t start = static_cast<int32_t>(b * t.block + inside);
                for (int64_t j = 0; j < run; ++j) own[i + j] = start + static_cast<int32_t>(j);
                i += run;
            }
        }
    }

    Refusal refusal() const { return refusal_; }
    const int32_t* of_row(int64_t row) const { return slots_.get() + row * stride_; }
    int64_t longest() const { return stride_; }  // slots of the longest row: its past and those after it

  private:
    Refusal refusal_ = kFine;
    int64_t stride_ = 0;
    std::unique_ptr<int32_t[]> slots_;  // (rows, stride_)
};

struct Moving {
    char* store;  // (lanes, slots, bytes)
    const int64_t *sources, *targets;
    int64_t count, slots, bytes;
};

// One item is a lane: the keys or the values of one head of one layer.
void move_lanes(const void* job, int64_t first, int64_t last) {
    const Moving& a = *static_cast<const Moving*>(job);
    for (int64_t l = first; l < last; ++l) {
        char* lane = a.store + l * a.slots * a.bytes;
        for (int64_t k = 0; k < a.count; ++k)
            std::memcpy(lane + a.targets[k] * a.bytes, lane + a.sources[k] * a.bytes, static_cast<size_t>(a.bytes));
    }
}

struct Keeping {
    BlockTables where;
    const int64_t *lengths, *path, *counts;  // (rows), (rows, path_stride) and (rows, count_stride): see KVCache.keep
    int64_t rows, path_stride, count_stride;
    char* store;
    int64_t lanes, bytes;
};

// Copies the accepted nodes of each row to the slots after its past. A node's slot is never before its new slot, and
// both ascend, so no node is overwritten before it is read. If it returns a refusal, nothing was moved.
Refusal keep(const Keeping& a, int threads) {
    constexpr int64_t kSerialBytes = 1 << 16;  // below this, waking a helper thread takes as long as the copies
    const BlockTables& t = a.where;
    std::vector<int64_t> sources, targets;
    for (int64_t r = 0; r < a.rows; ++r) {
        const int64_t *path = a.path + r * a.path_stride, count = a.counts[r * a.count_stride];
        const auto slot = [&](int64_t node) -> int64_t {
            const int64_t at = a.lengths[r] + node + t.shift;
            if (at < 0 || at >= t.stride * t.block) return -kShortTable;
            const int64_t b = t.tables[r * t.stride + at / t.block];
            return b < 0 || (b + 1) * t.block > t.slots ? -kStrangeBlock : b * t.block + at % t.block;
        };
        for (int64_t i = 0; i < count; ++i) {
            if (path[i] == i) continue;
            sources.push_back(slot(path[i])), targets.push_back(slot(i));
            const int64_t least = std::min(sources.back(), targets.back());
            if (least < 0) return static_cast<Refusal>(-least);
        }
    }
    const int64_t count = static_cast<int64_t>(sources.size());
    if (!count) return kFine;
    const Moving moving{a.store, sources.data(), targets.data(), count, t.slots, a.bytes};
    const bool serial = a.lanes * count * a.bytes < kSerialBytes;
    pool().run(move_lanes, &moving, a.lanes, chunk_of(a.lanes, threads), serial ? 1 : threads);
    return kFine;
}

}  // namespace
