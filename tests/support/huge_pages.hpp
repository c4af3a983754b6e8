// Huge pages of 2 MiB for tests, from the host's pool.
#pragma once

#include "descriptor.hpp"

#include <expected>
#include <string>
#include <utility>

namespace cppvmm::test {

/// Sees to it that the host's pool has so many free 2 MiB pages, and gives them back. One holder at a time in all
/// processes: whoever changes the pool's size locks the file that sets it.
class HugePagePool {
public:
  /// Waits for other holders; else one line for a person.
  [[nodiscard]] static std::expected<HugePagePool, std::string> take(long pages = 16);
  HugePagePool(HugePagePool&& other) noexcept : lock_(std::move(other.lock_)), before_(other.before_) {}
  HugePagePool& operator=(HugePagePool&&) = delete;
  ~HugePagePool();

private:
  HugePagePool(Descriptor lock, long before) : lock_(std::move(lock)), before_(before) {}
  Descriptor lock_;
  long before_;
};

} // namespace cppvmm::test
