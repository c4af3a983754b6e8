module;
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <optional>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:shared_anonymous.impl;
import :address;
import :book_files;
import :error;
import :evidence;
import :page_evidence;
import :proc_maps;

namespace cppvmm {

RegionEvidence shared_anonymous_evidence(const void* host, std::uint64_t bytes, EvidenceSource source) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  RegionEvidence result;
  const auto fail = [&](const char* operation, int os_error) {
    result.kind = Evidence::none;
    result.error = MemoryError{
        .code = MemoryErrc::os, .address = start, .length = bytes, .os_error = os_error, .operation = operation};
  };
  std::uint64_t listed = start;
  auto walked = for_each_listed_mapping(start, bytes, [&](const ListedMapping& mapping) {
    const std::uint64_t from = std::max<std::uint64_t>(start, mapping.start);
    const std::uint64_t to = std::min<std::uint64_t>(start + bytes, mapping.end);
    // One that is listed twice has changed meanwhile, and so may have the file behind it.
    if (from != listed) {
      fail("list the mappings of shared anonymous memory once each", 0);
      return false;
    }
    listed = to;
    // Only this directory leads to the file behind the mapping, and only for a privileged process.
    const BookFile file = open_shared_memory(mapping.start, mapping.end,
                                             makedev(mapping.device_major, mapping.device_minor), mapping.inode);
    if (!file.is_open()) {
      fail("open /proc/self/map_files", errno);
      return false;
    }
    struct stat status{};
    RegionEvidence part;
    if (fstat(file.number(), &status) == 0 && status.st_ino == mapping.inode)
      part = page_cache_evidence({.fd = file.number(),
                                  .offset = mapping.offset + (from - mapping.start),
                                  .host = reinterpret_cast<const void*>(from),
                                  .bytes = to - from},
                                 FileChanges::any_time, source);
    result.unaccounted_pages += part.unaccounted_pages;
    if (part.kind == Evidence::none) {
      fail("survey of shared anonymous memory", 0);
      if (part.error) result.error = part.error;
      return false;
    }
    result.kind = part.kind;
    for (ExtentList& list : part.touched) {
      list.shift_up((from - start) / page_size);
      result.touched.push_back(std::move(list));
    }
    return true;
  });
  if (!walked) {
    result.kind = Evidence::none;
    result.error = walked.error();
  }
  return result;
}

} // namespace cppvmm
