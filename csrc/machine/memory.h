// Memory for weights and for the intermediate results of one call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tkt {

// Kernels may read up to this many bytes past the end of weights.
constexpr size_t kReadPast = 128;

// Anonymous pages, zero until written, 2 MiB pages where the system allows them (at 4 KiB a 10 GB model needs 2.4
// million TLB entries). Throws std::bad_alloc.
class WeightMemory {
 public:
  static constexpr int kWhereTouched = -1;

  // Pages come from the NUMA node that has this number, as long as it has free ones, and then from others; or from that
  // of the thread that first writes to them.
  explicit WeightMemory(size_t bytes, int node = kWhereTouched);
  ~WeightMemory();
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;

  uint8_t* data() const { return data_; }

 private:
  void* mapping_;
  size_t mapped_bytes_;
  uint8_t* data_;
};

// A buffer aligned to 64 bytes, taken from and given back to a free list: a call's buffers are those of the call
// before, already mapped (fresh pages cost a fault per 4 KiB, more than many an operation here).
class ScratchBuffer {
 public:
  explicit ScratchBuffer(size_t bytes);
  ~ScratchBuffer();
  ScratchBuffer(ScratchBuffer&& other) noexcept;
  ScratchBuffer& operator=(ScratchBuffer&&) = delete;
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;

  uint8_t* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  uint8_t* data_;
  size_t capacity_;
};

// Held across fork(): a child must not inherit the free list in the middle of a change by a thread it does not have.
void lock_free_buffers();
void unlock_free_buffers();

}  // namespace tkt
