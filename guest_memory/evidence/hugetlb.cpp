module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <functional>
#include <iterator>
#include <optional>
#include <ranges>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:hugetlb.impl;
import :address;
import :error;
import :evidence;
import :file_data;
import :page_evidence;
import :survey_stop;
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

/// Of the bytes at `host`: through a write watch's registration, if there is one, else through one of all of `memory`,
/// which they are of, for as long as it takes. A registration of less would split the mapping for good.
static MemoryResult<ExtentList> registered_entries(const FileMapping& memory, const void* host, std::uint64_t bytes) {
  constexpr int attempts = 8;
  for (int attempt = 1;; ++attempt) {
    auto entries = locked_entries(host, bytes);
    if (entries || entries.error().os_error != EPERM) return entries;
    auto userfault = Userfault::open(UserfaultUse::asynchronous);
    if (!userfault) return std::unexpected(userfault.error());
    if (const int refused = userfault->add(reinterpret_cast<std::uintptr_t>(memory.host), memory.bytes)) {
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
    if (auto entries = registered_entries({.host = host, .bytes = bytes}, host, bytes))
      return evidence_of(std::move(*entries));
  if (is_survey_stopped()) return failed(survey_stopped(reinterpret_cast<std::uintptr_t>(host), bytes));
  RegionEvidence counted = hugetlb_count_evidence(host, bytes);
  if (counted.kind != Evidence::none || !counted.error || counted.error->os_error != EBUSY) return counted;
  // A write watch has it.
  if (auto entries = locked_entries(host, bytes)) return evidence_of(std::move(*entries));
  return counted;
}

// A private mapping's fault where the file has no page brings one of the process's own, which is never in the page
// cache (mm/hugetlb.c, hugetlb_no_page: VM_MAYSHARE); a page of the file is mapped read-only, and copied at the first
// store. Either way there is an entry, which comes and goes as that of anonymous memory. What has none reads what the
// file has.
RegionEvidence hugetlb_private_file_evidence(const FileMapping& mapping, EvidenceSource source) {
  if (mapping.data == nullptr) return {};
  RegionEvidence entries = hugetlb_evidence(mapping.host, mapping.bytes, source);
  if (entries.kind == Evidence::none) return entries;
  RegionEvidence file = file_data_evidence(*mapping.data);
  std::ranges::move(entries.touched, std::back_inserter(file.touched));
  return file;
}

MemoryResult<ExtentList> hugetlb_resident(const void* host, std::uint64_t bytes) {
  ExtentList found;
  const std::uint64_t pages = bytes / page_size;
  std::vector<unsigned char> resident(std::min<std::uint64_t>(pages, 1 << 18));
  for (std::uint64_t page = 0; page < pages;) {
    const std::uint64_t count = std::min<std::uint64_t>(resident.size(), pages - page);
    auto* const at = static_cast<std::byte*>(const_cast<void*>(host)) + page * page_size;
    if (mincore(at, count * page_size, resident.data()) != 0)
      return std::unexpected(os_error("mincore of huge pages", host, bytes, errno));
    for (std::uint64_t i = 0; i < count; ++i)
      if ((resident[i] & 1) != 0) found.add({page + i, 1});
    page += count;
  }
  return found;
}

MemoryResult<ExtentList> hugetlb_occupied(const FileMapping& memory, const void* host, std::uint64_t bytes) {
  auto resident = hugetlb_resident(host, bytes);
  // Of a file, what is not seen here is looked at in the file.
  if (!resident || memory.fd >= 0 || resident->page_count() == bytes / page_size) return resident;
  // What has no entry may be in the middle of a migration.
  if (auto entries = registered_entries(memory, host, bytes)) return entries;
  return resident;
}

/// Adds the pages that the page cache has, each of which is mapped here from then on; but for those that have an entry
/// here already, which a look-up could take the place of.
static int look_up(const Userfault& userfault, const FileMapping& mapping, std::uint64_t huge,
                   const std::vector<ExtentList>& known, ExtentList& cached) {
  constexpr int most_waits = 1000;
  const auto host = reinterpret_cast<std::uintptr_t>(mapping.host);
  using Rest = std::ranges::subrange<ExtentList::Iterator>;
  std::vector<Rest> rests;
  rests.reserve(known.size());
  for (const ExtentList& list : known)
    rests.emplace_back(list.begin(), list.end());
  // The pages that are asked for ascend.
  const auto is_known = [&](std::uint64_t page) {
    bool found = false;
    for (Rest& rest : rests) {
      while (!rest.empty() && rest.front().end() <= page)
        rest.advance(1);
      found = found || (!rest.empty() && rest.front().first <= page);
    }
    return found;
  };
  for (std::uint64_t at = 0; at < mapping.bytes; at += huge) {
    if (is_survey_stopped()) return ECANCELED;
    if (is_known(at / page_size)) continue;
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
    if (number == ECANCELED)
      return failed(survey_stopped(reinterpret_cast<std::uintptr_t>(mapping.host), mapping.bytes));
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
  // What has an entry here counts as touched, before and after: a poisoned page has one, and is not in the page cache.
  const auto look_at_entries = [&] {
    return page_table_evidence(mapping.host, mapping.bytes, PageEntries::all, EvidenceSource::automatic);
  };
  RegionEvidence result = look_at_entries();
  if (result.kind == Evidence::none) return result;
  ExtentList cached;
  if (const int refused = look_up(*userfault, mapping, huge, result.touched, cached))
    return fail("UFFDIO_CONTINUE of huge pages to survey", refused);
  result.touched.push_back(std::move(cached));
  RegionEvidence after = look_at_entries();
  if (after.kind == Evidence::none) return after;
  for (ExtentList& list : after.touched)
    result.touched.push_back(std::move(list));
  result.kind = Evidence::page_cache_lookup;
  return result;
}

} // namespace cppvmm
