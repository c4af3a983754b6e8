module;
#include <cstdint>
#include <expected>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:file_data;
import :region;

namespace cppvmm {

/// What was read of a file that does not change, when a region of it was made: it stays true.
struct FileData {
  /// Those that are not known to read zero, in pages from the region's start.
  ExtentList pages;
  /// How many of them were not read.
  std::uint64_t unread_pages = 0;

  /// What is known of a region's file: null where nothing was read.
  [[nodiscard]] static const FileData* of(const Region& region);
};

/// Part of a file, in bytes: multiples of 4 KiB.
struct FilePart {
  int fd = -1;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// Reads it through the descriptor, from its start on, up to `most_bytes` and to the first read that fails.
[[nodiscard]] FileData read_file_data(const FilePart& part, std::uint64_t most_bytes);

/// The same of a hugetlbfs file, by huge pages of `huge_page` bytes; one that has no memory at all is not read.
[[nodiscard]] FileData read_hugetlb_file_data(const FilePart& part, std::uint64_t huge_page, std::uint64_t most_bytes);

/// How large a file or block device is, in bytes; or errno.
[[nodiscard]] std::expected<std::uint64_t, int> file_bytes(int fd);

} // namespace cppvmm
