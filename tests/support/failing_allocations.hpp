// Allocations that fail, and are counted: replaces operator new and delete, so it is for one file of a program of its
// own.
#pragma once

#include "held.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <malloc.h>
#include <new>

#include <gtest/gtest.h>

namespace cppvmm::test {

/// False where nobody's replace the thread sanitizer's: none fails then, and none is counted.
#if __has_feature(thread_sanitizer)
inline constexpr bool replaces_allocations = false;
#else
inline constexpr bool replaces_allocations = true;
#endif
inline constexpr const char* allocations_are_not_replaced = "the thread sanitizer has an operator new of its own";

/// How many more allocations of this thread succeed; negative: all.
inline thread_local long allocations_left = -1;

/// Bytes that operator new has given out and not got back, and the most that it was since somebody set it.
inline std::atomic<std::size_t> bytes_held = 0;
inline std::atomic<std::size_t> most_bytes_held = 0;

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations_left == 0) return nullptr;
  if (allocations_left > 0) --allocations_left;
  void* const memory = alignment <= __STDCPP_DEFAULT_NEW_ALIGNMENT__
                           ? std::malloc(bytes != 0 ? bytes : 1)
                           : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  const std::size_t now = bytes_held += malloc_usable_size(memory);
  for (std::size_t most = most_bytes_held; most < now && !most_bytes_held.compare_exchange_weak(most, now);) {
  }
  return memory;
}

inline void free_allocation(void* memory) {
  bytes_held -= malloc_usable_size(memory);
  std::free(memory);
}

inline void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const memory = allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

/// Does `call` again and again, with one allocation more each time, until it does not run out: until it neither throws
/// nor says, by returning true, that it ran out. How often it did.
inline long fail_each_allocation(const std::function<bool()>& call) {
  constexpr long most = 100'000;
  for (long allowed = 0; allowed < most; ++allowed) {
    bool ran_out = false;
    allocations_left = allowed;
    try {
      ran_out = call();
    } catch (const std::bad_alloc&) {
      ran_out = true;
    }
    allocations_left = -1;
    if (!ran_out) return allowed;
  }
  ADD_FAILURE() << "it never came to an end";
  return most;
}

/// The same, and that nothing is left of it; the first time around, for what is made once in a process.
inline void expect_nothing_left(const std::function<bool()>& call) {
  EXPECT_GT(fail_each_allocation(call), 0);
  const Held before = held_now();
  EXPECT_GT(fail_each_allocation(call), 0);
  EXPECT_EQ(held_now(), before);
  // To malloc, what a thread keeps for its next allocations is given out: up to 7 of a size, and which these are takes
  // a while to settle. What is lost each time adds up to more.
  constexpr int rounds = 8;
  constexpr int most_tries = 8;
  std::size_t heap = 0;
  std::size_t now = 0;
  for (int tries = 0; tries < most_tries && (tries == 0 || now > heap); ++tries) {
    heap = heap_now();
    for (int round = 0; round < rounds; ++round)
      EXPECT_GT(fail_each_allocation(call), 0);
    now = heap_now();
  }
  EXPECT_LE(now, heap) << "the heap grows each time";
}

} // namespace cppvmm::test

// The forms for arrays too: an address sanitizer's own do not call these.
#if !__has_feature(thread_sanitizer)
void* operator new(std::size_t bytes) { return cppvmm::test::allocate_or_throw(bytes, 1); }
void* operator new[](std::size_t bytes) { return cppvmm::test::allocate_or_throw(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return cppvmm::test::allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return cppvmm::test::allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return cppvmm::test::allocate(bytes, 1); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return cppvmm::test::allocate(bytes, 1); }
void operator delete(void* memory) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete[](void* memory) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete(void* memory, std::size_t) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete[](void* memory, std::size_t) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { cppvmm::test::free_allocation(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { cppvmm::test::free_allocation(memory); }
#endif
