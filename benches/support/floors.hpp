#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

// The least that the kernel can be asked for what a survey is to tell: bare system calls, of which nothing is kept but
// how many pages they show.

namespace cppvmm::bench {

/// PAGEMAP_SCAN of this process's page tables, through one descriptor.
class PagemapScan {
public:
  PagemapScan();
  ~PagemapScan();
  PagemapScan(const PagemapScan&) = delete;
  PagemapScan& operator=(const PagemapScan&) = delete;
  /// Whether this kernel has it (Linux 6.7).
  [[nodiscard]] bool works() const;
  /// How many pages of the memory are there, in memory or swapped out; 0 where it fails.
  [[nodiscard]] std::uint64_t pages(const void* memory, std::uint64_t bytes) const;

private:
  int pagemap_;
};

/// SEEK_DATA and SEEK_HOLE over a file, and a cachestat of each hole: how many pages hold data, or are occupied.
/// Nothing where this kernel has no cachestat (Linux 6.5).
[[nodiscard]] std::optional<std::uint64_t> pages_of_file(int fd, std::uint64_t bytes);

/// Reads all of the memory, 32 bytes at a time where the machine can, and does nothing else: whether a bit is set.
[[nodiscard]] bool read_all(const void* memory, std::uint64_t bytes);

/// How much memory could be had now: MemAvailable of /proc/meminfo, in bytes.
[[nodiscard]] std::uint64_t available_memory();

} // namespace cppvmm::bench
