// What of this kernel decides what an answer may miss.
#pragma once

#include <cstdint>

namespace cppvmm::oracle {

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
