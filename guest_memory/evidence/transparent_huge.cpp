module;
#include <cerrno>
#include <cstdint>
#include <expected>
#include <functional>
#include <linux/membarrier.h>
#include <mutex>
#include <optional>
#include <sys/syscall.h>
#include <unistd.h>
module cppvmm.guest_memory:transparent_huge.impl;
import :backing;
import :error;
import :mapping;
import :page_evidence;
import :proc_maps;
import :region;
import :transparent_huge;

namespace cppvmm {

int wait_for_spin_locks() {
  // kernel/sched/membarrier.c: synchronize_rcu, where there is more than one CPU.
  return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 ? 0 : errno;
}

static bool shows_small_pages_only(const Region& region) {
  bool small = true;
  const auto walked = for_each_mapping(
      reinterpret_cast<std::uintptr_t>(region.host_address()), region.bytes(), [&](const ProcMapping& mapping) {
        small = !mapping.has_huge_pages && !mapping.may_get_huge_pages && !mapping.has_given_up_pages;
        return small;
      });
  if (!walked || !small) return false;
  // smaps does not count the huge page of zeros. From Linux 6.13 on, a store makes a huge page of it, whatever the
  // mapping is marked as.
  const auto huge = has_huge_entries(region.host_address(), region.bytes());
  return huge && !*huge;
}

/// Whether private memory that is given no huge pages any more has none: one that the kernel is taking back just now
/// shows at one of two looks, as for a survey (region_evidence.cpp).
static bool has_small_pages_only(const Region& region) {
  return shows_small_pages_only(region) && wait_for_spin_locks() == 0 && shows_small_pages_only(region);
}

MemoryResult<void> Region::set_huge_pages(HugePages use) const {
  const auto fail = [&](MemoryErrc code, int os_error) {
    return refuse_region(code, start(), bytes(), "Region::set_huge_pages", os_error);
  };
  if (!traits_of(backing()).may_be_transparent_huge) return fail(MemoryErrc::unavailable, 0);
  const std::lock_guard lock(mapping_->replaced.mutex);
  mapping_->small_pages_proof = 0; // before the kernel may give any
  if (const int error = advise_huge_pages(host_address(), bytes(), use))
    return fail(error == EINVAL ? MemoryErrc::unavailable : MemoryErrc::os, error);
  mapping_->replaced.huge_pages = use;
  if (use == HugePages::never && backing() == Backing::anonymous && has_small_pages_only(*this))
    mapping_->small_pages_proof = ++mapping_->small_pages_proofs;
  return {};
}

} // namespace cppvmm
