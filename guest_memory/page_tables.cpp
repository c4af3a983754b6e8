module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <vector>
module cppvmm.guest_memory:page_tables.impl;
import :address;
import :error;
import :evidence;
import :extents;
import :survey;

namespace cppvmm {

// The PAGEMAP_SCAN interface of include/uapi/linux/fs.h (Linux 6.7), which the headers of older distributions lack.
struct PageRegion {
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t categories;
};

struct PageScan {
  std::uint64_t size;
  std::uint64_t flags;
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t walk_end;
  std::uint64_t vec;
  std::uint64_t vec_len;
  std::uint64_t max_pages;
  std::uint64_t category_inverted;
  std::uint64_t category_mask;
  std::uint64_t category_anyof_mask;
  std::uint64_t return_mask;
};
static_assert(sizeof(PageScan) == 96 && sizeof(PageRegion) == 24);

constexpr unsigned long pagemap_scan_request = _IOWR('f', 16, PageScan);
constexpr std::uint64_t page_is_file = 1 << 2;
constexpr std::uint64_t page_is_present = 1 << 3;
constexpr std::uint64_t page_is_swapped = 1 << 4;
constexpr std::uint64_t page_is_pfnzero = 1 << 5;

// /proc/pid/pagemap entries (Documentation/admin-guide/mm/pagemap.rst).
constexpr std::uint64_t pagemap_present = std::uint64_t{1} << 63;
constexpr std::uint64_t pagemap_swapped = std::uint64_t{1} << 62;
constexpr std::uint64_t pagemap_file = std::uint64_t{1} << 61;

static RegionEvidence no_evidence(const char* operation, std::uint64_t host, std::uint64_t bytes, int os_error) {
  RegionEvidence result;
  result.error = MemoryError{
      .code = MemoryErrc::os, .address = host, .length = bytes, .os_error = os_error, .operation = operation};
  return result;
}

static RegionEvidence scan(int pagemap, std::uint64_t host, std::uint64_t bytes, PageEntries entries) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_scan;
  ExtentList& touched = result.touched.emplace_back();
  std::vector<PageRegion> found(4096);
  const std::uint64_t end = host + bytes;
  for (std::uint64_t at = host; at < end;) {
    PageScan scan{};
    scan.size = sizeof scan;
    scan.start = at;
    scan.end = end;
    scan.vec = reinterpret_cast<std::uintptr_t>(found.data());
    scan.vec_len = found.size();
    // An entry of any kind, but for the shared zero page: what is swapped out or being migrated shows as swapped.
    const std::uint64_t without = page_is_pfnzero | (entries == PageEntries::private_copies ? page_is_file : 0);
    scan.category_inverted = without;
    scan.category_mask = without;
    scan.category_anyof_mask = page_is_present | page_is_swapped;
    scan.return_mask = page_is_present | page_is_swapped;
    const int count = ioctl(pagemap, pagemap_scan_request, &scan);
    if (count < 0) {
      if (errno == EINTR) continue;
      return no_evidence("PAGEMAP_SCAN", at, end - at, errno);
    }
    const auto regions = std::min(static_cast<std::size_t>(count), found.size());
    for (std::size_t i = 0; i < regions; ++i)
      touched.add({(found[i].start - host) / page_size, (found[i].end - found[i].start) / page_size});
    // Room left in the vector: the end was reached. walk_end does not tell, for it can be stale. Otherwise everything
    // below the end of the last region has been reported.
    if (regions < found.size()) break;
    at = found[regions - 1].end;
  }
  return result;
}

static RegionEvidence read_entries(int pagemap, std::uint64_t host, std::uint64_t bytes, PageEntries counted) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_read;
  ExtentList& touched = result.touched.emplace_back();
  std::vector<std::uint64_t> entries(std::min<std::uint64_t>(bytes / page_size, 65536));
  for (std::uint64_t page = 0; page < bytes / page_size;) {
    const std::uint64_t wanted = std::min<std::uint64_t>(entries.size(), bytes / page_size - page);
    const auto offset = static_cast<off_t>((host / page_size + page) * sizeof(std::uint64_t));
    const ssize_t got = pread(pagemap, entries.data(), wanted * sizeof(std::uint64_t), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < static_cast<ssize_t>(sizeof(std::uint64_t)))
      return no_evidence("read /proc/self/pagemap", host, bytes, got < 0 ? errno : 0);
    const auto complete = static_cast<std::uint64_t>(got) / sizeof(std::uint64_t);
    for (std::uint64_t i = 0; i < complete; ++i)
      if ((entries[i] & (pagemap_present | pagemap_swapped)) != 0 &&
          (counted == PageEntries::all || (entries[i] & pagemap_file) == 0))
        touched.add({page + i, 1});
    page += complete;
  }
  return result;
}

RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, PageEntries entries, EvidenceSource source) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  // Opened for each survey: the descriptor stays tied to the address space that opened it, and this process may be a
  // fork of the one that opened an earlier one.
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return no_evidence("open /proc/self/pagemap", start, bytes, errno);
  RegionEvidence result;
  if (source == EvidenceSource::automatic) result = scan(pagemap, start, bytes, entries);
  // A kernel without the ioctl says ENOTTY, a sandbox something else.
  if (result.kind == Evidence::none) result = read_entries(pagemap, start, bytes, entries);
  close(pagemap);
  return result;
}

} // namespace cppvmm
