#include "machine/memory.h"

#include <sys/mman.h>
#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "machine/refused_calls.h"

namespace tkt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Preferred, not bound: where a bound node is full the process is killed. The system call by its number, for libnuma
// may not be there; a refusal (no such node, a sandbox) only costs speed.
void prefer_node(void* data, size_t bytes, int node) {
#if defined(SYS_mbind)
  constexpr size_t kBits = sizeof(unsigned long) * CHAR_BIT;
  const size_t bit = static_cast<size_t>(node);
  std::vector<unsigned long> mask(bit / kBits + 1, 0);
  mask.back() = 1ul << bit % kBits;
  const bool done = syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), mask.size() * kBits + 1, 0) == 0;
  // EINVAL says no such node, as in a topology that was set by hand.
  if (!done && errno != EINVAL) note_refused_call(OptionalCall::kMbind);
#endif
}

struct FreeBuffer {
  uint8_t* data;
  size_t capacity;
};
std::mutex free_mutex;
std::vector<FreeBuffer>& free_buffers() {
  static auto* buffers = new std::vector<FreeBuffer>();  // never destroyed: threads may outlive static destructors
  return *buffers;
}

}  // namespace

WeightMemory::WeightMemory(size_t bytes, int node) {
  // Small matrices (norm-sized, tiny models) would waste most of a huge page.
  const bool huge = bytes >= kHugePage;
  bytes += kReadPast;
  mapped_bytes_ = huge ? rounded_up(bytes, kHugePage) + kHugePage : rounded_up(bytes, 4096);
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  if (node != kWhereTouched) prefer_node(mapping_, mapped_bytes_, node);
  data_ = static_cast<uint8_t*>(mapping_);
  if (huge) {
    data_ = reinterpret_cast<uint8_t*>(rounded_up(reinterpret_cast<size_t>(mapping_), kHugePage));
    // The last one only where at least three quarters of it are used: with all last ones the 300 matrices of V2-Lite
    // would take 3% more than its file, with those of which half is used 1.6%.
    if (madvise(data_, (bytes + kHugePage / 4) / kHugePage * kHugePage, MADV_HUGEPAGE) != 0) {
      note_refused_call(OptionalCall::kMadvise);
    }
  }
}

WeightMemory::~WeightMemory() { munmap(mapping_, mapped_bytes_); }

void lock_free_buffers() { free_mutex.lock(); }
void unlock_free_buffers() { free_mutex.unlock(); }

ScratchBuffer::ScratchBuffer(size_t bytes) {
  capacity_ = rounded_up(bytes > 0 ? bytes : 1, 4096);
  {
    std::lock_guard<std::mutex> lock(free_mutex);
    std::vector<FreeBuffer>& buffers = free_buffers();
    size_t best = buffers.size();
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i].capacity < capacity_) continue;
      if (best == buffers.size() || buffers[i].capacity < buffers[best].capacity) best = i;
    }
    // A decode step must not hold on to the buffers of a long prompt.
    if (best < buffers.size() && buffers[best].capacity <= 2 * capacity_) {
      data_ = buffers[best].data;
      capacity_ = buffers[best].capacity;
      buffers[best] = buffers.back();
      buffers.pop_back();
      return;
    }
  }
  data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, capacity_));
  if (data_ == nullptr) throw std::bad_alloc();
}

ScratchBuffer::ScratchBuffer(ScratchBuffer&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
  other.data_ = nullptr;
}

ScratchBuffer::~ScratchBuffer() {
  if (data_ == nullptr) return;
  std::lock_guard<std::mutex> lock(free_mutex);
  std::vector<FreeBuffer>& buffers = free_buffers();
  buffers.push_back({data_, capacity_});
  // Sizes of prompts vary: beyond this many, the oldest is least likely to fit again.
  constexpr size_t kKept = 48;
  if (buffers.size() > kKept) {
    std::free(buffers.front().data);
    buffers.erase(buffers.begin());
  }
}

}  // namespace tkt
