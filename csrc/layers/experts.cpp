#include "layers/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "kernels/dispatch.h"
#include "layers/linear.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// Prompts are worked through in pieces of this many tokens, which bounds the intermediate results (V3: 512 tokens x 9
// experts x 2,048 floats = 38 MB) while every expert still sees enough tokens to amortize reading its weights.
constexpr int64_t kChunkTokens = 512;
// Up to as many, experts have mostly one token each, and reading their weights takes longer than multiplying.
constexpr int64_t kFewTokens = 32;
// Tokens per product, at most: an expert's tokens are divided evenly. The kernels unpack a panel once for all of them.
constexpr int64_t kTileTokens = 96;

// The tokens one expert works on.
struct ExpertRun {
  const ExpertWeights* experts;
  int64_t index;
  const int64_t* tokens;  // [count] ascending
  const float* weights;   // [count]; null: all 1
  int64_t count;
  int64_t first_row;  // of this run in the intermediate results
};

// Which experts work on what: routed ones ascending, then the shared one.
class ExpertRuns {
 public:
  // routed or shared may be null.
  ExpertRuns(const ExpertWeights* routed, const Routing& routing, const ExpertWeights* shared, int64_t tokens) {
    const auto& [indices, weights, top_k] = routing;
    // Sorted by expert and then by token, in one list: one for each of 256 experts, and the like below, cost a token of
    // V3 some 10 us a layer.
    std::vector<int64_t> order;
    const int64_t choices = routed != nullptr ? tokens * top_k : 0;
    order.reserve(static_cast<size_t>(choices));
    for (int64_t choice = 0; choice < choices; ++choice) {
      if (indices[choice] != kNoExpert) order.push_back(choice);
    }
    const auto chosen = static_cast<int64_t>(order.size());
    tokens_.resize(static_cast<size_t>(chosen + (shared != nullptr ? tokens : 0)));
    weights_.resize(static_cast<size_t>(chosen));
    std::sort(order.begin(), order.end(), [indices = indices](int64_t a, int64_t b) {
      return indices[a] != indices[b] ? indices[a] < indices[b] : a < b;
    });
    runs_.reserve(static_cast<size_t>(std::min(chosen, routed != nullptr ? routed->count() : 0) + 1));
    for (int64_t i = 0; i < chosen; ++i) {
      const int64_t choice = order[static_cast<size_t>(i)];
      tokens_[static_cast<size_t>(i)] = choice / top_k;
      weights_[static_cast<size_t>(i)] = weights[choice];
      if (runs_.empty() || runs_.back().index != indices[choice]) {
        runs_.push_back({routed, indices[choice], tokens_.data() + i, weights_.data() + i, 0, i});
      }
      ++runs_.back().count;
    }
    if (shared != nullptr) {
      std::iota(tokens_.begin() + chosen, tokens_.end(), 0);
      runs_.push_back({shared, 0, tokens_.data() + chosen, nullptr, tokens, chosen});
    }
    for (const ExpertRun& run : runs_) widest_ = std::max(widest_, run.experts->intermediate());
  }
  ExpertRuns(const ExpertRuns&) = delete;
  ExpertRuns& operator=(const ExpertRuns&) = delete;

  const std::vector<ExpertRun>& all() const { return runs_; }
  // Of buffers with a row for each token of each run.
  int64_t rows() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t widest() const { return widest_; }

 private:
  std::vector<int64_t> tokens_;
  std::vector<float> weights_;
  std::vector<ExpertRun> runs_;
  int64_t widest_ = 0;
};

// x quantized once for each format that some gate or up matrix wants.
class InputFormats {
 public:
  InputFormats(const std::vector<ExpertRun>& runs, const float* x, int64_t tokens) {
    for (const ExpertRun& run : runs) {
      for (const PackedMatrix* w : {&run.experts->gate(), &run.experts->up()}) {
        std::unique_ptr<Activations>& rows = formats_[static_cast<int>(w->info().activation)];
        if (rows == nullptr) {
          rows = std::make_unique<Activations>(w->info().activation, x, tokens, w->cols(), w->cols());
        }
      }
    }
  }
  const Activations& of(const PackedMatrix& w) const { return *formats_[static_cast<int>(w.info().activation)]; }

 private:
  std::unique_ptr<Activations> formats_[kActivationFormats];
};

int64_t tiles_of(const ExpertRun& run) { return (run.count + kTileTokens - 1) / kTileTokens; }

// Some of its tokens.
struct Tile {
  int64_t first;
  int count;
};

Tile tile_of(const ExpertRun& run, int64_t tile) {
  const int64_t first = run.count * tile / tiles_of(run);
  return {first, static_cast<int>(run.count * (tile + 1) / tiles_of(run) - first)};
}

// Pieces of (run, panel, token tile) laid end to end.
struct Piece {
  const ExpertRun* run;
  int64_t panel;
  Tile tokens;
};

class PieceIndex {
 public:
  void add(const ExpertRun& run, PanelRange panels) {
    if (panels.count() == 0) return;
    total_ += panels.count() * tiles_of(run);
    entries_.push_back({&run, panels, total_});
  }
  int64_t total() const { return total_; }
  Piece at(int64_t position) const {
    const auto entry = std::upper_bound(entries_.begin(), entries_.end(), position,
                                        [](int64_t value, const Entry& e) { return value < e.end; });
    const int64_t tiles = tiles_of(*entry->run);
    const int64_t offset = position - (entry->end - entry->panels.count() * tiles);
    // Tiles of one panel follow each other: the panel is read from memory once.
    return {entry->run, entry->panels.first + offset / tiles, tile_of(*entry->run, offset % tiles)};
  }

 private:
  struct Entry {
    const ExpertRun* run;
    PanelRange panels;
    int64_t end;
  };

  std::vector<Entry> entries_;
  int64_t total_ = 0;
};

void dot_pair(const KernelTable& table, const PackedMatrix& a, const PackedMatrix& b, int64_t index, int64_t panel,
              const uint8_t* const* rows_a, const uint8_t* const* rows_b, int tokens, float* tile) {
  if (a.info().type == b.info().type) {
    table.dot[static_cast<int>(a.info().type)](
        {{a.panel(index, panel), b.panel(index, panel)}, 2, a.blocks(), rows_a, tokens, tile, a.prefetch()});
    return;
  }
  // Mixed types ("UD" files): two single panels; the second lands in columns 16..31 of the tile.
  table.dot[static_cast<int>(a.info().type)](
      {{a.panel(index, panel), nullptr}, 1, a.blocks(), rows_a, tokens, tile, a.prefetch()});
  table.dot[static_cast<int>(b.info().type)](
      {{b.panel(index, panel), nullptr}, 1, b.blocks(), rows_b, tokens, tile + kPanelRows, b.prefetch()});
}

void gate_and_up(const KernelTable& table, const InputFormats& inputs, const Piece& piece, int64_t stride,
                 float* intermediate) {
  alignas(64) float tile[kTileTokens * 32];
  const uint8_t* gate_rows[kTileTokens];
  const uint8_t* up_rows[kTileTokens];
  const ExpertWeights& experts = *piece.run->experts;
  for (int t = 0; t < piece.tokens.count; ++t) {
    const int64_t token = piece.run->tokens[piece.tokens.first + t];
    gate_rows[t] = inputs.of(experts.gate()).row(token);
    up_rows[t] = inputs.of(experts.up()).row(token);
  }
  dot_pair(table, experts.gate(), experts.up(), piece.run->index, piece.panel, gate_rows, up_rows, piece.tokens.count,
           tile);
  const int64_t column = piece.panel * kPanelRows;
  const int64_t rows = std::min<int64_t>(kPanelRows, experts.intermediate() - column);
  for (int t = 0; t < piece.tokens.count; ++t) {
    float* out = intermediate + (piece.run->first_row + piece.tokens.first + t) * stride + column;
    table.swiglu(tile + t * 32, tile + t * 32 + kPanelRows, rows, out);
  }
}

// One run's contribution to two output panels.
void add_down(const KernelTable& table, const ExpertRun& run, const Activations& activations, int64_t pair,
              int64_t hidden, float* out) {
  alignas(64) float tile[kTileTokens * 32];
  const PackedMatrix& w = run.experts->down();
  const int64_t column = pair * 2 * kPanelRows;
  const int64_t columns = std::min<int64_t>(2 * kPanelRows, hidden - column);
  DotArgs args;
  args.panel_count = static_cast<int>(std::min<int64_t>(2, w.panels() - pair * 2));
  for (int p = 0; p < args.panel_count; ++p) args.panels[p] = w.panel(run.index, pair * 2 + p);
  args.blocks = w.blocks();
  args.prefetch = w.prefetch();
  args.out = tile;
  for (int64_t i = 0; i < tiles_of(run); ++i) {
    const Tile tokens = tile_of(run, i);
    args.tokens = tokens.count;
    args.activations = activations.rows() + tokens.first;
    table.dot[static_cast<int>(w.info().type)](args);
    for (int t = 0; t < args.tokens; ++t) {
      const int64_t slot = tokens.first + t;
      const float weight = run.weights == nullptr ? 1.0f : run.weights[slot];
      table.add_scaled(tile + t * 32, weight, columns, out + run.tokens[slot] * hidden + column);
    }
  }
}

// Some pairs of output panels: all runs in order, so that each output is summed by one thread in one order.
void down(const KernelTable& table, const std::vector<ExpertRun>& runs, const std::vector<Activations>& activations,
          PanelRange pairs, int64_t hidden, int64_t tokens, float* out) {
  const int64_t column = pairs.first * 2 * kPanelRows;
  const int64_t columns = std::min<int64_t>(pairs.count() * 2 * kPanelRows, hidden - column);
  for (int64_t token = 0; token < tokens; ++token) {
    std::memset(out + token * hidden + column, 0, sizeof(float) * static_cast<size_t>(columns));
  }
  for (size_t r = 0; r < runs.size(); ++r) {
    for (int64_t pair = pairs.first; pair < pairs.end; ++pair) {
      add_down(table, runs[r], activations[r], pair, hidden, out);
    }
  }
}

// Several pairs of panels take an expert's activations from L2 one after the other (all experts' are 14 MB for 512
// tokens of V3): the first of them takes 1.9 times as long as the others. Two cores of Zen 5 take 355 ms for 512 tokens
// with 1 pair, 341 with 4, 328 with 8, 322 with 16. Enough groups stay for every thread.
int64_t down_pairs_at_once(const PackedMatrix& w) {
  constexpr int64_t kMostPairs = 16;
  constexpr int64_t kGroupsPerThread = 8;
  const int64_t pairs = (w.panels() + 1) / 2;
  return std::clamp<int64_t>(pairs / (kGroupsPerThread * thread_count()), 1, kMostPairs);
}

// The runs' intermediate results in the formats of their down matrices: row r of all is row r - first_row of its run.
class DownInputs {
 public:
  // Row r of the results is at intermediate + r * stride, once prepare(r, n, that row), n being its width, was called,
  // on any thread.
  template <typename Prepare>
  DownInputs(const std::vector<ExpertRun>& runs, float* intermediate, int64_t rows, int64_t stride,
             const Prepare& prepare) {
    std::vector<size_t> run_of_row;
    run_of_row.reserve(static_cast<size_t>(rows));
    of_runs_.reserve(runs.size());
    for (size_t r = 0; r < runs.size(); ++r) {
      const PackedMatrix& w = runs[r].experts->down();
      of_runs_.emplace_back(Activations::Deferred{}, w.info().activation, intermediate + runs[r].first_row * stride,
                            runs[r].count, w.cols(), stride);
      run_of_row.resize(run_of_row.size() + static_cast<size_t>(runs[r].count), r);
    }
    for_each_row(rows, stride, [&](int64_t row) {
      const size_t r = run_of_row[static_cast<size_t>(row)];
      prepare(row, runs[r].experts->intermediate(), intermediate + row * stride);
      of_runs_[r].quantize_row(row - runs[r].first_row);
    });
  }
  const std::vector<Activations>& of_runs() const { return of_runs_; }

 private:
  std::vector<Activations> of_runs_;
};

// out[token] = the sum of its rows of results[rows][hidden], run by run, each times the run's weight.
void sum_runs(const KernelTable& table, const ExpertRuns& runs, const float* results, int64_t hidden, int64_t tokens,
              float* out) {
  constexpr int64_t kColumns = 1024;
  const int64_t pieces = (hidden + kColumns - 1) / kColumns;
  for_each_row(pieces, runs.rows() * std::min(hidden, kColumns), [&](int64_t piece) {
    const int64_t column = piece * kColumns;
    const int64_t columns = std::min(kColumns, hidden - column);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memset(out + t * hidden + column, 0, sizeof(float) * static_cast<size_t>(columns));
    }
    for (const ExpertRun& run : runs.all()) {
      for (int64_t slot = 0; slot < run.count; ++slot) {
        const float weight = run.weights == nullptr ? 1.0f : run.weights[slot];
        const float* row = results + (run.first_row + slot) * hidden;
        table.add_scaled(row + column, weight, columns, out + run.tokens[slot] * hidden + column);
      }
    }
  });
}

// Few tokens are bound by reading the weights, which is fastest in long stretches: matrix by matrix, each thread some
// neighbouring panels. Gate and up panels in turns, or an output panel of one expert after the other, break off after
// 15 to 130 KB, and the prefetchers begin anew: one V3 layer, one token, two cores of Zen 4 37 GB/s, and 44 like this.
void run_few(const ExpertRuns& runs, const float* x, int64_t tokens, float* out) {
  const KernelTable& table = kernels();
  const InputFormats inputs(runs.all(), x, tokens);
  const int64_t widest = runs.widest();
  const int64_t hidden = runs.all().front().experts->hidden();
  const ScratchBuffer gates(static_cast<size_t>(runs.rows() * widest) * sizeof(float));
  const ScratchBuffer ups(static_cast<size_t>(runs.rows() * widest) * sizeof(float));
  std::vector<const uint8_t*> token_rows;  // of each run those of gate, then those of up
  token_rows.reserve(static_cast<size_t>(2 * runs.rows()));
  std::vector<LinearTask> tasks;
  tasks.reserve(2 * runs.all().size());
  for (const ExpertRun& run : runs.all()) {
    for (const bool is_gate : {true, false}) {
      const PackedMatrix& w = is_gate ? run.experts->gate() : run.experts->up();
      const Activations& rows = inputs.of(w);
      const uint8_t* const* first = token_rows.data() + token_rows.size();
      for (int64_t i = 0; i < run.count; ++i) token_rows.push_back(rows.row(run.tokens[i]));
      float* results = (is_gate ? gates : ups).floats() + run.first_row * widest;
      tasks.push_back({&w, run.index, 1, first, run.count, results, 0, widest});
    }
  }
  run_linears(tasks);
  const DownInputs down_inputs(
      runs.all(), gates.floats(), runs.rows(), widest,
      [&](int64_t row, int64_t n, float* gate) { table.swiglu(gate, ups.floats() + row * widest, n, gate); });
  const ScratchBuffer results(static_cast<size_t>(runs.rows() * hidden) * sizeof(float));
  tasks.clear();
  for (size_t r = 0; r < runs.all().size(); ++r) {
    const ExpertRun& run = runs.all()[r];
    tasks.push_back({&run.experts->down(), run.index, 1, down_inputs.of_runs()[r].rows(), run.count,
                     results.floats() + run.first_row * hidden, 0, hidden});
  }
  run_linears(tasks);
  sum_runs(table, runs, results.floats(), hidden, tokens, out);
}

void run_many(const ExpertRuns& expert_runs, const float* x, int64_t tokens, float* out) {
  const KernelTable& table = kernels();
  const std::vector<ExpertRun>& runs = expert_runs.all();
  const InputFormats inputs(runs, x, tokens);
  const int64_t rows = expert_runs.rows();
  const int64_t widest = expert_runs.widest();
  std::vector<PieceIndex> pieces;  // of each node
  for (const ExpertRun& run : runs) {
    const PackedMatrix& gate = run.experts->gate();
    pieces.resize(std::max(pieces.size(), static_cast<size_t>(gate.nodes())));
    for (int node = 0; node < gate.nodes(); ++node) {
      pieces[static_cast<size_t>(node)].add(run, gate.panels_of_node(node));
    }
  }
  const ScratchBuffer intermediate(static_cast<size_t>(rows * widest) * sizeof(float));
  std::vector<int64_t> piece_counts;
  for (const PieceIndex& of_node : pieces) piece_counts.push_back(of_node.total());
  parallel_for_nodes(piece_counts, [&](int node, int64_t first, int64_t end) {
    for (int64_t position = first; position < end; ++position) {
      const Piece piece = pieces[static_cast<size_t>(node)].at(position);
      gate_and_up(table, inputs, piece, widest, intermediate.floats());
    }
  });
  const DownInputs down_inputs(runs, intermediate.floats(), rows, widest, [](int64_t, int64_t, float*) {});

  const int64_t hidden = runs.front().experts->hidden();
  const PackedMatrix& first_down = runs.front().experts->down();
  const int64_t pairs_at_once = down_pairs_at_once(first_down);
  std::vector<int64_t> groups;
  for (int node = 0; node < first_down.nodes(); ++node) {
    groups.push_back((first_down.pairs_of_node(node).count() + pairs_at_once - 1) / pairs_at_once);
  }
  parallel_for_nodes(groups, [&](int node, int64_t first, int64_t end) {
    const PanelRange all = first_down.pairs_of_node(node);
    for (int64_t group = first; group < end; ++group) {
      const int64_t pair = all.first + group * pairs_at_once;
      down(table, runs, down_inputs.of_runs(), {pair, std::min(all.end, pair + pairs_at_once)}, hidden, tokens, out);
    }
  });
}

// Routed or shared experts may be null.
void run(const ExpertWeights* routed, const Routing& routing, const ExpertWeights* shared, const float* x,
         int64_t tokens, float* out) {
  const int64_t hidden = (routed != nullptr ? routed : shared)->hidden();
  for (int64_t first = 0; first < tokens; first += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, tokens - first);
    const ExpertRuns runs(routed, routing.from(first), shared, count);
    if (runs.all().empty()) {
      std::memset(out + first * hidden, 0, sizeof(float) * static_cast<size_t>(count * hidden));
      continue;
    }
    (count <= kFewTokens ? run_few : run_many)(runs, x + first * hidden, count, out + first * hidden);
  }
}

}  // namespace

ExpertWeights::ExpertWeights(std::shared_ptr<PackedMatrix> gate, std::shared_ptr<PackedMatrix> up,
                             std::shared_ptr<PackedMatrix> down)
    : gate_(std::move(gate)), up_(std::move(up)), down_(std::move(down)) {
  if (gate_ != nullptr && up_ != nullptr && down_ != nullptr) {
    const bool same_inputs = gate_->cols() == up_->cols() && gate_->rows() == up_->rows();
    const bool closes = down_->cols() == gate_->rows() && down_->rows() == gate_->cols();
    const bool same_count = gate_->count() == up_->count() && gate_->count() == down_->count();
    if (same_inputs && closes && same_count) return;
  }
  throw std::invalid_argument(
      "gate and up must be count x intermediate x hidden, down count x hidden x intermediate; got gate " +
      shape_text(gate_.get()) + ", up " + shape_text(up_.get()) + ", down " + shape_text(down_.get()));
}

void run_experts(const ExpertWeights& routed, const Routing& routing, const ExpertWeights* shared, const float* x,
                 int64_t tokens, float* out) {
  run(&routed, routing, shared, x, tokens, out);
}

void run_mlp(const ExpertWeights& mlp, const float* x, int64_t tokens, float* out) {
  run(nullptr, {}, &mlp, x, tokens, out);
}

MoeBlock::MoeBlock(std::shared_ptr<PackedMatrix> router, std::vector<float> bias, const RouterConfig& config,
                   std::shared_ptr<ExpertWeights> routed, std::shared_ptr<ExpertWeights> shared)
    : router_(std::move(router)),
      bias_(std::move(bias)),
      config_(config),
      routed_(std::move(routed)),
      shared_(std::move(shared)) {
  if (routed_ == nullptr) throw std::invalid_argument("a MoE block needs routed experts, got nothing");
  const int64_t experts = routed_->count();
  const int64_t hidden = routed_->hidden();
  if (router_ == nullptr || router_->count() != 1 || router_->rows() != experts || router_->cols() != hidden) {
    throw std::invalid_argument("the router must be " + shape_text(1, experts, hidden) + ", got " +
                                shape_text(router_.get()));
  }
  if (!bias_.empty() && static_cast<int64_t>(bias_.size()) != experts) {
    throw std::invalid_argument("the router's bias must have " + std::to_string(experts) + " values, got " +
                                std::to_string(bias_.size()));
  }
  if (shared_ != nullptr && (shared_->count() != 1 || shared_->hidden() != hidden)) {
    throw std::invalid_argument("shared experts must be one expert of hidden size " + std::to_string(hidden) +
                                ", got " + std::to_string(shared_->count()) + " of " +
                                std::to_string(shared_->hidden()));
  }
  check_router(config_, experts);
}

std::vector<std::shared_ptr<PackedMatrix>> MoeBlock::matrices() const {
  std::vector<std::shared_ptr<PackedMatrix>> all{router_};
  for (const std::shared_ptr<ExpertWeights>& experts : {routed_, shared_}) {
    if (experts == nullptr) continue;
    for (const std::shared_ptr<PackedMatrix>& w : experts->matrices()) all.push_back(w);
  }
  return all;
}

void MoeBlock::forward(const float* x, int64_t tokens, float* out, float* logits) const {
  linear(*router_, 0, x, tokens, logits);
  std::vector<int32_t> indices(static_cast<size_t>(tokens * config_.top_k));
  std::vector<float> weights(indices.size());
  route(config_, bias_, experts(), logits, tokens, indices.data(), weights.data());
  run_experts(*routed_, {indices.data(), weights.data(), config_.top_k}, shared_.get(), x, tokens, out);
}

}  // namespace tkt
