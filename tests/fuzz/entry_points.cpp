// libFuzzer on what C++ is given: bytes of a file, numbers of a config, activations, the text of /sys. `make
// fuzz-native` builds it with AddressSanitizer and UndefinedBehaviorSanitizer. The first byte of an input chooses what
// is called. The preset has the scalar kernels alone, which are built in a minute; with -DTKT_ISAS=avx2 both are
// compared.
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/damage.h"
#include "formats/panel_layout.h"
#include "formats/row_decoder.h"
#include "kernels/dispatch.h"
#include "layers/experts.h"
#include "layers/linear.h"
#include "layers/mla.h"
#include "layers/packed_matrix.h"
#include "layers/row_ops.h"
#include "machine/thread_pool.h"
#include "machine/topology.h"

namespace {

using namespace tkt;

// Sanitizers report an abort with the input that led to it.
void require(bool claim, const char* what) {
  if (claim) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

// An input read from its front; where it has ended, numbers that follow from a seed in it, so that few bytes make whole
// matrices.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data, size), random_(data_.ConsumeIntegral<uint32_t>()) {}

  int64_t number(int64_t least, int64_t most) { return data_.ConsumeIntegralInRange<int64_t>(least, most); }
  bool flag() { return data_.ConsumeBool(); }
  std::string text(size_t most) { return data_.ConsumeRandomLengthString(most); }

  const WeightTypeInfo& type() { return kWeightTypeInfos[number(0, kWeightTypes - 1)]; }

  // Up to half of them from the input.
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> bytes = data_.ConsumeBytes<uint8_t>(static_cast<size_t>(count) / 2);
    while (static_cast<int64_t>(bytes.size()) < count) bytes.push_back(static_cast<uint8_t>(random_()));
    return bytes;
  }

  std::vector<float> floats(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    const int kind = static_cast<int>(number(0, 3));
    std::normal_distribution<float> normal;
    for (float& value : values) {
      value = normal(random_);
      if (kind == 1) value *= 1e-38f;
      if (kind == 2) value *= 1e38f;
    }
    for (int64_t left = kind == 3 ? number(1, 8) : 0; left > 0; --left) {
      constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 3e38f, 1e-45f};
      values[static_cast<size_t>(number(0, count - 1))] = kOdd[number(0, 6)];
    }
    return values;
  }

 private:
  FuzzedDataProvider data_;
  std::mt19937 random_;
};

// Whose bytes come from the source, so any scale may be no number.
std::shared_ptr<PackedMatrix> matrix(Source& source, const WeightTypeInfo& info, int64_t count, int64_t rows,
                                     int64_t cols) {
  auto made = std::make_shared<PackedMatrix>(info.type, count, rows, cols);
  made->pack(0, count, source.bytes(count * rows * made->row_bytes()).data());
  return made;
}

// The widest types divide by 256.
int64_t width(Source& source, const WeightTypeInfo& info, int64_t most_blocks) {
  return source.number(1, most_blocks) * info.block_elements;
}

// What is computed has the same bits on every instruction set; of a NaN only that it is one.
template <typename Compute>
void require_same_on_every_isa(Compute compute) {
  select_kernels("scalar");
  const std::vector<float> expected = compute();
  for (const KernelTable* table : all_tables()) {
    if (!is_supported(*table) || table == &scalar::kTable) continue;
    select_kernels(table->name);
    const std::vector<float> found = compute();
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool both_are_none = std::isnan(found[i]) && std::isnan(expected[i]);
      require(both_are_none || std::memcmp(&found[i], &expected[i], sizeof(float)) == 0, table->name);
    }
  }
}

void fuzz_blocks(Source& source) {
  const WeightTypeInfo& info = source.type();
  const int64_t rows = source.number(1, 40), blocks = source.number(1, 5), cols = blocks * info.block_elements;
  const std::vector<uint8_t> bytes = source.bytes(rows * blocks * info.block_bytes);
  PackedMatrix packed(info.type, 1, rows, cols);
  packed.pack(0, 1, bytes.data());

  std::vector<uint8_t> block(static_cast<size_t>(info.block_bytes));
  std::vector<float> values(static_cast<size_t>(cols));
  bool all_finite = true;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* of_row = bytes.data() + row * packed.row_bytes();
    for (int64_t b = 0; b < blocks; ++b) {
      read_block(info, packed.panel(0, row / kPanelRows), blocks, b, static_cast<int>(row % kPanelRows), block.data());
      require(std::memcmp(block.data(), of_row + b * info.block_bytes, block.size()) == 0, "packing loses nothing");
    }
    dequantize_row(info.type, of_row, cols, values.data());
    for (const float value : values) all_finite = all_finite && std::isfinite(value);
  }
  const BlockFindings found = look_at_blocks(info.type, bytes.data(), rows * blocks);
  // An exponent of MXFP4 that is finite still makes an infinite weight where it is nearly the largest.
  if (info.type != WeightType::kMXFP4) {
    require(found.not_finite >= 0 || all_finite, "blocks that were found sound have numbers");
  }
  const std::vector<int64_t> ids{source.number(0, rows - 1), source.number(0, rows - 1)};
  std::vector<float> embedded(static_cast<size_t>(2 * cols));
  embed_rows(info, bytes.data(), ids.data(), 2, cols, embedded.data());

  const int64_t tokens = source.number(1, 20);
  const std::vector<float> x = source.floats(tokens * cols);
  const Prefetch prefetch = kPrefetches[source.number(0, 2)];
  require_same_on_every_isa([&] {
    packed.set_prefetch(prefetch);
    std::vector<float> out(static_cast<size_t>(tokens * rows));
    linear(packed, 0, x.data(), tokens, out.data());
    return out;
  });
}

void fuzz_stored(Source& source) {
  const WeightTypeInfo& info = source.type();
  const int64_t rows = source.number(1, 40), matrices = source.number(1, 4), cols = width(source, info, 3);
  const int64_t each = rows * row_bytes(info, cols), shift = source.number(0, 70);
  const std::vector<uint8_t> bytes = source.bytes(matrices * each);
  std::FILE* file = std::tmpfile();
  const std::vector<uint8_t> before(static_cast<size_t>(shift));
  std::fwrite(before.data(), 1, before.size(), file);
  // A file may end before its tensors do.
  std::fwrite(bytes.data(), 1, static_cast<size_t>(source.number(0, matrices * each)), file);
  std::fflush(file);
  std::vector<StoredTensor::Part> parts;
  const bool is_whole = source.flag();
  for (int64_t i = 0; i < (is_whole ? 1 : matrices); ++i) parts.push_back({fileno(file), shift + i * each});
  StoredTensor stored(&info, parts, is_whole ? matrices * each : each);
  PackedMatrix packed(info.type, matrices, rows, cols);
  const int64_t first = source.number(0, matrices - 1), count = source.number(1, matrices - first);
  try {
    packed.pack_stored(stored, first, count);
    PackedMatrix expected(info.type, matrices, rows, cols);
    expected.pack(first, count, bytes.data() + first * each);
    std::vector<uint8_t> panels(static_cast<size_t>(packed.panels() * packed.panel_bytes())), others(panels.size());
    packed.read_panels(first, panels.data());
    expected.read_panels(first, others.data());
    require(panels == others, "packed from the file as from memory");
    const int64_t all = stored.nbytes() / info.block_bytes, start = source.number(0, all - 1);
    const ByteRange range{start * info.block_bytes, (start + source.number(1, all - start)) * info.block_bytes};
    std::vector<uint8_t> copy(static_cast<size_t>(range.end - range.first));
    stored.read_and_look_at(range, copy.data());
    require(std::memcmp(copy.data(), bytes.data() + range.first, copy.size()) == 0, "read as written");
  } catch (const ReadFailure&) {  // the file is too short
  }
  for (const ByteRange& range : stored.zeros()) require(range.first < range.end, "zeros are somewhere");
  std::fclose(file);
}

RouterConfig router(Source& source) {
  const bool is_sigmoid = source.flag();
  return {is_sigmoid ? Scoring::kSigmoid : Scoring::kSoftmax,
          is_sigmoid ? GroupScore::kTop2Sum : GroupScore::kMax,
          source.number(-1, 9),
          source.number(-1, 9),
          source.number(-1, 9),
          source.flag(),
          static_cast<float>(source.number(-3, 3))};
}

void fuzz_routing(Source& source) {
  const RouterConfig config = router(source);
  const int64_t experts = source.number(1, 40), tokens = source.number(1, 5);
  check_router(config, experts);
  const std::vector<float> bias = source.flag() ? source.floats(experts) : std::vector<float>();
  const std::vector<float> logits = source.floats(tokens * experts);
  std::vector<int32_t> indices(static_cast<size_t>(tokens * config.top_k));
  require_same_on_every_isa([&] {
    std::vector<float> weights(indices.size());
    route(config, bias, experts, logits.data(), tokens, indices.data(), weights.data());
    for (size_t i = 0; i < indices.size(); ++i) {
      require(indices[i] >= 0 && indices[i] < experts, "an expert that is there");
      require(i % static_cast<size_t>(config.top_k) == 0 || indices[i - 1] < indices[i], "ascending, once each");
    }
    return weights;
  });
}

std::shared_ptr<ExpertWeights> experts_of(Source& source, int64_t count, int64_t hidden, int64_t intermediate) {
  // Whatever the widths are, blocks of one value divide them; wider ones where they do.
  const auto type_for = [&source](int64_t cols) -> const WeightTypeInfo& {
    const WeightTypeInfo& info = source.type();
    return cols % info.block_elements == 0 ? info : info_of(WeightType::kF16);
  };
  return std::make_shared<ExpertWeights>(matrix(source, type_for(hidden), count, intermediate, hidden),
                                         matrix(source, type_for(hidden), count, intermediate, hidden),
                                         matrix(source, type_for(intermediate), count, hidden, intermediate));
}

void fuzz_experts(Source& source) {
  const RouterConfig config = router(source);
  const int64_t experts = source.number(1, 9), hidden = 32 * source.number(1, 9);
  const int64_t intermediate = 32 * source.number(1, 9), tokens = source.number(1, 9);
  const std::vector<float> bias = source.flag() ? source.floats(experts) : std::vector<float>();
  const auto gate = matrix(source, info_of(WeightType::kF32), 1, experts, hidden);
  const auto routed = experts_of(source, experts, hidden, intermediate);
  const auto shared = source.flag() ? experts_of(source, 1, hidden, 32 * source.number(1, 3)) : nullptr;
  const MoeBlock block(gate, bias, config, routed, shared);
  const std::vector<float> x = source.floats(tokens * hidden);
  require_same_on_every_isa([&] {
    std::vector<float> out(x.size()), logits(static_cast<size_t>(tokens * experts));
    block.forward(x.data(), tokens, out.data(), logits.data());
    return out;
  });
}

void fuzz_attention(Source& source) {
  const int64_t hidden = 32 * source.number(1, 3), heads = source.number(1, 20), nope = 32 * source.number(1, 2);
  const int64_t rope = 2 * source.number(1, 9), latent = 32 * source.number(1, 3), value = source.number(1, 40);
  const int64_t rank = source.flag() ? 32 * source.number(1, 2) : 0;
  const WeightTypeInfo& wide = source.flag() ? info_of(WeightType::kQ8_0) : info_of(WeightType::kF32);
  const WeightTypeInfo& any = info_of(WeightType::kF32);
  AttentionWeights weights;
  if (rank > 0) {
    weights.q_a = matrix(source, wide, 1, rank, hidden);
    weights.q_a_norm = source.floats(rank);
  }
  weights.q = matrix(source, wide, 1, heads * (nope + rope), rank > 0 ? rank : hidden);
  weights.kv_a = matrix(source, wide, 1, latent + rope, hidden);
  weights.kv_a_norm = source.floats(latent);
  weights.k_b = matrix(source, wide, heads, latent, nope);
  weights.v_b = matrix(source, wide, heads, value, latent);
  weights.o = matrix(source, any, 1, hidden, heads * value);
  const MlaAttention attention({hidden, heads, nope, rope, latent, value, 0.1f, 1e-6f}, weights);

  const int64_t batch = source.number(1, 3), tokens = source.number(1, 6);
  const std::vector<float> x = source.floats(batch * tokens * hidden), inverse = source.floats(rope / 2);
  std::vector<int64_t> positions(static_cast<size_t>(batch * tokens));
  for (int64_t& position : positions) position = source.number(INT64_MIN, INT64_MAX);
  std::vector<float> table(static_cast<size_t>(batch * tokens * rope));
  fill_rope_table(positions.data(), batch * tokens, inverse.data(), rope, 1.0f, table.data());
  const bool has_ranges = source.flag();
  // With a mask all sequences are of one length.
  std::vector<int64_t> lengths(static_cast<size_t>(batch), tokens + source.number(0, 80));
  std::vector<int32_t> ranges;
  std::vector<std::vector<float>> latents, ropes;
  for (int64_t& length : lengths) {
    if (has_ranges) length = tokens + source.number(0, 80);
    for (int64_t t = 0; t < 2 * tokens; ++t) ranges.push_back(static_cast<int32_t>(source.number(-3, length + 3)));
    latents.push_back(source.floats(length * latent));
    ropes.push_back(source.floats(length * rope));
  }
  const std::vector<uint8_t> mask = source.bytes(batch * tokens * lengths[0]);
  require_same_on_every_isa([&] {
    std::vector<std::vector<float>> first = latents, second = ropes;
    std::vector<float> out(x.size());
    std::vector<Cache> caches;
    for (size_t s = 0; s < lengths.size(); ++s) {
      caches.push_back({{{first[s].data(), latent}, {second[s].data(), rope}}, lengths[s]});
    }
    const Visibility visibility{has_ranges ? ranges.data() : nullptr, has_ranges ? nullptr : mask.data()};
    attention.append_and_attend({x.data(), table.data(), batch, tokens}, caches.data(), visibility, out.data());
    return out;
  });
}

void write_text(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

void fuzz_topology(Source& source) {
  static const std::string root = [] {
    char name[] = "/tmp/fuzz-machine-XXXXXX";
    const std::string made = mkdtemp(name);
    for (const char* folder :
         {"/sys", "/sys/devices", "/sys/devices/system", "/sys/devices/system/node", "/sys/devices/system/node/node0",
          "/sys/devices/system/node/node1", "/sys/devices/system/cpu", "/sys/devices/system/cpu/cpu0",
          "/sys/devices/system/cpu/cpu0/topology", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/a", "/proc",
          "/proc/self"}) {
      mkdir((made + folder).c_str(), 0700);
    }
    return made;
  }();
  for (const char* file : {"/sys/devices/system/node/online", "/sys/devices/system/node/node0/cpulist",
                           "/sys/devices/system/node/node1/cpulist", "/sys/devices/system/cpu/online",
                           "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "/sys/fs/cgroup/cpu.max",
                           "/sys/fs/cgroup/a/cpu.max", "/proc/self/cgroup"}) {
    write_text(root + file, source.text(40));
  }
  std::vector<int> allowed;
  for (int64_t cpu = 0, cpus = source.number(1, 6); cpu < cpus; ++cpu) allowed.push_back(static_cast<int>(cpu));
  const Topology found = read_topology(root, allowed);
  require(!found.nodes.empty() && found.quota >= 0, "there is a node, and no negative quota");
  const int most = most_threads(found), threads = default_thread_count(found);
  require(threads >= 1 && threads <= most && most <= static_cast<int>(allowed.size()), "threads fit the machine");
  for (const int node : nodes_of_threads(found, static_cast<int>(source.number(1, most)))) {
    require(node >= 0 && node < static_cast<int>(found.nodes.size()), "a thread is on a node that is there");
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  set_thread_count(2);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr void (*kTargets[])(Source&) = {fuzz_blocks,  fuzz_stored,    fuzz_routing,
                                           fuzz_experts, fuzz_attention, fuzz_topology};
  if (size < 1) return 0;
  Source source(data + 1, size - 1);
  try {
    kTargets[data[0] % (sizeof kTargets / sizeof kTargets[0])](source);
  } catch (const std::invalid_argument&) {  // refused, as the bindings pass it on
  }
  return 0;
}
