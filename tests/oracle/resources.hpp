// What of the host some cases need: huge pages in the pool, something to swap to, a file system for snapshots.
#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <string>
#include <utility>

namespace cppvmm::oracle {

/// Sees to it that the host's pool has so many free 2 MiB pages, and gives them back. One holder at a time in all
/// processes: whoever changes the pool's size locks the file that sets it.
class HugePool {
public:
  [[nodiscard]] static std::expected<HugePool, std::string> take(long pages);
  HugePool(HugePool&& other) noexcept : lock_(std::exchange(other.lock_, -1)), before_(other.before_) {}
  HugePool& operator=(HugePool&&) = delete;
  ~HugePool();

private:
  HugePool(int lock, long before) : lock_(lock), before_(before) {}
  int lock_;
  long before_;
};

/// Something to swap to: a zram device that is made here and taken away again, else what the host has. (A device of its
/// own, for another test may take away the one that it made.)
class SwapSpace {
public:
  [[nodiscard]] static std::expected<SwapSpace, std::string> take();
  SwapSpace(SwapSpace&& other) noexcept
      : device_(std::exchange(other.device_, -1)), node_(std::exchange(other.node_, {})) {}
  SwapSpace& operator=(SwapSpace&&) = delete;
  ~SwapSpace();

private:
  SwapSpace() = default;
  int device_ = -1;  ///< The number of our zram device.
  std::string node_; ///< Its device node.
};

/// An unnamed file in the folder for temporary files, or why there is none.
[[nodiscard]] std::expected<int, std::string> temporary_file();

/// What of this kernel decides what may be missed.
struct KernelFacts {
  bool page_map_scan = false;      ///< PAGEMAP_SCAN (6.7): tells a read of the zero page from data.
  bool cachestat = false;          ///< Holes of shared files can be confirmed (6.5).
  bool thp_always = false;         ///< Memory gets huge pages without being advised.
  bool shmem_thp = false;          ///< Shared memory can get them.
  bool map_files = false;          ///< /proc/self/map_files can be opened.
  bool files_by_fstat = false;     ///< fstat and /proc/self/maps name a temporary file the same.
  bool files_in_memory = false;    ///< Temporary files are on tmpfs.
  bool files_tell_holes = false;   ///< SEEK_HOLE works on them.
  std::uint64_t file_block = 4096; ///< In bytes.
};
[[nodiscard]] const KernelFacts& kernel_facts();

} // namespace cppvmm::oracle
