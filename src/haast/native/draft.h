// The two calls of an EAGLE head: committed pairs, and a whole draft (all levels, the best candidates, and their tree).
//
// They take the same steps as `EagleDrafter._commit`, `EagleDrafter._grow` and `Growth.tree`, with the same results
// (tests compare them). They save the small operators between them, which take longer than the head on a small model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "stack.h"
#include "top.h"

namespace {

// A FeatExtrapolator. Its pairs are the embedding of a token, then a state, which is a target's feature or an output.
struct Head {
    const Stack* stack;
    Weight fc;         // (hidden, embedding and state concatenated)
    Weight context;    // (hidden, lower layers of the target), added to features; packed null: none
    Weight embedding;  // (vocabulary, hidden) of the target
};

// Pairs of tokens and features, which are committed after each row's past.
struct Pairs {
    const int64_t *tokens, *past;  // (rows, n), (rows)
    const float* features;         // (rows, n, width): lower layers of the target, if the head reads any, then the feature
    float* output;                 // (rows, n, hidden)
    void* cache;                   // from here to `form` as in struct Pass
    const float *cosine, *sine;
    BlockTables blocks;
    int64_t rows, n, angles;
    Form form;
};

inline void embed(const Head& head, int64_t token, float* to) {
    one_row(static_cast<WeightForm>(head.embedding.form), head.embedding.packed, token, head.stack->hidden, to);
}

// Writes the pairs' keys and values to the cache and the head's states to the output, or does nothing.
Refusal commit(const Head& head, const Pairs& p, int threads) {
    const int64_t count = p.rows * p.n, hidden = head.stack->hidden;
    const int64_t lower = head.context.packed ? head.context.in : 0, width = lower + hidden;
    for (int64_t i = 0; i < count; ++i)
        if (p.tokens[i] < 0 || p.tokens[i] >= outputs_of(head.embedding)) return kStrangeToken;
    std::vector<float> mixed(static_cast<size_t>(count * 2 * hidden)), states(static_cast<size_t>(count * hidden));
    if (lower) product(p.features, width, head.context, states.data(), hidden, count, threads);
    std::vector<int64_t> positions(static_cast<size_t>(count));
    std::vector<uint8_t> seen(static_cast<size_t>(count * p.n), 0);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i % p.n;
        float* pair = mixed.data() + i * 2 * hidden;
        embed(head, p.tokens[i], pair);
        std::memcpy(pair + hidden, p.features + i * width + lower, sizeof(float) * static_cast<size_t>(hidden));
        if (lower)
            for (int64_t j = 0; j < hidden; ++j) pair[hidden + j] += states[static_cast<size_t>(i * hidden + j)];
        positions[static_cast<size_t>(i)] = p.past[i / p.n] + at;
        std::memset(seen.data() + i * p.n, 1, static_cast<size_t>(at + 1));
    }
    product(mixed.data(), head.fc, states.data(), count, threads);
    Pass pass{};
    pass.states = states.data(), pass.output = p.output, pass.cosine = p.cosine, pass.sine = p.sine;
    pass.positions = pass.flight_positions = positions.data(), pass.past = p.past, pass.seen = seen.data();
    pass.cache = p.cache, pass.blocks = p.blocks, pass.form = p.form;
    pass.rows = p.rows, pass.n = pass.flight = p.n, pass.angles = p.angles;
    return run_stack(*head.stack, pass, threads);
}

struct Draft {
    const Head* head;
    Weight lm;             // (draft vocabulary, hidden)
    const int64_t* vocab;  // (draft vocabulary): target ids; null: the ids are equal
    int64_t top_k, levels;   // levels after the first
    const int64_t* widths;   // (levels): number of nodes that are expanded for each level
    const int64_t* frontier;  // fixed trees: candidates to expand, level after level; null: the best ones
    const int64_t* keep;      // fixed trees: (nodes - 1) candidates to keep; null: the best ones
    int64_t nodes;
    const float* forward_ms;  // (nodes) measured forward times, or null: no cost model, see tuning/policy.py
    float level_ms, rate, trust, follow;
    // Calibration of path scores, see heads/acceptance.py: knots of the curve of greedy texts, then of sampled ones.
    const float *knots, *chances;
    int64_t greedy_knots, sampled_knots;  // 0: scores are used as they are
};

struct Proposal {
    const float* states;          // (rows, hidden) at the roots
    const int64_t *roots, *past;  // (rows)
    void* cache;                  // from here to `form` as in struct Pass
    const float *cosine, *sine;
    BlockTables blocks;
    int64_t rows, angles;
    Form form;
    const float *warmth, *shift;  // (rows): share of the sampled curve, and what is added to log-probabilities
    // Drafts of another source, (rows, others): they compete with the head's; -1 is the root, -inf no draft.
    const int64_t *other_tokens, *other_parents;
    const float* other_scores;
    int64_t others;
    int64_t *tokens, *parents, *depths;  // out: (rows, n) for the returned n, at most (rows, nodes)
    uint8_t* ancestors;                  // out: (rows, n, n)
    float* scores;                       // out: (rows, n) calibrated log-probabilities of the head's nodes; else -inf
};

// A piecewise linear map of log-probabilities: Curve in heads/acceptance.py.
inline float on_curve(float score, const float* knots, const float* chances, int64_t count) {
    float found = chances[0] + std::min(score - knots[0], 0.0f);
    for (int64_t i = 0; i + 1 < count && score > knots[i]; ++i)
        found += (chances[i + 1] - chances[i]) * std::min((score - knots[i]) / (knots[i + 1] - knots[i]), 1.0f);
    return found;
}

// The candidates of one row.
struct Candidates {
    std::vector<int64_t> tokens, parents;
    std::vector<float> scores;

    void add(int64_t token, float score, int64_t parent) {
        tokens.push_back(token), scores.push_back(score), parents.push_back(parent);
    }

    // Indices of the `count` best candidates from `first` on, ascending; of equals the earlier one.
    std::vector<int64_t> best(int64_t first, int64_t count) const {
        std::vector<int64_t> order(scores.size() - static_cast<size_t>(first));
        std::iota(order.begin(), order.end(), first);
        const auto end = order.begin() + std::min<int64_t>(count, static_cast<int64_t>(order.size()));
        std::partial_sort(order.begin(), end, order.end(), [this](int64_t a, int64_t b) {
            const float x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
            return x > y || (x == y && a < b);
        });
        order.erase(end, order.end());
        std::sort(order.begin(), order.end());
        return order;
    }
};

class Drafting {
  public:
    Drafting(const Draft& draft, const Proposal& proposal, int threads)
        : d_(draft), p_(proposal), threads_(threads), hidden_(draft.head->stack->hidden), rows_(proposal.rows),
          first_(first_seen(*draft.head->stack, proposal.past, proposal.rows, 1)),
          places_(proposal.blocks, proposal.past, first_.empty() ? nullptr : first_.data(), proposal.rows,
                  std::accumulate(draft.widths, draft.widths + draft.levels, int64_t{0})),
          found_(static_cast<size_t>(proposal.rows)) {}

    // The reason why no tree can be drafted, or kFine.
    Refusal refusal() const {
        for (int64_t r = 0; r < rows_; ++r)
            if (p_.past[r] + d_.levels > p_.angles) return kFewAngles;
        return places_.refusal();
    }

    // Number of nodes of the trees.
    int64_t run() {
        std::vector<float> states(p_.states, p_.states + rows_ * hidden_), next;
        children(states.data(), 1, {}, nullptr);
        const int64_t* fixed = d_.frontier;
        std::vector<uint8_t> seen;
        int64_t width_before = 1, flight_before = 0, first = 0;  // first candidate of the newest level
        for (int64_t level = 0; level < d_.levels; ++level) {
            const int64_t width = d_.widths[level];
            std::vector<std::vector<int64_t>> chosen(found_.size());
            for (size_t r = 0; r < found_.size(); ++r)
                if (fixed)
                    for (int64_t i = 0; i < width; ++i) chosen[r].push_back(first + fixed[i]);
                else
                    chosen[r] = found_[r].best(first, width);
            if (!fixed && d_.forward_ms && !deeper(chosen)) break;
            fixed = fixed ? fixed + width : nullptr;
            const int64_t flight = flight_before + width;
            std::vector<uint8_t> sees(static_cast<size_t>(rows_ * width * flight), 0);
            std::vector<float> mixed(static_cast<size_t>(rows_ * width * 2 * hidden_));
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t at = chosen[static_cast<size_t>(r)][static_cast<size_t>(i)];
                    const int64_t above = (at - first) / d_.top_k;  // index in the previous frontier
                    uint8_t* own = sees.data() + (r * width + i) * flight;
                    if (flight_before)
                        std::memcpy(own, seen.data() + (r * width_before + above) * flight_before,
                                    static_cast<size_t>(flight_before));
                    own[flight_before + i] = 1;
                    float* pair = mixed.data() + (r * width + i) * 2 * hidden_;
                    const int64_t token = found_[static_cast<size_t>(r)].tokens[static_cast<size_t>(at)];
                    embed(*d_.head, token, pair);
                    std::memcpy(pair + hidden_, states.data() + (r * width_before + above) * hidden_,
                                sizeof(float) * static_cast<size_t>(hidden_));
                }
            next.resize(static_cast<size_t>(rows_ * width * hidden_));
            extend(mixed.data(), sees.data(), width, flight, level, next.data());
            states.swap(next);
            seen.swap(sees);
            first = static_cast<int64_t>(found_[0].tokens.size());
            children(states.data(), width, chosen, &found_);
            width_before = width, flight_before = flight;
        }
        return finish();
    }

  private:
    // Whether another level after these nodes is worth its time (CostModel.deeper).
    bool deeper(const std::vector<std::vector<int64_t>>& chosen) const {
        double expected = 0.0;
        for (size_t r = 0; r < chosen.size(); ++r)
            for (const int64_t at : chosen[r])
                expected += std::exp(calibrated(found_[r].scores[static_cast<size_t>(at)], r));
        return d_.trust * d_.follow * expected / static_cast<double>(rows_) > d_.rate * d_.level_ms;
    }

    // Adds the most likely next tokens of (rows, width) states; `chosen` are the candidates that the states belong to.
    void children(const float* states, int64_t width, const std::vector<std::vector<int64_t>>& chosen,
                  const std::vector<Candidates>* from) {
        const int64_t count = rows_ * width, vocab = outputs_of(d_.lm), k = d_.top_k;
        const std::unique_ptr<float[]> logits(new float[count * vocab]);
        std::vector<float> logprobs(static_cast<size_t>(count * k));
        std::vector<int64_t> ids(static_cast<size_t>(count * k));
        product(states, d_.lm, logits.get(), count, threads_);
        top(Top{logits.get(), logprobs.data(), ids.data(), vocab, k}, count, threads_);
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t i = 0; i < width; ++i) {
                const int64_t parent = from ? chosen[static_cast<size_t>(r)][static_cast<size_t>(i)] : -1;
                const float score = from ? found_[static_cast<size_t>(r)].scores[static_cast<size_t>(parent)] : 0.0f;
                for (int64_t j = 0; j < k; ++j) {
                    const auto at = static_cast<size_t>((r * width + i) * k + j);
                    const float whole = score + logprobs[at];
                    found_[static_cast<size_t>(r)].add(d_.vocab ? d_.vocab[ids[at]] : ids[at],
                                                       std::isnan(whole) ? -INFINITY : whole, parent);
                }
            }
    }

    void extend(const float* mixed, const uint8_t* seen, int64_t width, int64_t flight, int64_t level, float* out) {
        const int64_t count = rows_ * width;
        std::vector<float> fused(static_cast<size_t>(count * hidden_));
        std::vector<int64_t> positions(static_cast<size_t>(count)), flying(static_cast<size_t>(rows_ * flight));
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t next = p_.past[r];
            for (int64_t i = 0; i < width; ++i) positions[static_cast<size_t>(r * width + i)] = next + level;
            int64_t at = 0;
            for (int64_t l = 0; l <= level; ++l)
                for (int64_t i = 0; i < d_.widths[l]; ++i)
                    flying[static_cast<size_t>(r * flight + at++)] = next + l;
        }
        product(mixed, d_.head->fc, fused.data(), count, threads_);
        Pass pass{};
        pass.states = fused.data(), pass.output = out, pass.cosine = p_.cosine, pass.sine = p_.sine;
        pass.positions = positions.data(), pass.flight_positions = flying.data(), pass.past = p_.past;
        pass.seen = seen, pass.cache = p_.cache, pass.blocks = p_.blocks, pass.form = p_.form;
        pass.rows = rows_, pass.n = width, pass.flight = flight, pass.angles = p_.angles;
        run_layers(*d_.head->stack, pass, places_, threads_);
    }

    // Number of candidates that are worth verifying (CostModel.nodes), at most `most`; 0 if none is.
    int64_t paying(int64_t most) const {
        std::vector<double> gained(static_cast<size_t>(most), 0.0);
        for (const Candidates& row : found_) {
            std::vector<float> sorted(row.scores);
            std::partial_sort(sorted.begin(), sorted.begin() + most, sorted.end(), std::greater<float>());
            double total = 0.0;
            for (int64_t i = 0; i < most; ++i) {
                total += std::exp(static_cast<double>(sorted[static_cast<size_t>(i)]));
                gained[static_cast<size_t>(i)] += total / static_cast<double>(rows_);
            }
        }
        int64_t best = 0;
        double most_net = -static_cast<double>(d_.rate) * d_.forward_ms[0];
        for (int64_t i = 0; i < most; ++i) {
            const double net = d_.trust * gained[static_cast<size_t>(i)] - d_.rate * d_.forward_ms[i + 1];
            if (net > most_net) most_net = net, best = i + 1;
        }
        return best;
    }

    // The log-probability that a path of the head with this score is accepted.
    float calibrated(float score, size_t row) const {
        if (!d_.greedy_knots || !std::isfinite(score)) return score;
        const float warm = p_.warmth[row];
        float found = 0.0f;
        if (warm < 1.0f) found += (1.0f - warm) * on_curve(score, d_.knots, d_.chances, d_.greedy_knots);
        if (warm > 0.0f)
            found += warm * on_curve(score, d_.knots + d_.greedy_knots, d_.chances + d_.greedy_knots, d_.sampled_knots);
        return std::min(found + p_.shift[row], 0.0f);
    }

    // Leaves only the candidates of a fixed tree.
    static void only(Candidates& row, const int64_t* keep, int64_t count) {
        std::vector<float> scores(row.scores.size(), -INFINITY);
        for (int64_t i = 0; i < count; ++i)
            scores[static_cast<size_t>(keep[i])] = row.scores[static_cast<size_t>(keep[i])];
        row.scores.swap(scores);
    }

    // Adds the other source's drafts to a row. A path that the head has too keeps its place, with the better score.
    void join(size_t r) {
        Candidates& row = found_[r];
        const auto own = static_cast<int64_t>(row.tokens.size());
        std::vector<int64_t> place(static_cast<size_t>(p_.others));
        for (int64_t i = 0; i < p_.others; ++i) {
            const auto at = static_cast<int64_t>(r) * p_.others + i;
            const int64_t above = p_.other_parents[at];
            const int64_t parent = above < 0 ? -1 : place[static_cast<size_t>(above)];
            const float score = p_.other_scores[at];
            int64_t same = -1;
            for (int64_t j = 0; j < own && parent < own && same < 0; ++j)
                if (row.parents[static_cast<size_t>(j)] == parent &&
                    row.tokens[static_cast<size_t>(j)] == p_.other_tokens[at])
                    same = j;
            // Every row gets as many candidates, so one that is known takes a place that is never chosen.
            place[static_cast<size_t>(i)] = same < 0 ? own + i : same;
            row.add(p_.other_tokens[at], same < 0 ? score : -INFINITY, parent);
            if (same >= 0) {
                float& known = row.scores[static_cast<size_t>(same)];
                known = std::max(known, score);
            }
        }
    }

    int64_t finish() {
        const auto own = static_cast<int64_t>(found_[0].tokens.size());
        std::vector<std::vector<float>> scores(found_.size());
        for (size_t r = 0; r < found_.size(); ++r) {
            for (float& score : found_[r].scores) score = calibrated(score, r);
            scores[r] = found_[r].scores;
            if (d_.keep && p_.others) only(found_[r], d_.keep, d_.nodes - 1);
            if (p_.others) join(r);
        }
        const bool fixed = d_.keep && !p_.others;
        int64_t count = std::min<int64_t>(d_.nodes - 1, static_cast<int64_t>(found_[0].tokens.size()));
        if (!d_.keep && d_.forward_ms) count = paying(count);
        const int64_t n = count + 1;
        for (int64_t r = 0; r < rows_; ++r) {
            const Candidates& row = found_[static_cast<size_t>(r)];
            const std::vector<int64_t> kept =
                fixed ? std::vector<int64_t>(d_.keep, d_.keep + count) : row.best(0, count);
            float* out = p_.scores + r * n;
            out[0] = -INFINITY;
            std::vector<int64_t> place(row.tokens.size(), -1);
            int64_t *tokens = p_.tokens + r * n, *parents = p_.parents + r * n, *depths = p_.depths + r * n;
            uint8_t* ancestors = p_.ancestors + r * n * n;
            std::memset(ancestors, 0, static_cast<size_t>(n * n));
            tokens[0] = p_.roots[r], parents[0] = -1, depths[0] = 0, ancestors[0] = 1;
            for (int64_t i = 0; i < count; ++i) {
                const auto at = static_cast<size_t>(kept[static_cast<size_t>(i)]);
                const int64_t known = row.parents[at] < 0 ? 0 : place[static_cast<size_t>(row.parents[at])];
                const int64_t above = known < 0 ? 0 : known;
                place[at] = i + 1;
                out[i + 1] = kept[static_cast<size_t>(i)] < own ? scores[static_cast<size_t>(r)][at] : -INFINITY;
                tokens[i + 1] = row.tokens[at], parents[i + 1] = above, depths[i + 1] = depths[above] + 1;
                std::memcpy(ancestors + (i + 1) * n, ancestors + above * n, static_cast<size_t>(n));
                ancestors[(i + 1) * n + i + 1] = 1;
            }
        }
        return n;
    }

    const Draft& d_;
    const Proposal& p_;
    const int threads_;
    const int64_t hidden_, rows_;
    const std::vector<int64_t> first_;
    const Slots places_;
    std::vector<Candidates> found_;
};

}  // namespace
