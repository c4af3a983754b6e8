module;
#include <atomic>
#include <cstdint>
#include <new>
#include <sys/mman.h>
module cppvmm.guest_memory:memory_id.impl;
import :address;
import :memory_id;
import :unmap;

namespace cppvmm {

using Number = std::atomic<std::uint64_t>;

/// What a forked child finds to be 0 (MADV_WIPEONFORK, Linux 4.14); null where there is no such memory.
static Number* make_number() {
  void* const page = mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return nullptr;
  if (madvise(page, page_size, MADV_WIPEONFORK) == 0) return new (page) Number(0);
  unmap(page, page_size);
  return nullptr;
}

std::uint64_t memory_id() {
  // For the life of the process.
  static Number* const number = make_number();
  // A child's copy goes on from what its parent has given out.
  static Number last = 0;
  if (number == nullptr) return 0;
  std::uint64_t known = number->load();
  if (known != 0) return known;
  const std::uint64_t next = last.fetch_add(1) + 1;
  return number->compare_exchange_strong(known, next) ? next : known;
}

} // namespace cppvmm
