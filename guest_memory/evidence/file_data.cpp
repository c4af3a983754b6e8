module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <linux/fs.h>
#include <memory>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:file_data.impl;
import :address;
import :error;
import :evidence;
import :file_data;
import :mapping;
import :page_evidence;
import :region;
import :zero_scan;

namespace cppvmm {

static constexpr std::size_t pages_at_a_time = 64;

/// Page-aligned, for a descriptor may be one that reads past the page cache (O_DIRECT).
struct ReadBuffer {
  alignas(page_size) std::array<std::byte, pages_at_a_time * page_size> bytes;
};

FileData read_file_data(const FilePart& part, std::uint64_t most_bytes) {
  FileData found;
  const auto buffer = std::make_unique<ReadBuffer>();
  const ZeroScan scan = resolve(ZeroScan::automatic);
  const std::uint64_t end = std::min(part.bytes, most_bytes) / page_size;
  std::uint64_t at = 0;
  while (at < end) {
    const std::uint64_t wanted = std::min<std::uint64_t>(pages_at_a_time, end - at);
    const ssize_t got =
        pread(part.fd, buffer->bytes.data(), wanted * page_size, static_cast<off_t>(part.offset + at * page_size));
    if (got < 0 && errno == EINTR) continue;
    const std::uint64_t pages = got < 0 ? 0 : static_cast<std::uint64_t>(got) / page_size;
    if (pages == 0) break;
    for (std::uint64_t i = 0; i < pages; ++i)
      if (content_of_page(scan, buffer->bytes.data() + i * page_size) != PageContent::zero)
        found.pages.add({at + i, 1});
    at += pages;
  }
  found.unread_pages = part.bytes / page_size - at;
  if (found.unread_pages > 0) found.pages.add({at, found.unread_pages});
  return found;
}

/// Widens extents to the huge pages of the file that they are of, within the part.
static ExtentList whole_huge_pages(const ExtentList& pages, const FilePart& part, std::uint64_t huge_page) {
  ExtentList whole;
  const std::uint64_t before = part.offset % huge_page / page_size; // pages of the first huge page before the part
  const std::uint64_t unit = huge_page / page_size;
  const std::uint64_t count = part.bytes / page_size;
  for (const Extent extent : pages) {
    const std::uint64_t first = (extent.first + before) / unit * unit;
    const std::uint64_t end = (extent.end() + before + unit - 1) / unit * unit;
    const std::uint64_t from = first > before ? first - before : 0;
    whole.add({from, std::min(end - before, count) - from});
  }
  return whole;
}

// A page of a hugetlbfs file is in the page cache and nowhere else, and st_blocks counts these pages
// (hugetlb_add_to_page_cache and hugetlb_unreserve_pages in mm/hugetlb.c). Reading waits for a page that is being
// moved: hugetlbfs_read_iter in fs/hugetlbfs/inode.c takes the page's lock, and its slot is never empty meanwhile.
FileData read_hugetlb_file_data(const FilePart& part, std::uint64_t huge_page, std::uint64_t most_bytes) {
  struct stat status{};
  FileData found;
  if (fstat(part.fd, &status) == 0 && status.st_blocks == 0) return found;
  found = read_file_data(part, most_bytes);
  found.pages = whole_huge_pages(found.pages, part, huge_page);
  return found;
}

RegionEvidence file_data_evidence(const FileData& data) {
  RegionEvidence result;
  result.kind = Evidence::file_content;
  result.unaccounted_pages = data.unread_pages;
  result.touched.push_back(data.pages);
  return result;
}

const FileData* FileData::of(const Region& region) { return region.mapping_->file_data.get(); }

std::expected<std::uint64_t, int> file_bytes(int fd) {
  struct stat status{};
  if (fstat(fd, &status) != 0) return std::unexpected(errno);
  if (!S_ISBLK(status.st_mode)) return static_cast<std::uint64_t>(status.st_size);
  std::uint64_t bytes = 0;
  if (ioctl(fd, BLKGETSIZE64, &bytes) != 0) return std::unexpected(errno);
  return bytes;
}

} // namespace cppvmm
