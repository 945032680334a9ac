#include "layers/latent_softmax.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/dispatch.h"
#include "machine/memory.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

constexpr int64_t kLanes = 16;

// The keys that one query sees, in order.
struct VisibleKeys {
  Cache cache;  // of the sequence
  int64_t first;
  int64_t count;
  const uint8_t* mask;  // over all keys of the sequence; null where the visible ones are neighbours, from `first` on

  int64_t splits() const { return (count + kAttentionSplitKeys - 1) / kAttentionSplitKeys; }
};

VisibleKeys visible_keys(const Cache& cache, const Visibility& visibility, int64_t query) {
  VisibleKeys keys = {cache, 0, 0, nullptr};
  if (visibility.ranges != nullptr) {
    keys.first = std::max<int64_t>(0, visibility.ranges[2 * query]);
    keys.count = std::max<int64_t>(0, std::min<int64_t>(cache.length, visibility.ranges[2 * query + 1]) - keys.first);
  } else {
    keys.mask = visibility.mask + query * cache.length;
    keys.count = cache.length - std::count(keys.mask, keys.mask + cache.length, 0);
  }
  return keys;
}

// Positions of the keys that a mask shows; none where there is no mask.
std::vector<int64_t> shown_keys(const VisibleKeys& keys) {
  std::vector<int64_t> shown;
  if (keys.mask == nullptr) return shown;
  shown.reserve(static_cast<size_t>(keys.count));
  for (int64_t key = 0; key < keys.cache.length; ++key) {
    if (keys.mask[key] != 0) shown.push_back(key);
  }
  return shown;
}

// Pointers to the rows of one split.
struct SplitRows {
  const float* latents[kAttentionSplitKeys];
  const float* ropes[kAttentionSplitKeys];
  int count;

  // None for a split past the last. `shown` is shown_keys().
  SplitRows(const VisibleKeys& keys, const std::vector<int64_t>& shown, int64_t split) {
    const int64_t begin = split * kAttentionSplitKeys;
    count = static_cast<int>(std::clamp<int64_t>(keys.count - begin, 0, kAttentionSplitKeys));
    for (int i = 0; i < count; ++i) {
      const int64_t key = shown.empty() ? keys.first + begin + i : shown[static_cast<size_t>(begin + i)];
      latents[i] = keys.cache.rows.first.row(key);
      ropes[i] = keys.cache.rows.second.row(key);
    }
  }
};

// Part `part` of `parts` of n things, of which `step` stay together.
struct Span {
  int first;
  int end;
};

Span span_of(int n, int step, int64_t part, int64_t parts) {
  const int64_t steps = (n + step - 1) / step;
  const auto bound = [&](int64_t p) { return static_cast<int>(std::min<int64_t>(n, steps * p / parts * step)); };
  return {bound(part), bound(part + 1)};
}

// Groups of 16 heads that go over the keys together: those of a token, one after the other, then those of the next. All
// see the same keys from the first on, some fewer than others.
struct Bundle {
  int64_t first_group = 0;  // counted over all tokens
  int groups = 0;
  int64_t counts[kAttentionGroups];  // of keys that each sees
  VisibleKeys keys;                  // of the group that sees most
};

bool see_the_same(const VisibleKeys& a, const VisibleKeys& b) {
  return a.cache.rows.first.data == b.cache.rows.first.data && a.first == b.first && a.mask == nullptr &&
         b.mask == nullptr;
}

std::vector<Bundle> bundles_of(const TokenRange& tokens, int64_t groups_per_token, int64_t together,
                               const Cache* caches, const Visibility& visibility) {
  std::vector<Bundle> bundles;
  for (int64_t t = 0; t < tokens.count; ++t) {
    const int64_t query = tokens.first + t;
    const VisibleKeys keys = visible_keys(caches[query / tokens.per_sequence], visibility, query);
    for (int64_t g = 0; g < groups_per_token; ++g) {
      const bool joins =
          !bundles.empty() && bundles.back().groups < together && (g > 0 || see_the_same(bundles.back().keys, keys));
      if (!joins) {
        bundles.emplace_back();
        bundles.back().first_group = t * groups_per_token + g;
      }
      Bundle& bundle = bundles.back();
      bundle.counts[bundle.groups++] = keys.count;
      if (!joins || keys.count > bundle.keys.count) bundle.keys = keys;
    }
  }
  return bundles;
}

int64_t splits_of(const std::vector<Bundle>& bundles) {
  int64_t splits = 0;
  for (const Bundle& bundle : bundles) splits += bundle.keys.splits();
  return splits;
}

// Keys that one task scores at least: whole tiles of 6 and of 8, and for 16 heads about 10 us.
constexpr int kPartKeys = 24;

// Into how many parts each split is divided for `wanted` tasks, bundles having one group each; one where keys are few.
int64_t parts_of_split(const std::vector<Bundle>& bundles, int64_t wanted) {
  int64_t most_keys = 0;
  for (const Bundle& bundle : bundles) most_keys = std::max(most_keys, bundle.keys.count);
  const int64_t splits = std::max<int64_t>(1, splits_of(bundles));
  const int64_t most_parts = (std::min<int64_t>(most_keys, kAttentionSplitKeys) + kPartKeys - 1) / kPartKeys;
  return std::clamp<int64_t>((wanted + splits - 1) / splits, 1, std::max<int64_t>(1, most_parts));
}

// Some of the 16 heads of a group.
struct Heads {
  int64_t first;
  int64_t count;
};
constexpr Heads kAllHeads = {0, kLanes};

void clear_state(float* state, const Heads& heads, int64_t latent_dim) {
  std::fill_n(state, kLanes, -INFINITY);
  std::fill_n(state + kLanes, kLanes + heads.count * latent_dim, 0.0f);
}

// A bundle over a split.
struct SplitTask {
  size_t bundle;
  int64_t split;
  int64_t state;  // where those of its groups begin, among the states of all splits
};

class LatentAttention {
 public:
  LatentAttention(const LatentDims& dims, const float* queries, float* contexts)
      : dims_(dims), queries_(queries), contexts_(contexts) {}

  int64_t groups_per_token() const { return (dims_.heads + kLanes - 1) / kLanes; }

  // Each task takes one bundle over all of its keys.
  void bundles_in_parallel(const std::vector<Bundle>& bundles) const {
    parallel_for(static_cast<int64_t>(bundles.size()), [&](int64_t task) {
      const Bundle& bundle = bundles[static_cast<size_t>(task)];
      const ScratchBuffer buffer(
          static_cast<size_t>(bundle.groups * (query_floats() + 2 * state_floats() + kScratchFloats)) * sizeof(float));
      float* queries = buffer.floats();
      float* states = queries + bundle.groups * query_floats();
      float* split_states = states + bundle.groups * state_floats();
      float* scratch = split_states + bundle.groups * state_floats();
      for (int g = 0; g < bundle.groups; ++g) {
        transpose_queries(bundle.first_group + g, {0, static_cast<int>(dims_.latent_dim + dims_.rope_dim)},
                          queries + g * query_floats());
        clear_state(states + g * state_floats(), kAllHeads, dims_.latent_dim);
      }
      const std::vector<int64_t> shown = shown_keys(bundle.keys);
      SplitRows rows(bundle.keys, shown, 0);
      for (int64_t split = 0; split < bundle.keys.splits(); ++split) {
        const SplitRows next(bundle.keys, shown, split + 1);
        attend(bundle, queries, split, rows, next, scratch, split_states);
        for (int g = 0; g < bundle.groups; ++g) {
          if (bundle.counts[g] <= split * kAttentionSplitKeys) continue;
          merge(kAllHeads, split_states + g * state_floats(), states + g * state_floats());
        }
        rows = next;
      }
      for (int g = 0; g < bundle.groups; ++g) {
        write_context(bundle.first_group + g, kAllHeads, states + g * state_floats(), bundle.counts[g] > 0);
      }
    });
  }

  // Each task takes one bundle over one split, or with parts > 1, bundles having one group each, first some of its keys
  // and then some of its columns; splits are then merged in the same order as above.
  void splits_in_parallel(const std::vector<Bundle>& bundles, int64_t groups, int64_t parts) const {
    struct Group {
      int64_t keys;
      int64_t first_state;
      int64_t stride;  // states from one split to the next
    };
    std::vector<SplitTask> tasks;
    std::vector<Group> all_groups;
    std::vector<std::vector<int64_t>> shown;  // per bundle
    int64_t state_count = 0;
    int64_t most_splits = 0;
    for (const Bundle& bundle : bundles) {
      for (int g = 0; g < bundle.groups; ++g) {
        all_groups.push_back({bundle.counts[g], state_count + g, bundle.groups});
      }
      shown.push_back(shown_keys(bundle.keys));
      state_count += bundle.keys.splits() * bundle.groups;
      most_splits = std::max(most_splits, bundle.keys.splits());
    }
    // Bundles of a token one after the other, so that the keys of a split come from memory once.
    for (int64_t split = 0; split < most_splits; ++split) {
      for (size_t b = 0; b < bundles.size(); ++b) {
        if (split >= bundles[b].keys.splits()) continue;
        const Group& first_group = all_groups[static_cast<size_t>(bundles[b].first_group)];
        tasks.push_back({b, split, first_group.first_state + split * bundles[b].groups});
      }
    }
    const ScratchBuffer queries(static_cast<size_t>(groups * query_floats()) * sizeof(float));
    const int64_t width = dims_.latent_dim + dims_.rope_dim;
    parallel_for(groups * parts, [&](int64_t i) {
      const int64_t group = i / parts;
      transpose_queries(group, span_of(static_cast<int>(width), 16, i % parts, parts),
                        queries.floats() + group * query_floats());
    });
    const ScratchBuffer split_states(static_cast<size_t>(state_count * state_floats()) * sizeof(float));
    const auto rows_of = [&](const SplitTask& t) {
      return SplitRows(bundles[t.bundle].keys, shown[t.bundle], t.split);
    };
    if (parts > 1) {
      attend_in_parts(tasks, parts, rows_of, queries.floats(), split_states.floats());
    } else {
      parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const SplitTask& task = tasks[static_cast<size_t>(i)];
        const Bundle& bundle = bundles[task.bundle];
        const ScratchBuffer scratch(static_cast<size_t>(bundle.groups * kScratchFloats) * sizeof(float));
        // A thread's next task is mostly the next one.
        const SplitTask& after = tasks[std::min(static_cast<size_t>(i) + 1, tasks.size() - 1)];
        attend(bundle, queries.floats() + bundle.first_group * query_floats(), task.split, rows_of(task),
               rows_of(after), scratch.floats(), split_states.floats() + task.state * state_floats());
      });
    }
    // At 4,096 keys the splits of a token are 1 MB: merged by one thread they would hold up the others. A few are
    // merged sooner than another thread gets to it.
    constexpr size_t kFewSplits = 4;
    const int64_t heads_per_task = tasks.size() > kFewSplits * bundles.size() ? 2 : kLanes;
    const int64_t tasks_per_group = kLanes / heads_per_task;
    parallel_for(groups * tasks_per_group, [&](int64_t task) {
      const int64_t i = task / tasks_per_group;
      const Group& group = all_groups[static_cast<size_t>(i)];
      const Heads heads = {task % tasks_per_group * heads_per_task, heads_per_task};
      const ScratchBuffer state(static_cast<size_t>(state_floats()) * sizeof(float));
      clear_state(state.floats(), heads, dims_.latent_dim);
      for (int64_t split = 0; split * kAttentionSplitKeys < group.keys; ++split) {
        merge(heads, split_states.floats() + (group.first_state + split * group.stride) * state_floats(),
              state.floats());
      }
      write_context(i, heads, state.floats(), group.keys > 0);
    });
  }

 private:
  static constexpr int64_t kScratchFloats = kAttentionSplitKeys * kLanes;

  int64_t query_floats() const { return (dims_.latent_dim + dims_.rope_dim) * kLanes; }
  int64_t state_floats() const { return attention_state_floats(dims_.latent_dim); }

  // Some columns of a group's queries, lane = head, scaled; heads past the last are zero.
  void transpose_queries(int64_t group, Span columns, float* out) const {
    const int64_t width = dims_.latent_dim + dims_.rope_dim;
    const int64_t first_head = group % groups_per_token() * kLanes;
    const int64_t heads = std::min(kLanes, dims_.heads - first_head);
    const float* queries = queries_ + (group / groups_per_token() * dims_.heads + first_head) * width;
    if (heads < kLanes) std::fill(out + columns.first * kLanes, out + columns.end * kLanes, 0.0f);
    for (int64_t h = 0; h < heads; ++h) {
      const float* q = queries + h * width;
      for (int64_t i = columns.first; i < columns.end; ++i) out[i * kLanes + h] = q[i] * dims_.softmax_scale;
    }
  }

  AttentionSplitArgs args_of(const SplitRows& rows, int first_key) const {
    AttentionSplitArgs args{};
    args.latents = rows.latents + first_key;
    args.ropes = rows.ropes + first_key;
    args.latent_dim = static_cast<int>(dims_.latent_dim);
    args.rope_dim = static_cast<int>(dims_.rope_dim);
    return args;
  }

  // States of splits of bundles of one group each, so that bundle i has queries i. The keys are read twice, once for
  // each
  // loop: with 100 keys of V3 and 64 threads one waits 28 us for the two, and 196 for a task of 4 groups and all keys
  // (Zen 3).
  template <typename RowsOf>
  void attend_in_parts(const std::vector<SplitTask>& tasks, int64_t parts, const RowsOf& rows_of, const float* queries,
                       float* states) const {
    constexpr int kPartColumns = 32;  // whole tiles of one and of two vectors
    const ScratchBuffer scores(tasks.size() * kScratchFloats * sizeof(float));
    const int64_t pieces = static_cast<int64_t>(tasks.size()) * parts;
    parallel_for(pieces, [&](int64_t piece) {
      const int64_t i = piece / parts;
      const SplitTask& task = tasks[static_cast<size_t>(i)];
      const SplitRows rows = rows_of(task);
      const Span keys = span_of(rows.count, kPartKeys, piece % parts, parts);
      const int count = keys.end - keys.first;
      if (count == 0) return;
      AttentionSplitArgs args = args_of(rows, keys.first);
      args.groups = 1;
      args.query = queries + task.bundle * query_floats();
      args.keys = &count;
      args.scores = scores.floats() + i * kScratchFloats + keys.first * kLanes;
      kernels_.score_split(args);
    });
    parallel_for(pieces, [&](int64_t piece) {
      const int64_t i = piece / parts;
      const SplitTask& task = tasks[static_cast<size_t>(i)];
      const SplitRows rows = rows_of(task);
      const Span columns = span_of(static_cast<int>(dims_.latent_dim), kPartColumns, piece % parts, parts);
      if (columns.first == columns.end) return;
      const ScratchBuffer weights(kScratchFloats * sizeof(float));
      AttentionSplitArgs args = args_of(rows, 0);
      args.groups = 1;
      args.keys = &rows.count;
      args.scores = scores.floats() + i * kScratchFloats;
      args.weights = weights.floats();
      args.states = states + task.state * state_floats();
      kernels_.sum_split(args, columns.first, columns.end);
    });
  }

  // states[groups] of one split of a bundle; those of groups that see none of its keys are left alone.
  void attend(const Bundle& bundle, const float* queries, int64_t split, const SplitRows& rows, const SplitRows& next,
              float* scratch, float* states) const {
    int counts[kAttentionGroups];
    bool all_see_keys = true;
    for (int g = 0; g < bundle.groups; ++g) {
      const int64_t left = bundle.counts[g] - split * kAttentionSplitKeys;
      counts[g] = static_cast<int>(std::clamp<int64_t>(left, 0, kAttentionSplitKeys));
      all_see_keys = all_see_keys && counts[g] > 0;
    }
    AttentionSplitArgs args = args_of(rows, 0);
    args.groups = all_see_keys ? bundle.groups : 1;
    args.latents_ahead = next.latents;
    args.ropes_ahead = next.ropes;
    args.keys_ahead = next.count;
    args.scores = scratch;
    args.weights = scratch;
    for (int g = 0; g < bundle.groups; g += args.groups) {
      if (counts[g] == 0) continue;
      args.query = queries + g * query_floats();
      args.keys = counts + g;
      args.states = states + g * state_floats();
      kernels_.score_split(args);
      kernels_.sum_split(args, 0, args.latent_dim);
    }
  }

  // Merges those heads of a split into a state that holds no others.
  void merge(const Heads& heads, const float* split, float* state) const {
    kernels_.merge_split(split, static_cast<int>(dims_.latent_dim), static_cast<int>(heads.first),
                         static_cast<int>(heads.count), state);
  }

  void write_context(int64_t group, const Heads& heads, const float* state, bool sees_keys) const {
    const int64_t first_head = group % groups_per_token() * kLanes;
    float* out = contexts_ + (group / groups_per_token() * dims_.heads + first_head) * dims_.latent_dim;
    const int64_t end = std::min(heads.first + heads.count, dims_.heads - first_head);
    for (int64_t h = heads.first; h < end; ++h) {
      const float* context = state + 2 * kLanes + (h - heads.first) * dims_.latent_dim;
      const float sum = sees_keys ? state[kLanes + h] : 1.0f;  // the context of none is 0
      for (int64_t i = 0; i < dims_.latent_dim; ++i) out[h * dims_.latent_dim + i] = context[i] / sum;
    }
  }

  const LatentDims& dims_;
  const float* queries_;
  float* contexts_;
  const KernelTable& kernels_ = kernels();
};

}  // namespace

void attend_latents(const LatentDims& dims, const float* queries, const TokenRange& tokens, const Cache* caches,
                    const Visibility& visibility, float* contexts) {
  const LatentAttention attention(dims, queries, contexts);
  const int64_t groups = tokens.count * attention.groups_per_token();
  // Below it the states of all splits take little memory: 64 x 32 x 33 KB at 4,096 keys.
  constexpr int64_t kFewGroups = 64;
  constexpr int64_t kTasksPerThread = 4;  // where there is enough for so many
  const int64_t wanted = kTasksPerThread * thread_count();
  if (groups < kFewGroups) {
    const auto bundles_of_at_most = [&](int64_t together) {
      return bundles_of(tokens, attention.groups_per_token(), together, caches, visibility);
    };
    const std::vector<Bundle> bundles = bundles_of_at_most(kAttentionGroups);
    if (thread_count() > 1 && splits_of(bundles) < wanted) {
      const std::vector<Bundle> singles = bundles_of_at_most(1);
      const int64_t parts = parts_of_split(singles, wanted);
      if (parts > 1) return attention.splits_in_parallel(singles, groups, parts);
    }
    attention.splits_in_parallel(bundles, groups, 1);
    return;
  }
  const int64_t together = std::clamp<int64_t>(groups / wanted, 1, kAttentionGroups);
  attention.bundles_in_parallel(bundles_of(tokens, attention.groups_per_token(), together, caches, visibility));
}

}  // namespace tkt
