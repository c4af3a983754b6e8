module;
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <iterator>
#include <linux/membarrier.h>
#include <optional>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>
#include <vector>
module cppvmm.guest_memory:region_evidence.impl;
import :address;
import :backing;
import :error;
import :evidence;
import :extents;
import :file_data;
import :page_evidence;
import :region;
import :region_evidence;

namespace cppvmm {

FileMapping file_mapping(const Region& region) {
  return {.fd = region.file_descriptor(),
          .offset = region.file_offset(),
          .host = region.host_address(),
          .bytes = region.bytes(),
          .data = FileData::of(region)};
}

static RegionEvidence evidence_of_backing(const Region& region, EvidenceSource source) {
  const FileMapping memory = file_mapping(region);
  switch (region.backing()) {
  case Backing::anonymous:
    return page_table_evidence(memory.host, memory.bytes, PageEntries::pages, source);
  case Backing::memfd:
  case Backing::shared_file:
    return page_cache_evidence(memory, FileChanges::any_time, source);
  case Backing::shared_anonymous:
    return shared_anonymous_evidence(memory.host, memory.bytes, source);
  case Backing::hugetlb:
    return hugetlb_evidence(memory.host, memory.bytes, source);
  case Backing::hugetlb_memfd:
    return hugetlb_file_evidence(memory);
  case Backing::private_file:
    return private_file_evidence(memory, source);
  case Backing::hugetlb_private_file:
    return hugetlb_private_file_evidence(memory, source);
  case Backing::guest_memfd:
    return guest_memfd_evidence(memory);
  case Backing::unknown:
    break;
  }
  return {};
}

static MemoryResult<void> look_at_mappings(const Region& region, SeenPages& seen) {
  return check_backing(file_mapping(region), region.backing(), region.kind(), &seen);
}

static RegionEvidence nothing_for(const Region& region, MemoryErrc code, const char* operation, int os_error = 0) {
  RegionEvidence none;
  none.error = MemoryError{.code = code,
                           .address = reinterpret_cast<std::uintptr_t>(region.host_address()),
                           .length = region.bytes(),
                           .os_error = os_error,
                           .operation = operation};
  return none;
}

static bool is_looked_at_twice(const Region& region, const SeenPages& seen) {
  const BackingTraits traits = traits_of(region.backing());
  return traits.is_private && !traits.is_hugetlb && (seen.has_huge || seen.may_get_huge);
}

FirstLook first_look(const Region& region, EvidenceSource source) {
  FirstLook look;
  if (region.backing() == Backing::unknown) {
    look.foreign.emplace();
    return look;
  }
  if (auto stated = look_at_mappings(region, look.seen); !stated) {
    look.foreign = stated.error();
    return look;
  }
  // To take back a huge page that was given up by MADV_FREE, the kernel clears its entry, and sets it again where the
  // page is in use after all (Linux 6.11, mm/huge_memory.c, __discard_anon_folio_pmd_locked). Who looks at page tables
  // finds none meanwhile, for the lock is taken only where there is an entry (mm/pagewalk.c, walk_pmd_range). Once it
  // has come to that, the page is in small pages, and given up no more: so it is found by another look, when that is
  // over.
  if (is_looked_at_twice(region, look.seen)) look.evidence = evidence_of_backing(region, source);
  return look;
}

int wait_for_spin_locks() {
  // kernel/sched/membarrier.c: synchronize_rcu, where there is more than one CPU.
  return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 ? 0 : errno;
}

RegionEvidence last_look(const Region& region, EvidenceSource source, FirstLook first, int waited) {
  RegionEvidence refused;
  refused.is_foreign = true;
  if (first.foreign) {
    if (region.backing() != Backing::unknown) refused.error = *first.foreign;
    return refused;
  }
  if (first.evidence && waited != 0)
    return nothing_for(region, MemoryErrc::os, "membarrier between two looks at transparent huge pages", waited);
  RegionEvidence evidence = evidence_of_backing(region, source);
  if (auto after = look_at_mappings(region, first.seen); !after) {
    refused.error = after.error();
    return refused;
  }
  // Since Linux 7.2 at the latest, a huge page that is in use stays given up: the kernel may try again, at the second
  // look.
  if (first.seen.has_huge && first.seen.has_given_up)
    return nothing_for(region, MemoryErrc::unavailable,
                       "survey of huge pages among memory that was given up by MADV_FREE");
  if (!first.evidence && is_looked_at_twice(region, first.seen))
    return nothing_for(region, MemoryErrc::unavailable, "survey of memory that was given huge pages meanwhile");
  if (!first.evidence || evidence.kind == Evidence::none) return evidence;
  if (first.evidence->kind == Evidence::none) return std::move(*first.evidence);
  std::ranges::move(first.evidence->touched, std::back_inserter(evidence.touched));
  return evidence;
}

RegionEvidence region_evidence(const Region& region, EvidenceSource source) {
  FirstLook first = first_look(region, source);
  const int waited = first.evidence ? wait_for_spin_locks() : 0;
  return last_look(region, source, std::move(first), waited);
}

} // namespace cppvmm
