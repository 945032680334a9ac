// What this machine can do at most, for the benchmarks: how fast all threads together read memory, how fast they
// multiply. Compiled by benchmarks/measuring.py for the machine it runs on; no part of the package.

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef int64_t Words __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

using Clock = std::chrono::steady_clock;

constexpr int kChains = 12;  // independent accumulators: two units times a latency of 4 to 5 cycles, and spare
constexpr int kUnroll = 8;   // of the loops over them: gcc moves every accumulator between registers once a round
constexpr int kStreams = 8;  // loads in flight from one loop
constexpr size_t kPrefetchBytes = 4096;          // ahead, where asking ahead helps
constexpr size_t kChunkBytes = size_t{1} << 20;  // handed out one by one: a thread that is held up keeps no one waiting
constexpr size_t kHugePage = size_t{2} << 20;

uint8_t* memory = nullptr;
size_t memory_bytes = 0;
std::vector<int> cpus;         // where thread i runs
std::atomic<int64_t> sink{0};  // results go here, so that they are computed

// Seconds from a common start until the last thread is done.
template <typename Work>
double in_parallel(int threads, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> started{false};
  std::vector<Clock::time_point> ends(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      // The scheduler may leave two new threads on one CPU for the whole of a short sample.
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpus[t % cpus.size()], &one);
      sched_setaffinity(0, sizeof(one), &one);
      ready.fetch_add(1);
      while (!started.load(std::memory_order_acquire)) std::this_thread::yield();
      work();
      ends[t] = Clock::now();
    });
  }
  while (ready.load() < threads) std::this_thread::yield();
  const Clock::time_point start = Clock::now();
  started.store(true, std::memory_order_release);
  Clock::time_point end = start;
  for (int t = 0; t < threads; ++t) {
    workers[t].join();
    if (ends[t] > end) end = ends[t];
  }
  return std::chrono::duration<double>(end - start).count();
}

template <typename PerChunk>
double over_chunks(int threads, const PerChunk& per_chunk) {
  std::atomic<size_t> next{0};
  return in_parallel(threads, [&] {
    for (;;) {
      const size_t begin = next.fetch_add(kChunkBytes);
      if (begin >= memory_bytes) return;
      per_chunk(memory + begin);
    }
  });
}

template <bool kAsksAhead>
int64_t read_chunk(const uint8_t* chunk) {
  const Words* words = reinterpret_cast<const Words*>(chunk);
  Words sums[kStreams] = {};
  for (size_t i = 0; i < kChunkBytes / kVectorBytes; i += kStreams) {
    for (int s = 0; s < kStreams; ++s) {
      if (kAsksAhead) __builtin_prefetch(chunk + (i + s) * kVectorBytes + kPrefetchBytes);
      sums[s] ^= words[i + s];
    }
  }
  for (int s = 1; s < kStreams; ++s) sums[0] ^= sums[s];
  return sums[0][0];
}

#if defined(__AVX512VNNI__)
#define LIMITS_HAS_DOT 1
using Bytes = __m512i;
inline Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
inline Bytes bytes_of(char value) { return _mm512_set1_epi8(value); }
inline int32_t first(Bytes sum) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum)); }
#elif defined(__AVXVNNI__)
#define LIMITS_HAS_DOT 1
using Bytes = __m256i;
inline Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
inline Bytes bytes_of(char value) { return _mm256_set1_epi8(value); }
inline int32_t first(Bytes sum) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(sum)); }
#elif defined(__AVX2__)
#define LIMITS_HAS_DOT 1
// Sums of 16 bits, which hold some products; widening them comes on top.
using Bytes = __m256i;
inline Bytes dot(Bytes sum, Bytes a, Bytes b) {
  Bytes products;  // the compiler would take one multiplication for all, and add in another order from the stack
  asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
  return sum;
}
inline Bytes bytes_of(char value) { return _mm256_set1_epi8(value); }
inline int32_t first(Bytes sum) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(sum)); }
#endif

}  // namespace

extern "C" {

// Before all others. Thread i runs on cpu_list[i]. Takes memory for limits_read_gb_per_s, in huge pages where allowed,
// spread over NUMA nodes where there are several. 0, or -1 where there is not enough.
int limits_prepare(int64_t bytes, const int* cpu_list, int threads) {
  cpus.assign(cpu_list, cpu_list + threads);
  memory_bytes = static_cast<size_t>(bytes) / kChunkBytes * kChunkBytes;
  void* mapped = mmap(nullptr, memory_bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return -1;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage;
  memory = reinterpret_cast<uint8_t*>(start);
  madvise(memory, memory_bytes, MADV_HUGEPAGE);
  constexpr long kInterleave = 3;  // MPOL_INTERLEAVE; numaif.h is not everywhere
  const unsigned long all_nodes = ~0UL;
  (void)!syscall(SYS_mbind, memory, memory_bytes, kInterleave, &all_nodes, 8 * sizeof(all_nodes), 0);
  over_chunks(threads, [](uint8_t* chunk) { std::memset(chunk, 1, kChunkBytes); });
  return 0;
}

// The better of asking ahead (two threads of a Zen 5: 5% more) and leaving that to the hardware (of a Zen 3: 15% more).
double limits_read_gb_per_s(int threads) {
  const double asking = over_chunks(threads, [](const uint8_t* chunk) { sink += read_chunk<true>(chunk); });
  const double leaving = over_chunks(threads, [](const uint8_t* chunk) { sink += read_chunk<false>(chunk); });
  return static_cast<double>(memory_bytes) / (asking < leaving ? asking : leaving) / 1e9;
}

// Multiplications and additions of bytes, in 1e9 per second; 0 where the CPU has no instruction for them: VNNI, or
// products summed in 16 bits of AVX2.
double limits_dot_gops(int threads, int64_t rounds) {
#ifdef LIMITS_HAS_DOT
  const double seconds = in_parallel(threads, [rounds] {
    Bytes a = bytes_of(1), b = bytes_of(2), sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = bytes_of(0);
    for (int64_t i = 0; i < rounds; ++i) {
      asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 8
      for (int step = 0; step < kUnroll; ++step) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sums[c] = dot(sums[c], a, b);
      }
    }
    for (int c = 0; c < kChains; ++c) sink += first(sums[c]);
  });
  return 2.0 * sizeof(Bytes) * kUnroll * kChains * static_cast<double>(rounds) * threads / seconds / 1e9;
#else
  (void)threads, (void)rounds;
  return 0;
#endif
}

// Multiplications and additions of float32, in 1e9 per second.
double limits_fma_gflops(int threads, int64_t rounds) {
  const double seconds = in_parallel(threads, [rounds] {
    Floats a, b, sums[kChains] = {};
    for (size_t i = 0; i < sizeof(Floats) / sizeof(float); ++i) a[i] = 0.5f, b[i] = 1.0f;
    for (int64_t i = 0; i < rounds; ++i) {
#if defined(__x86_64__)
      asm volatile("" : "+v"(a), "+v"(b));
#endif
#pragma GCC unroll 8
      for (int step = 0; step < kUnroll; ++step) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * a + b;
      }
    }
    for (int c = 0; c < kChains; ++c) sink += static_cast<int64_t>(sums[c][0]);
  });
  const double per_round = 2.0 * sizeof(Floats) / sizeof(float) * kUnroll * kChains;
  return per_round * static_cast<double>(rounds) * threads / seconds / 1e9;
}

}  // extern "C"
