module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:hugetlb_count.impl;
import :address;
import :book_files;
import :error;
import :evidence;
import :memory_id;
import :page_evidence;
import :proc_maps;
import :survey_stop;
import :userfault;

// Kernels before 6.7 show the entries of huge pages without the page table's lock only, and for a moment of a migration
// or a copy on write there is none. But they count the process's huge pages, with that lock held: if as many are found
// as there are, there is no other. That takes:
// - All huge pages of the process are looked at, for the count is of all.
// - The count is right. fork copies entries of pages in migration and does not count them, and page tables of shared
//   huge pages that processes share are counted by one and taken from another's count: so nothing is concluded in a
//   forked process, nor beside a mapping of shared huge pages.
// - None goes away meanwhile, for another could take its place in the count: discards wait, unmapped memory is noticed.
// - None is found before it is counted: what is found is read once through the kernel, which takes the lock that the
//   fault held until it had counted the page, before the count is looked at.

namespace cppvmm {

/// A private mapping of huge pages.
struct HugeMapping {
  std::uint64_t start = 0;
  std::uint64_t page_bytes = 0;
  bool is_of_file = false; ///< And not anonymous.
  std::vector<bool> found; ///< Of its huge pages: seen to be present.

  [[nodiscard]] std::uint64_t bytes() const { return found.size() * page_bytes; }
  [[nodiscard]] std::uint64_t end() const { return start + bytes(); }
};

/// The region, of which the address and the size are known alone.
struct HugeRegion {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;

  [[nodiscard]] bool overlaps(std::uint64_t first, std::uint64_t end) const {
    return first < start + bytes && start < end;
  }
};

struct HugeMappings {
  std::vector<HugeMapping> of_process;
  bool has_shared = false; ///< There are some that other processes may share.
};

/// A file of huge pages, as it is listed.
struct HugeFile {
  unsigned device_major = 0;
  unsigned device_minor = 0;
  std::uint64_t inode = 0;
  friend bool operator==(const HugeFile&, const HugeFile&) = default;
};

/// Those files that private mappings in the region are of.
static MemoryResult<std::vector<HugeFile>> files_of(const HugeRegion& region) {
  std::vector<HugeFile> files;
  auto walked = for_each_mapping(region.start, region.bytes, [&](const ProcMapping& mapping) {
    const HugeFile file{mapping.device_major, mapping.device_minor, mapping.inode};
    if (mapping.is_private && std::ranges::find(files, file) == files.end()) files.push_back(file);
    return true;
  });
  if (!walked) return std::unexpected(walked.error());
  return files;
}

/// All that is of anonymous memory or of the region's own file. Of other files it is not known that nobody punches
/// holes in them, which takes pages out of private mappings too and tells no userfaultfd (fs/hugetlbfs/inode.c,
/// hugetlb_vmdelete_list): pages of these are not found, so that the count does not fit.
static MemoryResult<HugeMappings> private_huge_mappings(const HugeRegion& region) {
  const auto files = files_of(region);
  if (!files) return std::unexpected(files.error());
  HugeMappings mappings;
  auto walked = for_each_mapping_of_process([&](const ProcMapping& mapping) {
    if (!mapping.is_private && mapping.page_bytes > page_size) mappings.has_shared = true;
    const HugeFile file{mapping.device_major, mapping.device_minor, mapping.inode};
    const bool is_anonymous = mapping.path == "/anon_hugepage (deleted)";
    const bool is_known = is_anonymous || std::ranges::find(*files, file) != files->end();
    if (mapping.is_private && is_known && mapping.page_bytes > page_size)
      mappings.of_process.push_back({.start = mapping.start,
                                     .page_bytes = mapping.page_bytes,
                                     .is_of_file = !is_anonymous,
                                     .found = std::vector<bool>((mapping.end - mapping.start) / mapping.page_bytes)});
    return true;
  });
  if (!walked) return std::unexpected(walked.error());
  return mappings;
}

/// The bytes of all huge pages of the process.
static std::optional<std::uint64_t> counted_bytes() {
  BookText file = open_counts();
  if (!file.is_open()) return std::nullopt;
  std::string text;
  std::array<char, 4096> buffer;
  for (;;) {
    const std::ptrdiff_t got = file.read(buffer.data(), buffer.size());
    if (got < 0) return std::nullopt;
    if (got == 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(got));
  }
  const std::size_t line = text.find("\nHugetlbPages:");
  unsigned long long kib = 0;
  if (line == std::string::npos || std::sscanf(text.c_str() + line, "\nHugetlbPages: %llu kB", &kib) != 1)
    return std::nullopt;
  return kib * 1024;
}

/// Which of the pages a byte can be read of, by the kernel's way to the pages of a process, which waits for migrations
/// to end and takes the page table's lock; or errno. All of them have entries, so that none is allocated for it.
static std::expected<std::vector<bool>, int> read_each(std::span<const std::uint64_t> pages) {
  constexpr std::size_t at_a_time = 512;
  std::vector<bool> can_be_read(pages.size());
  std::array<iovec, at_a_time> there;
  std::array<std::byte, at_a_time> bytes;
  for (std::size_t at = 0; at < pages.size();) {
    const std::size_t count = std::min(at_a_time, pages.size() - at);
    for (std::size_t i = 0; i < count; ++i)
      there[i] = {.iov_base = reinterpret_cast<void*>(pages[at + i]), .iov_len = 1};
    const iovec here{.iov_base = bytes.data(), .iov_len = count};
    const ssize_t got = process_vm_readv(gettid(), &here, 1, there.data(), count, 0);
    if (got < 0 && errno != EFAULT) return std::unexpected(errno);
    const std::size_t read = got < 0 ? 0 : static_cast<std::size_t>(got);
    std::fill_n(can_be_read.begin() + static_cast<std::ptrdiff_t>(at), read, true);
    // The next one is broken.
    at += std::min(read + 1, count);
  }
  return can_be_read;
}

/// 0 if all found pages can be read, else errno.
static int read_found(const std::vector<HugeMapping>& mappings) {
  std::vector<std::uint64_t> pages;
  for (const HugeMapping& mapping : mappings)
    for (std::size_t i = 0; i < mapping.found.size(); ++i)
      if (mapping.found[i]) pages.push_back(mapping.start + i * mapping.page_bytes);
  const auto read = read_each(pages);
  if (!read) return read.error();
  return std::ranges::find(*read, false) == read->end() ? 0 : EFAULT;
}

/// Looks for pages that were not found so far, and reads them: 0, or errno.
static int find_more(int pagemap, std::vector<HugeMapping>& mappings) {
  std::vector<std::uint64_t> pages;
  for (HugeMapping& mapping : mappings) {
    pages.clear();
    for (std::size_t i = 0; i < mapping.found.size(); ++i) {
      const std::uint64_t address = mapping.start + i * mapping.page_bytes;
      unsigned char is_resident = 0;
      if (mapping.found[i]) continue;
      // What is in migration counts here, and markers do not.
      if (mincore(reinterpret_cast<void*>(address), page_size, &is_resident) != 0) return errno;
      if ((is_resident & 1) == 0) continue;
      // Of a file that is not the process's to write, mincore(2) says that all of it is there (mm/mincore.c,
      // can_do_mincore), and what is not would be allocated by being read.
      std::uint64_t entry = pagemap_present;
      if (mapping.is_of_file)
        if (const int error = read_pagemap(pagemap, address, std::span(&entry, 1))) return error;
      if ((entry & pagemap_present) != 0) pages.push_back(address);
    }
    const auto read = read_each(pages);
    if (!read) return read.error();
    for (std::size_t i = 0; i < pages.size(); ++i)
      if ((*read)[i]) mapping.found[(pages[i] - mapping.start) / mapping.page_bytes] = true;
  }
  return 0;
}

static std::uint64_t found_bytes(const std::vector<HugeMapping>& mappings) {
  std::uint64_t bytes = 0;
  for (const HugeMapping& mapping : mappings)
    bytes += static_cast<std::uint64_t>(std::ranges::count(mapping.found, true)) * mapping.page_bytes;
  return bytes;
}

/// Adds the found pages of the region, and what has an entry of another kind, a broken page's for example: 0, or errno.
static int add_found(const HugeMapping& mapping, const HugeRegion& region, ExtentList& touched) {
  for (std::size_t i = 0; i < mapping.found.size(); ++i) {
    const std::uint64_t address = mapping.start + i * mapping.page_bytes;
    const std::uint64_t first = std::max(address, region.start);
    const std::uint64_t end = std::min(address + mapping.page_bytes, region.start + region.bytes);
    if (first >= end) continue;
    unsigned char is_resident = 0;
    if (!mapping.found[i] && mincore(reinterpret_cast<void*>(first), page_size, &is_resident) != 0) return errno;
    if (mapping.found[i] || (is_resident & 1) != 0)
      touched.add({(first - region.start) / page_size, (end - first) / page_size});
  }
  return 0;
}

static RegionEvidence failed(const HugeRegion& region, const char* operation, int number) {
  RegionEvidence result;
  result.error = MemoryError{.code = number == 0 ? MemoryErrc::unavailable : MemoryErrc::os,
                             .address = region.start,
                             .length = region.bytes,
                             .os_error = number,
                             .operation = operation};
  return result;
}

/// The memory that this was loaded in. A process that was forked since has another.
static const std::uint64_t loaded_in = memory_id();

RegionEvidence hugetlb_count_evidence(const void* host, std::uint64_t bytes) {
  const HugeRegion region{reinterpret_cast<std::uintptr_t>(host), bytes};
  if (loaded_in == 0 || memory_id() != loaded_in) return failed(region, "count huge pages in a forked process", 0);
  auto mappings = private_huge_mappings(region);
  if (!mappings) return failed(region, "read /proc/self/smaps", mappings.error().os_error);
  if (mappings->has_shared) return failed(region, "count private huge pages beside shared ones", 0);
  const BookFile pagemap = open_page_tables();
  if (!pagemap.is_open()) return failed(region, "open /proc/self/pagemap", errno);
  auto userfault = Userfault::open(UserfaultUse::held_discards);
  if (!userfault) return failed(region, userfault.error().operation, userfault.error().os_error);
  std::vector<HugeMapping> held;
  held.reserve(mappings->of_process.size());
  for (HugeMapping& mapping : mappings->of_process) {
    const int refused = userfault->add(mapping.start, mapping.bytes());
    if (refused != 0 && region.overlaps(mapping.start, mapping.end()))
      return failed(region, "UFFDIO_REGISTER of huge pages to survey", refused);
    // The pages of one that cannot be registered are not found, and so the count does not fit.
    if (refused == 0) held.push_back(std::move(mapping));
  }

  constexpr int passes = 32;
  // A count that is wrong for good must not cost all of them each time.
  constexpr int most_alike = 8;
  std::uint64_t found = 0;
  std::optional<std::uint64_t> counted;
  int alike = 0;
  for (int pass = 0; pass < passes && alike < most_alike && counted != found; ++pass) {
    if (is_survey_stopped()) {
      RegionEvidence stopped;
      stopped.error = survey_stopped(region.start, region.bytes);
      return stopped;
    }
    // Who has cleared an entry to set it again may wait for a processor.
    if (pass > 1) std::this_thread::sleep_for(std::chrono::microseconds(alike == 0 ? 100 : 400));
    if (const int error = find_more(pagemap.number(), held))
      return failed(region, "a look at huge pages in page tables", error);
    const std::uint64_t found_before = std::exchange(found, found_bytes(held));
    const auto counted_before = std::exchange(counted, counted_bytes());
    if (!counted) return failed(region, "HugetlbPages in /proc/thread-self/status", 0);
    alike = found == found_before && counted == counted_before ? alike + 1 : 0;
  }
  if (counted != found) {
    RegionEvidence result = failed(region, "find as many huge pages as the process has", 0);
    result.unaccounted_pages = std::max<std::uint64_t>(1, *counted > found ? (*counted - found) / page_size : 0);
    return result;
  }
  // They were there all the time, if they are now.
  if (const int error = read_found(held)) return failed(region, "process_vm_readv of huge pages", error);
  // Shared ones that came meanwhile may have changed the count.
  const auto again = private_huge_mappings(region);
  if (!again) return failed(region, "read /proc/self/smaps", again.error().os_error);
  if (again->has_shared) return failed(region, "count private huge pages beside shared ones", 0);
  const bool is_held = std::ranges::all_of(
      held, [&](const HugeMapping& mapping) { return userfault->holds(mapping.start, mapping.bytes()); });
  if (!is_held) return failed(region, "huge pages that were unmapped meanwhile", 0);

  RegionEvidence result;
  result.kind = Evidence::huge_page_count;
  ExtentList& touched = result.touched.emplace_back();
  std::uint64_t covered = 0;
  for (const HugeMapping& mapping : held) {
    if (!region.overlaps(mapping.start, mapping.end())) continue;
    covered += std::min(mapping.end(), region.start + bytes) - std::max(mapping.start, region.start);
    if (const int error = add_found(mapping, region, touched)) return failed(region, "mincore of huge pages", error);
  }
  if (covered != bytes) return failed(region, "private huge pages of which some are not mapped", 0);
  return result;
}

} // namespace cppvmm
