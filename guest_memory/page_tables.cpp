module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <optional>
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
constexpr std::uint64_t page_is_written = 1 << 1;
constexpr std::uint64_t page_is_file = 1 << 2;
constexpr std::uint64_t page_is_present = 1 << 3;
constexpr std::uint64_t page_is_swapped = 1 << 4;
constexpr std::uint64_t page_is_pfnzero = 1 << 5;
constexpr std::uint64_t scan_check_wp_async = 1 << 1; // EPERM where memory is not watched

static RegionEvidence no_evidence(const char* operation, std::uint64_t host, std::uint64_t bytes, int os_error) {
  RegionEvidence result;
  result.error = MemoryError{
      .code = MemoryErrc::os, .address = host, .length = bytes, .os_error = os_error, .operation = operation};
  return result;
}

/// What a scan looks for: page is a match if its categories, those of `inverted` turned over, hold all of `all_of` and
/// one of `any_of`.
struct ScanFor {
  std::uint64_t inverted = 0;
  std::uint64_t all_of = 0;
  std::uint64_t any_of = 0;
  std::uint64_t flags = 0;
};

/// Calls `found` for each run of matching pages, ascending, in pages from `host` on.
template <class Found>
static std::optional<MemoryError> scan_pages(int pagemap, std::uint64_t host, std::uint64_t bytes, const ScanFor& what,
                                             Found found) {
  std::vector<PageRegion> regions(4096);
  const std::uint64_t end = host + bytes;
  for (std::uint64_t at = host; at < end;) {
    PageScan scan{};
    scan.size = sizeof scan;
    scan.flags = what.flags;
    scan.start = at;
    scan.end = end;
    scan.vec = reinterpret_cast<std::uintptr_t>(regions.data());
    scan.vec_len = regions.size();
    scan.category_inverted = what.inverted;
    scan.category_mask = what.all_of;
    scan.category_anyof_mask = what.any_of;
    scan.return_mask = what.any_of;
    const int count = ioctl(pagemap, pagemap_scan_request, &scan);
    if (count < 0) {
      if (errno == EINTR) continue;
      return MemoryError{
          .code = MemoryErrc::os, .address = at, .length = end - at, .os_error = errno, .operation = "PAGEMAP_SCAN"};
    }
    const auto filled = std::min(static_cast<std::size_t>(count), regions.size());
    for (std::size_t i = 0; i < filled; ++i)
      found(Extent{(regions[i].start - host) / page_size, (regions[i].end - regions[i].start) / page_size});
    // Room left in the vector: the end was reached. walk_end does not tell, for it can be stale. Otherwise everything
    // below the end of the last region has been reported.
    if (filled < regions.size()) break;
    at = regions[filled - 1].end;
  }
  return std::nullopt;
}

static RegionEvidence scan(int pagemap, std::uint64_t host, std::uint64_t bytes, PageEntries entries) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_scan;
  ExtentList& touched = result.touched.emplace_back();
  // An entry of any kind, but for the shared zero page: what is swapped out or being migrated shows as swapped.
  const std::uint64_t without = page_is_pfnzero | (entries == PageEntries::private_copies ? page_is_file : 0);
  const ScanFor what{.inverted = without, .all_of = without, .any_of = page_is_present | page_is_swapped};
  if (auto error = scan_pages(pagemap, host, bytes, what, [&](Extent extent) { touched.add(extent); })) {
    result.kind = Evidence::none;
    result.touched.clear();
    result.error = error;
  }
  return result;
}

MemoryResult<ExtentList> written_pages(const void* host, std::uint64_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return std::unexpected(*no_evidence("open /proc/self/pagemap", start, bytes, errno).error);
  // Asked for what is unwritten, not for what is written: of shared memory, the entry of a page that was written can be
  // gone, while one that was not keeps its protection (as a marker, which counts as swapped).
  const ScanFor unwritten{.inverted = page_is_written,
                          .all_of = page_is_written,
                          .any_of = page_is_present | page_is_swapped,
                          .flags = scan_check_wp_async};
  ExtentList written;
  std::uint64_t at = 0;
  const auto error = scan_pages(pagemap, start, bytes, unwritten, [&](Extent extent) {
    if (extent.first > at) written.add({at, extent.first - at});
    at = std::max(at, extent.end());
  });
  close(pagemap);
  if (error) return std::unexpected(*error);
  if (const std::uint64_t end = bytes / page_size; at < end) written.add({at, end - at});
  return written;
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
