module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <sys/mman.h>
#include <sys/stat.h>
#include <vector>
module cppvmm.guest_memory:hugetlb.impl;
import :address;
import :error;
import :evidence;
import :extents;
import :survey;

namespace cppvmm {

static RegionEvidence failed(const char* operation, const void* host, std::uint64_t bytes, int os_error) {
  RegionEvidence result;
  result.error = MemoryError{.code = MemoryErrc::os,
                             .address = reinterpret_cast<std::uintptr_t>(host),
                             .length = bytes,
                             .os_error = os_error,
                             .operation = operation};
  return result;
}

/// For kernels without PAGEMAP_SCAN: there, /proc/self/pagemap shows no entry for a huge page in migration, and
/// mincore(2) does. Of hugetlb memory it looks at the page tables alone, and nothing is ever swapped.
static RegionEvidence resident_evidence(const void* host, std::uint64_t bytes) {
  RegionEvidence result;
  result.kind = Evidence::page_residency;
  ExtentList& touched = result.touched.emplace_back();
  const std::uint64_t pages = bytes / page_size;
  std::vector<unsigned char> resident(std::min<std::uint64_t>(pages, 1 << 18));
  for (std::uint64_t page = 0; page < pages;) {
    const std::uint64_t count = std::min<std::uint64_t>(resident.size(), pages - page);
    auto* const at = static_cast<std::byte*>(const_cast<void*>(host)) + page * page_size;
    if (mincore(at, count * page_size, resident.data()) != 0) return failed("mincore", host, bytes, errno);
    for (std::uint64_t i = 0; i < count; ++i)
      if ((resident[i] & 1) != 0) touched.add({page + i, 1});
    page += count;
  }
  return result;
}

RegionEvidence hugetlb_evidence(const void* host, std::uint64_t bytes, EvidenceSource source) {
  if (source == EvidenceSource::automatic) {
    RegionEvidence scanned = page_table_evidence(host, bytes, PageEntries::all, source);
    if (scanned.kind == Evidence::page_tables_scan) return scanned;
  }
  return resident_evidence(host, bytes);
}

/// At least so many pages are in both.
static std::uint64_t common_pages(const ExtentList& left, const ExtentList& right) {
  std::uint64_t pages = 0;
  for (auto l = left.extents().begin(), r = right.extents().begin();
       l != left.extents().end() && r != right.extents().end();) {
    const std::uint64_t first = std::max(l->first, r->first);
    const std::uint64_t end = std::min(l->end(), r->end());
    if (first < end) pages += end - first;
    if (l->end() < r->end())
      ++l;
    else
      ++r;
  }
  // Gaps that were given up are in the extents, and are no pages.
  return pages - std::min(pages, left.given_up_pages() + right.given_up_pages());
}

RegionEvidence hugetlb_file_evidence(const FileMapping& mapping, EvidenceSource source) {
  RegionEvidence result = hugetlb_evidence(mapping.host, mapping.bytes, source);
  if (result.kind == Evidence::none) return result;
  struct stat status{};
  if (fstat(mapping.fd, &status) != 0) return failed("fstat of a hugetlb file", mapping.host, mapping.bytes, errno);
  // A page that was discarded before the blocks were counted would stand for one that another process wrote: only what
  // is mapped before and after was so in between.
  RegionEvidence after = hugetlb_evidence(mapping.host, mapping.bytes, source);
  if (after.kind == Evidence::none) return after;
  const std::uint64_t mapped = common_pages(result.touched.front(), after.touched.front());
  const auto allocated = static_cast<std::uint64_t>(status.st_blocks) * 512 / page_size;
  // What is allocated and not mapped here was written by another process, or lies in another part of the file: where,
  // nobody tells.
  if (allocated > mapped) {
    result.unaccounted_pages = allocated - mapped;
    result.kind = Evidence::none;
  } else {
    result.kind = Evidence::mapped_blocks;
  }
  return result;
}

} // namespace cppvmm
