// A small thread pool. Distributes the pieces of a job over threads; knows no arithmetic.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu.h"

namespace {

// A job is split into chunks that the caller and the helper threads claim one by one. Unlike an OpenMP team it has no
// barrier at the start: a helper without a free core (torch's idle threads spin, other programs run) claims no chunk
// and is not waited for. For the same reason a forked child, which has no helpers, is only slower. Helpers spin for
// less than a millisecond, which is longer than the gap between two calls of a decode step, and then sleep.
class Pool {
  public:
    using Work = void (*)(const void* job, int64_t first, int64_t last);

    // Runs work(job, first, last) over [0, items) in pieces of `chunk`.
    void run(Work work, const void* job, int64_t items, int64_t chunk, int threads) {
        const int64_t chunks = (items + chunk - 1) / chunk;
        std::unique_lock<std::mutex> busy(caller_, std::try_to_lock);
        // A concurrent caller (another Python thread) runs its job alone instead of waiting for the helpers.
        if (threads <= 1 || chunks <= 1 || chunks >= kClosed || !busy.owns_lock()) return work(job, 0, items);
        hire(threads - 1);
        // The ticket is closed while the fields change, so that a helper with an old ticket can't claim a chunk.
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
            else std::this_thread::yield();  // a helper was preempted within a chunk
    }

  private:
    static constexpr int64_t kClosed = 0xffffffff;
    static constexpr int kSpins = 32768;

    // The ticket is (generation, next chunk). A successful exchange shows that the fields read before belong to this
    // generation: they change only while the ticket is closed, and only after all claimed chunks are done.
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
        } catch (const std::system_error&) {  // the system has no more threads: work with those created so far
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
    static Pool* const one = new Pool;  // never destroyed, as helpers may outlive static objects
    return *one;
}

// Runs an operator on each of `rows` rows of `width` numbers; alone if they are fewer than `least` numbers. A second
// thread costs more than it saves if it moves the numbers to another core's cache and back.
void each_row(Pool::Work work, const void* job, int64_t rows, int64_t width, int threads, int64_t least = kSerialWork) {
    const int64_t chunk = rows / (4 * static_cast<int64_t>(threads < 1 ? 1 : threads));
    pool().run(work, job, rows, chunk < 1 ? 1 : chunk, rows * width < least ? 1 : threads);
}

// Chunks are small, so that threads finish at about the same time, and even, for kernels that process pairs of panels.
int64_t chunk_of(int64_t items, int threads) {
    const int64_t chunk = items / (8 * static_cast<int64_t>(threads < 1 ? 1 : threads)) / 2 * 2;
    return chunk < 2 ? 2 : chunk;
}


}  // namespace
