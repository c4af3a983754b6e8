module;
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <sys/vfs.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:hugetlb.impl;
import :address;
import :error;
import :evidence;
import :extents;
import :survey;
import :userfault;

namespace cppvmm {

static MemoryError os_error(const char* operation, const void* host, std::uint64_t bytes, int number) {
  return MemoryError{.code = MemoryErrc::os,
                     .address = reinterpret_cast<std::uintptr_t>(host),
                     .length = bytes,
                     .os_error = number,
                     .operation = operation};
}

static RegionEvidence failed(const MemoryError& error) {
  RegionEvidence result;
  result.error = error;
  return result;
}

/// Through a write watch's registration, if there is one, else through one of its own for as long as it takes.
static MemoryResult<ExtentList> registered_entries(const void* host, std::uint64_t bytes) {
  constexpr int attempts = 8;
  for (int attempt = 1;; ++attempt) {
    auto entries = locked_entries(host, bytes);
    if (entries || entries.error().os_error != EPERM) return entries;
    auto userfault = Userfault::open(UserfaultUse::asynchronous);
    if (!userfault) return std::unexpected(userfault.error());
    if (const int refused = userfault->add(reinterpret_cast<std::uintptr_t>(host), bytes)) {
      // By a watch that began meanwhile, it may be.
      if (refused == EBUSY && attempt < attempts) continue;
      return std::unexpected(os_error("UFFDIO_REGISTER of huge pages to survey", host, bytes, refused));
    }
    return locked_entries(host, bytes);
  }
}

static RegionEvidence evidence_of(ExtentList entries) {
  RegionEvidence result;
  result.kind = Evidence::page_tables_scan;
  result.touched.push_back(std::move(entries));
  return result;
}

RegionEvidence hugetlb_evidence(const void* host, std::uint64_t bytes, EvidenceSource source) {
  if (source == EvidenceSource::automatic)
    if (auto entries = registered_entries(host, bytes)) return evidence_of(std::move(*entries));
  RegionEvidence counted = hugetlb_count_evidence(host, bytes);
  if (counted.kind != Evidence::none || !counted.error || counted.error->os_error != EBUSY) return counted;
  // A write watch has it.
  if (auto entries = locked_entries(host, bytes)) return evidence_of(std::move(*entries));
  return counted;
}

/// Adds the pages that the page cache has, each of which is mapped here from then on.
static int look_up(const Userfault& userfault, const FileMapping& mapping, std::uint64_t huge, ExtentList& cached) {
  constexpr int most_waits = 1000;
  const auto host = reinterpret_cast<std::uintptr_t>(mapping.host);
  for (std::uint64_t at = 0; at < mapping.bytes; at += huge) {
    int answer = EAGAIN;
    for (int wait = 0; wait < most_waits && (answer == EAGAIN || answer == EINTR); ++wait)
      answer = userfault.map_cached(host + at, huge);
    switch (answer) {
    case EFAULT: // The one answer that says there is none.
      break;
    case 0:
    case EEXIST:
    case EIO: // It is broken.
      cached.add({at / page_size, huge / page_size});
      break;
    default:
      return answer;
    }
  }
  return 0;
}

RegionEvidence hugetlb_file_evidence(const FileMapping& mapping) {
  const auto fail = [&](const char* operation, int number) {
    return failed(os_error(operation, mapping.host, mapping.bytes, number));
  };
  struct statfs system{};
  if (fstatfs(mapping.fd, &system) != 0) return fail("fstatfs of a hugetlb file", errno);
  const auto huge = static_cast<std::uint64_t>(system.f_bsize);
  if (huge < page_size || mapping.bytes % huge != 0)
    return fail("a hugetlb file whose region is not made of its huge pages", 0);
  auto userfault = Userfault::open(UserfaultUse::lookups);
  if (!userfault) return failed(userfault.error());
  if (const int refused = userfault->add(reinterpret_cast<std::uintptr_t>(mapping.host), mapping.bytes)) {
    // That of an asynchronous watch will do: what is mapped under it counts as written. Others have a handler, which
    // may count on what is mapped.
    if (refused != EBUSY || !locked_entries(mapping.host, mapping.bytes))
      return fail("UFFDIO_REGISTER of huge pages to survey", refused);
  }
  RegionEvidence result;
  if (const int refused = look_up(*userfault, mapping, huge, result.touched.emplace_back()))
    return fail("UFFDIO_CONTINUE of huge pages to survey", refused);
  result.kind = Evidence::page_cache_lookup;
  // A poisoned page has an entry here, and is not in the page cache.
  RegionEvidence entries =
      page_table_evidence(mapping.host, mapping.bytes, PageEntries::all, EvidenceSource::automatic);
  if (entries.kind == Evidence::none) return entries;
  for (ExtentList& list : entries.touched)
    result.touched.push_back(std::move(list));
  return result;
}

} // namespace cppvmm
