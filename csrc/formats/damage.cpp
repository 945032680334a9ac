#include "formats/damage.h"

#include <cstddef>
#include <cstring>

#include "formats/iq1_m.h"
#include "formats/iq1_s.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "formats/tq1_0.h"
#include "formats/tq2_0.h"

namespace tkt {
namespace {

constexpr int kLineBytes = 64;

template <typename Word>
Word load(const uint8_t* p) {
  Word word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// What is ORed together over many blocks: a bit of `kBad` in `bad` says that a scale is not finite, one of `kValue` in
// `value` that one is not zero.
struct Look {
  uint32_t bad;
  uint32_t value;
};

// A number whose exponent has all its bits set is infinite or none: adding the lowest of them carries into the sign,
// which was masked away. Two halves in a word are looked at together.
template <size_t at, typename Word, uint32_t exponents, uint32_t lowest, uint32_t signs>
struct FloatsAt {
  static constexpr uint32_t kBad = signs;
  static constexpr uint32_t kValue = ~signs;
  static Look look(const uint8_t* block) {
    const uint32_t word = load<Word>(block + at);
    return {(word & exponents) + lowest, word};
  }
};
template <size_t at>
using OneHalf = FloatsAt<at, uint16_t, 0x7c00, 0x0400, 0x8000>;
template <size_t at>
using TwoHalves = FloatsAt<at, uint32_t, 0x7c007c00, 0x04000400, 0x80008000>;
using Float = FloatsAt<0, uint32_t, 0x7f800000, 0x00800000, 0x80000000>;
using BFloat = FloatsAt<0, uint16_t, 0x7f80, 0x0080, 0x8000>;

struct PowerOfTwo {  // of MXFP4, a scale that is never zero: quants are what can be
  static constexpr uint32_t kBad = 0x100;
  static constexpr uint32_t kValue = ~uint32_t{0};
  static Look look(const uint8_t* block) {
    static_assert(offsetof(BlockMXFP4, e) == 0);
    const uint64_t quants = load<uint64_t>(block + 1) | load<uint64_t>(block + 9);
    return {block[0] + uint32_t{1}, static_cast<uint32_t>(quants | quants >> 32)};
  }
};

struct FourE4M3 {
  static constexpr uint32_t kBad = 0x80808080;
  static constexpr uint32_t kValue = ~uint32_t{0};
  static Look look(const uint8_t* block) {
    static_assert(offsetof(BlockNVFP4, d) == 0);
    const uint32_t scales = load<uint32_t>(block);
    return {(scales & 0x7f7f7f7f) + 0x01010101, scales};
  }
};

struct HalfInNibbles {  // of IQ1_M, in the upper four bits of four words
  static constexpr uint32_t kBad = 0x8000;
  static constexpr uint32_t kValue = 0x7fff;
  static Look look(const uint8_t* block) {
    uint32_t half = 0;
    for (int i = 0; i < 4; ++i) {
      half |= static_cast<uint32_t>(load<uint16_t>(block + offsetof(BlockIQ1_M, scales) + 2 * i) >> 12) << (4 * i);
    }
    return {(half & 0x7c00) + 0x0400, half};
  }
};

template <class Scales, int block_bytes>
BlockFindings look_at_scales(const uint8_t* blocks, int64_t count) {
  if constexpr (block_bytes > kLineBytes) {
    // Every line in order: packing, which comes next, reads them all, and only so are they prefetched.
    for (int64_t i = 0; i < count * block_bytes; i += kLineBytes) __asm__ volatile("" : : "r"(blocks[i]));
  }
  uint32_t bad = 0;
  uint32_t value = 0;
  for (int64_t b = 0; b < count; ++b) {
    Look look = Scales::look(blocks + b * block_bytes);
    // No vector is to be made of what stands apart: gcc 12 puts it together in memory, 5 cycles a block for 1.
    if constexpr (block_bytes > 4) __asm__("" : "+r"(look.bad));
    bad |= look.bad;
    value |= look.value;
  }
  BlockFindings found{-1, (value & Scales::kValue) != 0};
  if ((bad & Scales::kBad) != 0) {
    found.not_finite = 0;
    while ((Scales::look(blocks + found.not_finite * block_bytes).bad & Scales::kBad) == 0) ++found.not_finite;
  }
  return found;
}

}  // namespace

BlockFindings look_at_blocks(WeightType type, const uint8_t* blocks, int64_t count) {
  switch (type) {
#define TKT_LOOK(name, ...) \
  case WeightType::k##name: \
    return look_at_scales<__VA_ARGS__, info_of(WeightType::k##name).block_bytes>(blocks, count);
#define TKT_LOOK_AT_D(name, Halves) TKT_LOOK(name, Halves<offsetof(Block##name, d)>)
    TKT_LOOK(F32, Float)
    TKT_LOOK(F16, OneHalf<0>)
    TKT_LOOK(BF16, BFloat)
    TKT_LOOK_AT_D(Q4_0, OneHalf)
    TKT_LOOK_AT_D(Q4_1, TwoHalves)  // d and m
    TKT_LOOK_AT_D(Q5_0, OneHalf)
    TKT_LOOK_AT_D(Q5_1, TwoHalves)
    TKT_LOOK_AT_D(Q8_0, OneHalf)
    TKT_LOOK_AT_D(Q2_K, TwoHalves)  // d and dmin
    TKT_LOOK_AT_D(Q3_K, OneHalf)
    TKT_LOOK_AT_D(Q4_K, TwoHalves)
    TKT_LOOK_AT_D(Q5_K, TwoHalves)
    TKT_LOOK_AT_D(Q6_K, OneHalf)
    TKT_LOOK_AT_D(IQ1_S, OneHalf)
    TKT_LOOK_AT_D(IQ2_XXS, OneHalf)
    TKT_LOOK_AT_D(IQ2_XS, OneHalf)
    TKT_LOOK_AT_D(IQ2_S, OneHalf)
    TKT_LOOK_AT_D(IQ3_XXS, OneHalf)
    TKT_LOOK_AT_D(IQ3_S, OneHalf)
    TKT_LOOK_AT_D(IQ4_NL, OneHalf)
    TKT_LOOK_AT_D(IQ4_XS, OneHalf)
    TKT_LOOK_AT_D(TQ1_0, OneHalf)
    TKT_LOOK_AT_D(TQ2_0, OneHalf)
    TKT_LOOK(MXFP4, PowerOfTwo)
    TKT_LOOK(NVFP4, FourE4M3)
    TKT_LOOK(IQ1_M, HalfInNibbles)
#undef TKT_LOOK_AT_D
#undef TKT_LOOK
  }
  return {};
}

bool all_zero(const uint8_t* bytes, int64_t count) {
  return count == 0 || (bytes[0] == 0 && std::memcmp(bytes, bytes + 1, static_cast<size_t>(count - 1)) == 0);
}

}  // namespace tkt
