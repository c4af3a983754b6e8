module;
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <expected>
#include <fcntl.h>
#include <functional>
#include <iterator>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:file_mapping.impl;
import :address;
import :error;
import :evidence;
import :extents;
import :proc_maps;
import :survey;

namespace cppvmm {

RegionEvidence shared_anonymous_evidence(const void* host, std::uint64_t bytes, EvidenceSource source) {
  const auto start = reinterpret_cast<std::uintptr_t>(host);
  RegionEvidence result;
  const auto fail = [&](const char* operation, int os_error) {
    result.kind = Evidence::none;
    result.error = MemoryError{
        .code = MemoryErrc::os, .address = start, .length = bytes, .os_error = os_error, .operation = operation};
  };
  auto walked = for_each_mapping(start, bytes, [&](const ProcMapping& mapping) {
    // Only this directory leads to the file behind the mapping, and only for a privileged process.
    char path[96];
    std::snprintf(path, sizeof path, "/proc/self/map_files/%llx-%llx", static_cast<unsigned long long>(mapping.start),
                  static_cast<unsigned long long>(mapping.end));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      fail("open /proc/self/map_files", errno);
      return false;
    }
    const std::uint64_t from = std::max<std::uint64_t>(start, mapping.start);
    const std::uint64_t to = std::min<std::uint64_t>(start + bytes, mapping.end);
    struct stat status{};
    RegionEvidence part;
    if (fstat(fd, &status) == 0 && status.st_ino == mapping.inode)
      part = page_cache_evidence({.fd = fd,
                                  .offset = mapping.offset + (from - mapping.start),
                                  .host = reinterpret_cast<const void*>(from),
                                  .bytes = to - from},
                                 FileChanges::any_time, source);
    close(fd);
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
  if (!walked) fail(walked.error().operation, walked.error().os_error);
  return result;
}

RegionEvidence private_file_evidence(const FileMapping& mapping, EvidenceSource source) {
  RegionEvidence file = page_cache_evidence(mapping, FileChanges::never, source);
  if (file.kind == Evidence::none) return file;
  RegionEvidence copies = page_table_evidence(mapping.host, mapping.bytes, PageEntries::private_copies, source);
  if (copies.kind == Evidence::none) return copies;
  file.kind = Evidence::file_holes;
  std::ranges::move(copies.touched, std::back_inserter(file.touched));
  return file;
}

} // namespace cppvmm
