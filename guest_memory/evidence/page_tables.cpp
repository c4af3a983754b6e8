module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <linux/ioctl.h>
#include <optional>
#include <span>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <type_traits>
#include <unistd.h>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:page_tables.impl;
import :address;
import :book_files;
import :error;
import :evidence;
import :markers;
import :page_evidence;
import :survey_stop;

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

/// What a scan looks for: page is a match if its categories, those of `inverted` turned over, hold all of `all_of` and
/// one of `any_of`.
struct ScanFor {
  std::uint64_t inverted = 0;
  std::uint64_t all_of = 0;
  std::uint64_t any_of = 0;
  std::uint64_t flags = 0;
  std::uint64_t told = 0; ///< Categories by which runs are told apart, besides those of `any_of`.
};

/// Calls `found` for each run of matching pages, ascending, in pages from `host` on; with its categories, if it takes
/// them.
template <class Found>
static std::optional<MemoryError> scan_pages(int pagemap, std::uint64_t host, std::uint64_t bytes, const ScanFor& what,
                                             Found found) {
  std::vector<PageRegion> regions(4096);
  const std::uint64_t end = host + bytes;
  // So much takes some 50 ms at most: where that can matter, from one multiple of it to the next.
  constexpr std::uint64_t piece = std::uint64_t{1} << 34;
  const bool is_in_pieces = may_survey_stop();
  for (std::uint64_t at = host; at < end;) {
    if (is_survey_stopped()) return survey_stopped(host, bytes);
    const std::uint64_t piece_end = is_in_pieces ? std::min(end, (at / piece + 1) * piece) : end;
    PageScan scan{};
    scan.size = sizeof scan;
    scan.flags = what.flags;
    scan.start = at;
    scan.end = piece_end;
    scan.vec = reinterpret_cast<std::uintptr_t>(regions.data());
    scan.vec_len = regions.size();
    scan.category_inverted = what.inverted;
    scan.category_mask = what.all_of;
    scan.category_anyof_mask = what.any_of;
    scan.return_mask = what.any_of | what.told;
    const int count = ioctl(pagemap, pagemap_scan_request, &scan);
    if (count < 0) {
      if (errno == EINTR) continue;
      return MemoryError{
          .code = MemoryErrc::os, .address = at, .length = end - at, .os_error = errno, .operation = "PAGEMAP_SCAN"};
    }
    const auto filled = std::min(static_cast<std::size_t>(count), regions.size());
    for (std::size_t i = 0; i < filled; ++i) {
      const Extent run{(regions[i].start - host) / page_size, (regions[i].end - regions[i].start) / page_size};
      if constexpr (std::is_invocable_v<Found, Extent, std::uint64_t>)
        found(run, regions[i].categories);
      else
        found(run);
    }
    // Room left in the vector: the end was reached. walk_end does not tell, for it can be stale. Otherwise everything
    // below the end of the last region has been reported.
    at = filled < regions.size() ? piece_end : regions[filled - 1].end;
  }
  return std::nullopt;
}

/// Of one page table: 0, or errno.
static int read_table(int pagemap, std::uint64_t page, std::span<std::uint64_t> entries) {
  constexpr int most_attempts = 64;
  for (int attempt = 0; attempt < most_attempts; ++attempt) {
    const ssize_t got =
        pread(pagemap, entries.data(), entries.size_bytes(), static_cast<off_t>(page * sizeof(std::uint64_t)));
    if (got == static_cast<ssize_t>(entries.size_bytes())) return 0;
    if (got < 0 && errno != EINTR) return errno;
  }
  return EAGAIN;
}

int read_pagemap(int pagemap, std::uint64_t address, std::span<std::uint64_t> entries) {
  constexpr std::uint64_t entries_of_table = 512;
  for (std::uint64_t page = address / page_size; !entries.empty();) {
    const auto part =
        entries.first(std::min<std::uint64_t>(entries.size(), entries_of_table - page % entries_of_table));
    if (const int error = read_table(pagemap, page, part)) return error;
    page += part.size();
    entries = entries.subspan(part.size());
  }
  return 0;
}

/// Calls `visit` for each page of `pages`, ascending, with its entry.
template <class Visit>
static std::optional<MemoryError> for_each_entry(int pagemap, std::uint64_t host, Extent pages, Visit visit) {
  constexpr std::uint64_t at_a_time = 32768;
  std::vector<std::uint64_t> room(std::min(pages.count, at_a_time));
  for (std::uint64_t page = pages.first; page < pages.end(); page += at_a_time) {
    if (is_survey_stopped()) return survey_stopped(host, pages.end() * page_size);
    const auto entries = std::span(room).first(std::min(at_a_time, pages.end() - page));
    if (const int error = read_pagemap(pagemap, host + page * page_size, entries))
      return no_evidence("read /proc/self/pagemap", host, pages.end() * page_size, error).error;
    for (std::uint64_t i = 0; i < entries.size(); ++i)
      visit(page + i, entries[i]);
  }
  return std::nullopt;
}

/// Adds those of `pages` that are something else than write protection of no page. Each that is left out was so at the
/// moment when its entry was read.
static std::optional<MemoryError> add_unmarked(int pagemap, std::uint64_t host, const ExtentList& pages,
                                               ExtentList& touched) {
  const auto marker = pages.empty() ? std::nullopt : write_protect_marker(pagemap);
  for (const Extent extent : pages) {
    if (!marker) {
      touched.add(extent);
      continue;
    }
    auto error = for_each_entry(pagemap, host, extent, [&](std::uint64_t page, std::uint64_t entry) {
      if (!is_marker(entry, *marker)) touched.add({page, 1});
    });
    if (error) return error;
  }
  return std::nullopt;
}

static RegionEvidence scan(int pagemap, std::uint64_t host, std::uint64_t bytes, PageEntries entries) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_scan;
  ExtentList touched;
  // An entry of any kind, but for the shared zero page: what is swapped out or being migrated shows as swapped.
  const std::uint64_t without = page_is_pfnzero | (entries == PageEntries::private_copies ? page_is_file : 0);
  const ScanFor what{.inverted = without,
                     .all_of = without,
                     .any_of = page_is_present | page_is_swapped,
                     .told = page_is_written | (entries == PageEntries::small_pages ? page_is_huge : 0)};
  bool found_huge = false;
  // Write-protected, and not present: swapped out, being moved, broken, or no page at all.
  ExtentList absent;
  auto error = scan_pages(pagemap, host, bytes, what, [&](Extent extent, std::uint64_t categories) {
    const bool may_be_marker = entries != PageEntries::all && (categories & (page_is_present | page_is_written)) == 0;
    (may_be_marker ? absent : touched).add(extent);
    found_huge = found_huge || (categories & page_is_huge) != 0;
  });
  ExtentList unmarked;
  if (!error) error = add_unmarked(pagemap, host, absent, unmarked);
  result.touched.push_back(std::move(touched));
  if (!unmarked.empty()) result.touched.push_back(std::move(unmarked));
  if (!error && found_huge)
    error = MemoryError{.code = MemoryErrc::unavailable,
                        .address = host,
                        .length = bytes,
                        .operation = "survey of memory that was to get no huge pages, and got some"};
  if (error) {
    result.kind = Evidence::none;
    result.touched.clear();
    result.error = error;
  }
  return result;
}

MemoryResult<ExtentList> written_pages(const void* host, std::uint64_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const BookFile pagemap = open_page_tables();
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
  const BookFile pagemap = open_page_tables();
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

static bool counts(std::uint64_t entry, PageEntries counted) {
  switch (counted) {
  case PageEntries::private_copies:
    if ((entry & pagemap_file) != 0) return false;
    break;
  case PageEntries::all:
  case PageEntries::pages:
  case PageEntries::small_pages:
    break;
  }
  return (entry & (pagemap_present | pagemap_swapped)) != 0;
}

static RegionEvidence read_entries(int pagemap, std::uint64_t host, std::uint64_t bytes, PageEntries counted) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_read;
  ExtentList& touched = result.touched.emplace_back();
  // Looked up when there is something that may be one.
  std::optional<std::optional<std::uint64_t>> marker;
  const auto is_marked = [&](std::uint64_t entry) {
    if (counted == PageEntries::all || (entry & pagemap_write_protected) == 0) return false;
    if (!marker) marker = write_protect_marker(pagemap);
    return *marker && is_marker(entry, **marker);
  };
  const auto error =
      for_each_entry(pagemap, host, {0, bytes / page_size}, [&](std::uint64_t page, std::uint64_t entry) {
        if (counts(entry, counted) && !is_marked(entry)) touched.add({page, 1});
      });
  if (!error) return result;
  RegionEvidence refused;
  refused.error = error;
  return refused;
}

/// Entries of no page, by whether they are write-protected.
struct NoPages {
  ExtentList plain;
  ExtentList guarded;
};

static std::optional<MemoryError> find_no_pages(int pagemap, std::uint64_t host, std::uint64_t bytes,
                                                EvidenceSource source, NoPages& found) {
  const ScanFor absent{.inverted = page_is_present,
                       .all_of = page_is_present | page_is_swapped,
                       .any_of = page_is_swapped,
                       .told = page_is_written};
  const auto add = [&](Extent extent, std::uint64_t categories) {
    ((categories & page_is_written) != 0 ? found.plain : found.guarded).add(extent);
  };
  if (source == EvidenceSource::automatic && !scan_pages(pagemap, host, bytes, absent, add)) return std::nullopt;
  found.plain = ExtentList();
  found.guarded = ExtentList();
  return for_each_entry(pagemap, host, {0, bytes / page_size}, [&](std::uint64_t page, std::uint64_t entry) {
    if ((entry & (pagemap_present | pagemap_swapped)) == pagemap_swapped)
      add({page, 1}, (entry & pagemap_write_protected) != 0 ? 0 : page_is_written);
  });
}

/// Those of write-protected entries that may be more than the memory of that. A page that was lost to a memory error
/// can be protected too (mm/mprotect.c, change_pte_range), and mincore(2) takes its entry for a page. A marker is none
/// to it where the page cache has no page there (mm/mincore.c, mincore_pte_range and mincore_hugetlb); where it has
/// one, the entry itself tells those who may see it. What cannot be told counts.
static std::optional<MemoryError> add_lost(int pagemap, std::uint64_t host, const ExtentList& guarded,
                                           ExtentList& lost) {
  ExtentList resident;
  std::vector<unsigned char> flags;
  for (const Extent extent : guarded) {
    for (std::uint64_t page = extent.first; page < extent.end();) {
      if (is_survey_stopped()) return survey_stopped(host, extent.end() * page_size);
      const std::uint64_t count = std::min<std::uint64_t>(extent.end() - page, 65536);
      flags.resize(std::max<std::size_t>(flags.size(), count));
      if (mincore(reinterpret_cast<void*>(host + page * page_size), count * page_size, flags.data()) != 0)
        resident.add({page, count});
      else
        for (std::uint64_t i = 0; i < count; ++i)
          if ((flags[i] & 1) != 0) resident.add({page + i, 1});
      page += count;
    }
  }
  return add_unmarked(pagemap, host, resident, lost);
}

MemoryResult<std::vector<ExtentList>> broken_entries(const void* host, std::uint64_t bytes, EvidenceSource source) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const BookFile pagemap = open_page_tables();
  if (!pagemap.is_open()) return std::unexpected(*no_evidence("open /proc/self/pagemap", start, bytes, errno).error);
  NoPages found;
  if (const auto error = find_no_pages(pagemap.number(), start, bytes, source, found)) return std::unexpected(*error);
  std::vector<ExtentList> lists;
  lists.push_back(std::move(found.plain));
  if (const auto error = add_lost(pagemap.number(), start, found.guarded, lists.emplace_back()))
    return std::unexpected(*error);
  return lists;
}

/// By a read fault through no pointer, which fails where a load would be a signal (mm/madvise.c, madvise_populate).
static bool are_readable(std::uint64_t host, Extent pages) {
  constexpr int populate_read = 22; // MADV_POPULATE_READ, which the headers of older distributions lack
  return madvise(reinterpret_cast<void*>(host + pages.first * page_size), pages.count * page_size, populate_read) == 0;
}

MemoryResult<ExtentList> unreadable_pages(const void* host, std::span<const Extent> pages) {
  constexpr std::uint64_t at_a_time = 512;
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  ExtentList unreadable;
  std::array<unsigned char, at_a_time> flags{};
  for (const Extent& extent : pages)
    for (std::uint64_t first = extent.first; first < extent.end(); first += at_a_time) {
      if (is_survey_stopped()) return std::unexpected(survey_stopped(start, extent.end() * page_size));
      const std::uint64_t end = std::min(first + at_a_time, extent.end());
      // What was lost to a memory error is a page to it too; no marker is, and what is swapped out only where the swap
      // cache has it (mm/mincore.c, mincore_pte_range).
      if (mincore(reinterpret_cast<void*>(start + first * page_size), (end - first) * page_size, flags.data()) != 0) {
        unreadable.add({first, end - first});
        continue;
      }
      for (std::uint64_t page = first; page < end;) {
        const bool is_resident = (flags[page - first] & 1) != 0;
        Extent run{page, 1};
        while (run.end() < end && ((flags[run.end() - first] & 1) != 0) == is_resident)
          ++run.count;
        if (!is_resident) {
          unreadable.add(run);
        } else if (!are_readable(start, run)) {
          // One that is not hides the others.
          for (std::uint64_t each = run.first; each < run.end(); ++each)
            if (!are_readable(start, {each, 1})) unreadable.add({each, 1});
        }
        page = run.end();
      }
    }
  return unreadable;
}

MemoryResult<bool> has_huge_entries(const void* host, std::uint64_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const BookFile pagemap = open_page_tables();
  if (!pagemap.is_open()) return std::unexpected(*no_evidence("open /proc/self/pagemap", start, bytes, errno).error);
  bool found = false;
  const ScanFor huge{.any_of = page_is_huge};
  if (const auto error = scan_pages(pagemap.number(), start, bytes, huge, [&](Extent) { found = true; }))
    return std::unexpected(*error);
  return found;
}

RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, PageEntries entries, EvidenceSource source) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  const BookFile pagemap = open_page_tables();
  if (!pagemap.is_open()) return no_evidence("open /proc/self/pagemap", start, bytes, errno);
  RegionEvidence result;
  if (source == EvidenceSource::automatic) result = scan(pagemap.number(), start, bytes, entries);
  // A kernel without the ioctl says ENOTTY, a sandbox something else. Reading does not tell huge pages.
  if (result.kind == Evidence::none && entries != PageEntries::small_pages)
    result = read_entries(pagemap.number(), start, bytes, entries);
  return result;
}

} // namespace cppvmm
