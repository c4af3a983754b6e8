module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <functional>
#include <string_view>
#include <sys/stat.h>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:resident.impl;
import :address;
import :backing;
import :error;
import :evidence;
import :mapping;
import :page_evidence;
import :proc_maps;
import :region;

namespace cppvmm {

MemoryResult<std::uint64_t> Region::resident_bytes() const {
  if (is_adopted()) {
    if (traits_of(backing()).is_hugetlb) {
      const auto resident = hugetlb_resident(host_address(), bytes());
      if (!resident) return std::unexpected(resident.error());
      return resident->page_count() * page_size;
    }
    const auto pages = page_table_evidence(host_address(), bytes(), PageEntries::all, EvidenceSource::automatic);
    if (pages.error) return std::unexpected(*pages.error);
    std::uint64_t count = 0;
    for (const ExtentList& list : pages.touched)
      count += list.page_count();
    return count * page_size;
  }
  if (traits_of(backing()).has_file && !traits_of(backing()).is_private) {
    struct stat status{};
    if (fstat(file_descriptor(), &status) != 0)
      return refuse_region(MemoryErrc::os, start(), bytes(), "fstat of a memfd", errno);
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
  }
  return sum_smaps(reinterpret_cast<std::uintptr_t>(host_address()), bytes(), [](std::string_view field) {
    return field == "Rss" || field == "Private_Hugetlb" || field == "Shared_Hugetlb";
  });
}

MemoryResult<std::uint64_t> Region::huge_page_bytes() const {
  return sum_smaps(reinterpret_cast<std::uintptr_t>(host_address()), bytes(),
                   [](std::string_view field) { return field == "AnonHugePages" || field == "ShmemPmdMapped"; });
}

} // namespace cppvmm
