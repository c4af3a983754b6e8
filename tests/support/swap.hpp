// Swap space for tests, and which pages are in it.
#pragma once

#include "descriptor.hpp"

#include <cstddef>
#include <expected>
#include <string>
#include <utility>
#include <vector>

namespace cppvmm::test {

/// Something to swap to: a compressed disk in memory (zram) that is made here and taken away again, else what the host
/// has. One holder at a time in all processes: who takes a disk away brings back what others have on it.
class SwapSpace {
public:
  /// Waits for other holders; else one line for a person.
  [[nodiscard]] static std::expected<SwapSpace, std::string> take();
  SwapSpace(SwapSpace&& other) noexcept
      : lock_(std::move(other.lock_)), device_(std::exchange(other.device_, -1)),
        node_(std::exchange(other.node_, {})) {}
  SwapSpace& operator=(SwapSpace&&) = delete;
  ~SwapSpace();

private:
  SwapSpace() = default;
  Descriptor lock_;
  long device_ = -1; ///< The number of our zram device.
  std::string node_; ///< Its device node.
};

/// Whether the machine swaps to anything just now.
[[nodiscard]] bool has_swap();

/// Which 4 KiB pages of a mapping are swapped out, by this process's page tables: says nothing of shared memory.
[[nodiscard]] std::vector<bool> swapped_pages(const void* host, std::size_t bytes);

/// Which 4 KiB pages of a shared mapping are in the page cache.
[[nodiscard]] std::vector<bool> cached_pages(void* host, std::size_t bytes);

} // namespace cppvmm::test
