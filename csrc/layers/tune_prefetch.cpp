#include "layers/tune_prefetch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <utility>

#include "kernels/dispatch.h"
#include "layers/linear.h"

namespace tkt {
namespace {

constexpr int kRounds = 9;
// Samples taken before those that count: memory that was just filled is slow at first for some virtual machines.
constexpr int kWarmUps = 20;
// Threads that meet late take some microseconds of it.
constexpr double kSampleSeconds = 0.005;
constexpr int64_t kPieceBytes = int64_t{64} << 20;
// What caches of a large server hold; matrices are read in turns, so each is long gone when it comes again.
constexpr int64_t kLeastBytes = int64_t{1} << 29;
// Below this, or not in three rounds of four, it is noise, and a choice that changes from load to load for nothing.
constexpr double kLeastGain = 1.03;
constexpr int kDoubtedRounds = kRounds / 4;

// Matrices of a PackedMatrix that are multiplied by the same row.
struct Piece {
  PackedMatrix* w;
  int64_t first;
  int64_t count;
  int64_t bytes;
};

// The type of which there is most: the time of another one says nothing about what prefetching changes.
WeightType most_common_type(const std::vector<std::shared_ptr<PackedMatrix>>& matrices) {
  int64_t bytes[kWeightTypes] = {};
  for (const std::shared_ptr<PackedMatrix>& w : matrices) bytes[static_cast<int>(w->info().type)] += w->nbytes();
  return static_cast<WeightType>(std::max_element(std::begin(bytes), std::end(bytes)) - std::begin(bytes));
}

std::vector<Piece> pieces_of(const std::vector<std::shared_ptr<PackedMatrix>>& matrices) {
  const WeightType type = most_common_type(matrices);
  std::vector<Piece> pieces;
  for (const std::shared_ptr<PackedMatrix>& w : matrices) {
    if (w->info().type != type) continue;
    const int64_t one = w->nbytes() / w->count();
    const int64_t at_once = std::max<int64_t>(1, kPieceBytes / one);
    for (int64_t first = 0; first < w->count(); first += at_once) {
      const int64_t count = std::min(at_once, w->count() - first);
      pieces.push_back({w.get(), first, count, count * one});
    }
  }
  return pieces;
}

// Values of about 1, all different: products of denormals would be slow.
std::vector<float> plausible_row(int64_t cols) {
  std::vector<float> row(static_cast<size_t>(cols));
  for (size_t i = 0; i < row.size(); ++i) row[i] = std::sin(static_cast<float>(i));
  return row;
}

class Sampler {
 public:
  explicit Sampler(std::vector<Piece> pieces) : pieces_(std::move(pieces)) {
    int64_t most_cols = 0;
    int64_t most_rows = 0;
    for (const Piece& piece : pieces_) {
      most_cols = std::max(most_cols, piece.w->cols());
      most_rows = std::max(most_rows, piece.count * piece.w->rows());
    }
    x_ = plausible_row(most_cols);
    out_.resize(static_cast<size_t>(most_rows));
  }

  // Seconds per byte of the pieces that come next.
  double sample(Prefetch strategy) {
    double seconds = 0;
    int64_t bytes = 0;
    while (seconds < kSampleSeconds) {
      const Piece& piece = pieces_[next_++ % pieces_.size()];
      const Activations row(piece.w->info().activation, x_.data(), 1, piece.w->cols(), piece.w->cols());
      const std::vector<const uint8_t*> rows(static_cast<size_t>(piece.count), row.row(0));
      piece.w->set_prefetch(strategy);
      const auto start = std::chrono::steady_clock::now();
      run_linears({{piece.w, piece.first, piece.count, rows.data(), 1, out_.data(), piece.w->rows(), piece.w->rows()}});
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      bytes += piece.bytes;
    }
    return seconds / static_cast<double>(bytes);
  }

 private:
  std::vector<Piece> pieces_;
  size_t next_ = 0;
  std::vector<float> x_;
  std::vector<float> out_;
};

}  // namespace

std::vector<PrefetchSpeed> tune_prefetch(const std::vector<std::shared_ptr<PackedMatrix>>& matrices) {
  if (&kernels() == &scalar::kTable) return {};  // it does not prefetch, and timing it would take minutes
  const std::vector<Piece> pieces = pieces_of(matrices);
  int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  if (bytes < kLeastBytes) return {};

  const Prefetch before = matrices.front()->prefetch();
  Sampler sampler(pieces);
  for (int i = 0; i < kWarmUps; ++i) sampler.sample(before);
  std::vector<PrefetchSpeed> found;
  PrefetchSpeed best{before, 1.0};
  std::vector<std::vector<double>> speeds(std::size(kPrefetches));
  for (int round = 0; round < kRounds; ++round) {
    const double base = sampler.sample(before);
    for (size_t i = 0; i < speeds.size(); ++i) {
      speeds[i].push_back(kPrefetches[i] == before ? 1.0 : base / sampler.sample(kPrefetches[i]));
    }
  }
  for (size_t i = 0; i < speeds.size(); ++i) {
    std::sort(speeds[i].begin(), speeds[i].end());
    found.push_back({kPrefetches[i], speeds[i][kRounds / 2]});
    if (speeds[i][kDoubtedRounds] >= kLeastGain && found.back().speed > best.speed) best = found.back();
  }
  for (const std::shared_ptr<PackedMatrix>& w : matrices) w->set_prefetch(best.strategy);
  return found;
}

}  // namespace tkt
