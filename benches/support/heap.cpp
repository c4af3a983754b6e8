#include "beside.hpp"
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <malloc.h>
#include <new>

// The heap of a benchmark's program counts what is taken and given back, while somebody wants to know.

namespace {

std::atomic<bool> is_counting = false;
std::atomic<std::int64_t> held = 0;
std::atomic<std::int64_t> peak = 0;

/// Null stays null.
[[maybe_unused]] void* count(void* block) noexcept {
  if (block != nullptr && is_counting.load(std::memory_order_relaxed)) {
    const auto size = static_cast<std::int64_t>(malloc_usable_size(block));
    const std::int64_t now = held.fetch_add(size, std::memory_order_relaxed) + size;
    std::int64_t most = peak.load(std::memory_order_relaxed);
    while (most < now && !peak.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
    }
  }
  return block;
}

[[maybe_unused]] void* counted(void* block) {
  if (block == nullptr) throw std::bad_alloc();
  return count(block);
}

[[maybe_unused]] void give_back(void* block) {
  if (is_counting.load(std::memory_order_relaxed))
    held.fetch_sub(static_cast<std::int64_t>(malloc_usable_size(block)), std::memory_order_relaxed);
  std::free(block);
}

// aligned_alloc takes whole multiples only.
[[maybe_unused]] void* take_aligned(std::size_t size, std::align_val_t alignment) {
  const auto unit = static_cast<std::size_t>(alignment);
  return counted(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
}

} // namespace

// The thread sanitizer has its own, which nothing replaces: there nothing is counted. The address sanitizer's own for
// arrays do not call these.
#if !__has_feature(thread_sanitizer)
void* operator new(std::size_t size) { return counted(std::malloc(size == 0 ? 1 : size)); }
void* operator new[](std::size_t size) { return counted(std::malloc(size == 0 ? 1 : size)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return take_aligned(size, alignment); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return take_aligned(size, alignment); }
// A sanitizer's own would not be freed by ours.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return count(std::malloc(size == 0 ? 1 : size));
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return count(std::malloc(size == 0 ? 1 : size));
}
void operator delete(void* block) noexcept { give_back(block); }
void operator delete[](void* block) noexcept { give_back(block); }
void operator delete(void* block, std::size_t) noexcept { give_back(block); }
void operator delete[](void* block, std::size_t) noexcept { give_back(block); }
void operator delete(void* block, std::align_val_t) noexcept { give_back(block); }
void operator delete[](void* block, std::align_val_t) noexcept { give_back(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { give_back(block); }
void operator delete[](void* block, std::size_t, std::align_val_t) noexcept { give_back(block); }
#endif

namespace cppvmm::bench {

void begin_heap_use() {
  held = 0;
  peak = 0;
  is_counting = true;
}

HeapUse end_heap_use() {
  is_counting = false;
  return {peak, held};
}

} // namespace cppvmm::bench
