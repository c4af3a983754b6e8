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
import :descriptor;
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
constexpr std::uint64_t page_is_huge = 1 << 6;
constexpr std::uint64_t scan_wp_matching = 1 << 0;
constexpr std::uint64_t scan_check_wp_async = 1 << 1; // EPERM where memory is not watched

static RegionEvidence no_evidence(const char* operation, std::uint64_t host, std::uint64_t bytes, int os_error) {
  RegionEvidence result;
  result.error = MemoryError{
      .code = MemoryErrc::os, .address = host, .length = bytes, .os_error = os_error, .operation = operation};
  return result;
}

/// /proc/self/pagemap. Opened for each look: the descriptor stays tied to the address space that opened it, and this
/// process may be a fork of the one that opened an earlier one.
static Descriptor open_pagemap() { return Descriptor(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)); }

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
  const Descriptor pagemap = open_pagemap();
  if (!pagemap.is_open()) return std::unexpected(*no_evidence("open /proc/self/pagemap", start, bytes, errno).error);
  // Asked for what is unwritten, not for what is written: of shared memory, the entry of a page that was written can be
  // gone, while one that was not keeps its protection (as a marker, which counts as swapped).
  const ScanFor unwritten{.inverted = page_is_written,
                          .all_of = page_is_written,
                          .any_of = page_is_present | page_is_swapped,
                          .flags = scan_check_wp_async};
  ExtentList written;
  std::uint64_t at = 0;
  const auto error = scan_pages(pagemap.number(), start, bytes, unwritten, [&](Extent extent) {
    if (extent.first > at) written.add({at, extent.first - at});
    at = std::max(at, extent.end());
  });
  if (error) return std::unexpected(*error);
  if (const std::uint64_t end = bytes / page_size; at < end) written.add({at, end - at});
  return written;
}

/// The same of a part whose page tables are all there.
static std::optional<MemoryError> scan_locked(int pagemap, std::uint64_t host, Extent part, ExtentList& occupied) {
  // What is asked for is what has no entry, so that no page matches that could be protected.
  constexpr std::uint64_t any_entry = page_is_present | page_is_swapped;
  const ScanFor absent{.inverted = any_entry, .all_of = any_entry, .flags = scan_wp_matching | scan_check_wp_async};
  // Each call has KVM drop what it maps there, and guests wait until it is done.
  constexpr std::uint64_t at_a_time = std::uint64_t{1} << 22;
  std::uint64_t at = part.first;
  for (std::uint64_t first = part.first; first < part.end(); first += at_a_time) {
    const std::uint64_t count = std::min(at_a_time, part.end() - first);
    const auto error = scan_pages(pagemap, host + first * page_size, count * page_size, absent, [&](Extent extent) {
      extent.first += first;
      if (extent.first > at) occupied.add({at, extent.first - at});
      at = std::max(at, extent.end());
    });
    if (error) return error;
  }
  if (at < part.end()) occupied.add({at, part.end() - at});
  return std::nullopt;
}

MemoryResult<ExtentList> locked_entries(const void* host, std::uint64_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const Descriptor pagemap = open_pagemap();
  if (!pagemap.is_open()) return std::unexpected(*no_evidence("open /proc/self/pagemap", start, bytes, errno).error);
  // Where there is no page table, a scan that takes locks would take one twice and wait for itself for ever. Nothing
  // needs to be locked there: a page table comes with the first page, and stays as long as the mapping.
  const ScanFor without_table{.inverted = page_is_huge, .all_of = page_is_huge, .flags = scan_check_wp_async};
  std::vector<Extent> holes;
  auto error =
      scan_pages(pagemap.number(), start, bytes, without_table, [&](Extent extent) { holes.push_back(extent); });
  ExtentList occupied;
  std::uint64_t at = 0;
  const auto scan_until = [&](std::uint64_t end) {
    if (!error && end > at) error = scan_locked(pagemap.number(), start, {at, end - at}, occupied);
  };
  for (const Extent& hole : holes) {
    scan_until(hole.first);
    at = hole.end();
  }
  scan_until(bytes / page_size);
  if (error) return std::unexpected(*error);
  return occupied;
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
  const Descriptor pagemap = open_pagemap();
  if (!pagemap.is_open()) return no_evidence("open /proc/self/pagemap", start, bytes, errno);
  RegionEvidence result;
  if (source == EvidenceSource::automatic) result = scan(pagemap.number(), start, bytes, entries);
  // A kernel without the ioctl says ENOTTY, a sandbox something else.
  if (result.kind == Evidence::none) result = read_entries(pagemap.number(), start, bytes, entries);
  return result;
}

} // namespace cppvmm
