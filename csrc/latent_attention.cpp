#include "latent_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "thread_pool.h"

namespace tkt {
namespace {

constexpr int64_t kLanes = 16;

// The keys that one query sees, in order.
struct VisibleKeys {
  const float* latents;  // rows of the sequence
  const float* ropes;
  int64_t first;
  int64_t count;
  const uint8_t* mask;  // over all keys of the sequence; null where the visible ones are neighbours, from `first` on

  int64_t splits() const { return (count + kAttentionSplitKeys - 1) / kAttentionSplitKeys; }
};

VisibleKeys visible_keys(const LatentCache& cache, const Visibility& visibility, int64_t sequence, int64_t query) {
  VisibleKeys keys = {cache.latents + sequence * cache.latent_batch_stride,
                      cache.ropes + sequence * cache.rope_batch_stride, 0, 0, nullptr};
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
std::vector<int64_t> shown_keys(const VisibleKeys& keys, int64_t length) {
  std::vector<int64_t> shown;
  if (keys.mask == nullptr) return shown;
  shown.reserve(static_cast<size_t>(keys.count));
  for (int64_t key = 0; key < length; ++key) {
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
  SplitRows(const LatentCache& cache, const VisibleKeys& keys, const std::vector<int64_t>& shown, int64_t split) {
    const int64_t begin = split * kAttentionSplitKeys;
    count = static_cast<int>(std::clamp<int64_t>(keys.count - begin, 0, kAttentionSplitKeys));
    for (int i = 0; i < count; ++i) {
      const int64_t key = shown.empty() ? keys.first + begin + i : shown[static_cast<size_t>(begin + i)];
      latents[i] = keys.latents + key * cache.latent_stride;
      ropes[i] = keys.ropes + key * cache.rope_stride;
    }
  }
};

// Groups of 16 heads that go over the keys together: those of a token, one after the other, then those of the next. All
// see the same keys from the first on, some fewer than others.
struct Bundle {
  int64_t first_group = 0;  // counted over all tokens
  int groups = 0;
  int64_t counts[kAttentionGroups];  // of keys that each sees
  VisibleKeys keys;                  // of the group that sees most
};

bool see_the_same(const VisibleKeys& a, const VisibleKeys& b) {
  return a.latents == b.latents && a.first == b.first && a.mask == nullptr && b.mask == nullptr;
}

std::vector<Bundle> bundles_of(const TokenRange& tokens, int64_t groups_per_token, int64_t together,
                               const LatentCache& cache, const Visibility& visibility) {
  std::vector<Bundle> bundles;
  for (int64_t t = 0; t < tokens.count; ++t) {
    const int64_t query = tokens.first + t;
    const VisibleKeys keys = visible_keys(cache, visibility, query / tokens.per_sequence, query);
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

class LatentAttention {
 public:
  LatentAttention(const LatentDims& dims, const float* queries, const LatentCache& cache, float* contexts)
      : dims_(dims), queries_(queries), cache_(cache), contexts_(contexts) {}

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
        transpose_queries(bundle.first_group + g, queries + g * query_floats());
        clear_state(states + g * state_floats(), kAllHeads, dims_.latent_dim);
      }
      const std::vector<int64_t> shown = shown_keys(bundle.keys, cache_.length);
      SplitRows rows(cache_, bundle.keys, shown, 0);
      for (int64_t split = 0; split < bundle.keys.splits(); ++split) {
        const SplitRows next(cache_, bundle.keys, shown, split + 1);
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

  // Each task takes one bundle over one split; splits are then merged in the same order as above.
  void splits_in_parallel(const std::vector<Bundle>& bundles, int64_t groups) const {
    struct Task {
      size_t bundle;
      int64_t split;
      int64_t state;  // where those of its groups begin, in `split_states`
    };
    struct Group {
      int64_t keys;
      int64_t first_state;
      int64_t stride;  // states from one split to the next
    };
    std::vector<Task> tasks;
    std::vector<Group> all_groups;
    std::vector<std::vector<int64_t>> shown;  // per bundle
    int64_t state_count = 0;
    int64_t most_splits = 0;
    for (const Bundle& bundle : bundles) {
      for (int g = 0; g < bundle.groups; ++g) {
        all_groups.push_back({bundle.counts[g], state_count + g, bundle.groups});
      }
      shown.push_back(shown_keys(bundle.keys, cache_.length));
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
    parallel_for(groups, [&](int64_t i) { transpose_queries(i, queries.floats() + i * query_floats()); });
    const ScratchBuffer split_states(static_cast<size_t>(state_count * state_floats()) * sizeof(float));
    parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      const Task& task = tasks[static_cast<size_t>(i)];
      const Bundle& bundle = bundles[task.bundle];
      const ScratchBuffer scratch(static_cast<size_t>(bundle.groups * kScratchFloats) * sizeof(float));
      const auto rows_of = [&](const Task& t) {
        return SplitRows(cache_, bundles[t.bundle].keys, shown[t.bundle], t.split);
      };
      // A thread's next task is mostly the next one.
      const Task& after = tasks[std::min(static_cast<size_t>(i) + 1, tasks.size() - 1)];
      attend(bundle, queries.floats() + bundle.first_group * query_floats(), task.split, rows_of(task), rows_of(after),
             scratch.floats(), split_states.floats() + task.state * state_floats());
    });
    // At 4,096 keys the splits of a token are 1 MB: merged by one thread they would hold up the others. A few are merged
    // sooner than another thread gets to it.
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

  // Queries of a group, lane = head, scaled; heads past the last are zero.
  void transpose_queries(int64_t group, float* out) const {
    const int64_t width = dims_.latent_dim + dims_.rope_dim;
    const int64_t first_head = group % groups_per_token() * kLanes;
    const int64_t heads = std::min(kLanes, dims_.heads - first_head);
    const float* queries = queries_ + (group / groups_per_token() * dims_.heads + first_head) * width;
    if (heads < kLanes) std::fill_n(out, width * kLanes, 0.0f);
    for (int64_t h = 0; h < heads; ++h) {
      const float* q = queries + h * width;
      for (int64_t i = 0; i < width; ++i) out[i * kLanes + h] = q[i] * dims_.softmax_scale;
    }
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
    AttentionSplitArgs args;
    args.groups = all_see_keys ? bundle.groups : 1;
    args.latents = rows.latents;
    args.ropes = rows.ropes;
    args.latents_ahead = next.latents;
    args.ropes_ahead = next.ropes;
    args.keys_ahead = next.count;
    args.latent_dim = static_cast<int>(dims_.latent_dim);
    args.rope_dim = static_cast<int>(dims_.rope_dim);
    args.weights = scratch;
    for (int g = 0; g < bundle.groups; g += args.groups) {
      if (counts[g] == 0) continue;
      args.query = queries + g * query_floats();
      args.keys = counts + g;
      args.states = states + g * state_floats();
      kernels_.attend_split(args);
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
  const LatentCache& cache_;
  float* contexts_;
  const KernelTable& kernels_ = kernels();
};

}  // namespace

void attend_latents(const LatentDims& dims, const float* queries, const TokenRange& tokens, const LatentCache& cache,
                    const Visibility& visibility, float* contexts) {
  const LatentAttention attention(dims, queries, cache, contexts);
  const int64_t groups = tokens.count * attention.groups_per_token();
  // Below it the states of all splits take little memory: 64 x 32 x 33 KB at 4,096 keys.
  constexpr int64_t kFewGroups = 64;
  if (groups < kFewGroups) {
    const std::vector<Bundle> bundles =
        bundles_of(tokens, attention.groups_per_token(), kAttentionGroups, cache, visibility);
    attention.splits_in_parallel(bundles, groups);
    return;
  }
  // Four tasks for a thread, if need be of fewer groups.
  const int64_t together = std::clamp<int64_t>(groups / (4 * thread_count()), 1, kAttentionGroups);
  attention.bundles_in_parallel(bundles_of(tokens, attention.groups_per_token(), together, cache, visibility));
}

}  // namespace tkt
