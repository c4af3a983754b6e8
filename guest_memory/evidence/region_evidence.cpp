module;
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <iterator>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:region_evidence.impl;
import :address;
import :backing;
import :error;
import :evidence;
import :file_data;
import :mapping;
import :page_evidence;
import :region;
import :region_evidence;
import :transparent_huge;

namespace cppvmm {

FileMapping file_mapping(const Region& region) {
  return {.fd = region.file_descriptor(),
          .offset = region.file_offset(),
          .host = region.host_address(),
          .bytes = region.bytes(),
          .data = FileData::of(region),
          .ends_at_guard_file = ends_at_guard_file(region)};
}

static RegionEvidence evidence_of_backing(const Region& region, bool has_small_pages, EvidenceSource source) {
  const FileMapping memory = file_mapping(region);
  switch (region.backing()) {
  case Backing::anonymous:
    return page_table_evidence(memory.host, memory.bytes,
                               has_small_pages ? PageEntries::small_pages : PageEntries::pages, source);
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

static RegionEvidence nothing_for(const Region& region, MemoryErrc code, const char* operation, int os_error = 0) {
  RegionEvidence none;
  none.error = MemoryError{.code = code,
                           .address = reinterpret_cast<std::uintptr_t>(region.host_address()),
                           .length = region.bytes(),
                           .os_error = os_error,
                           .operation = operation};
  return none;
}

/// Whether it is private memory that may have small pages and transparent huge ones.
static bool may_be_mixed(const Region& region) {
  const BackingTraits traits = traits_of(region.backing());
  return traits.is_private && !traits.is_hugetlb;
}

static bool is_looked_at_twice(const Region& region, const SeenPages& seen) {
  return may_be_mixed(region) && (seen.has_huge || seen.may_get_huge);
}

using Clock = std::chrono::steady_clock;

/// A region of RAM, and what the looks at it found.
struct LookedAt {
  const Region* region = nullptr;
  SeenPages seen;
  std::uint64_t small_pages = 0;       ///< small_pages_proof, before all looks.
  std::optional<MemoryError> foreign;  ///< Nothing may be concluded of the memory, and why.
  bool is_twice = false;               ///< By what was seen before the first look.
  std::optional<RegionEvidence> first; ///< Of memory that is looked at twice.
  std::optional<RegionEvidence> evidence;
  std::chrono::nanoseconds cost{};
};

/// Whether the memory of each is what its owner stated.
static void look_at_mappings(std::span<LookedAt> looks, EvidenceSource source) {
  std::vector<StatedMemory> stated;
  std::vector<LookedAt*> looked_at;
  for (LookedAt& look : looks) {
    if (look.foreign || look.region->backing() == Backing::unknown) continue;
    looked_at.push_back(&look);
    stated.push_back({.memory = file_mapping(*look.region),
                      .backing = look.region->backing(),
                      .kind = look.region->kind(),
                      .seen = &look.seen,
                      .needs_seen = may_be_mixed(*look.region) && look.small_pages == 0});
  }
  if (stated.empty()) return;
  const auto refused = check_backings(stated, source);
  for (std::size_t i = 0; i < looked_at.size(); ++i)
    looked_at[i]->foreign = refused[i];
}

/// What was found takes up so many ranges.
static std::size_t range_count(const RegionEvidence& evidence) {
  std::size_t ranges = 0;
  for (const ExtentList& list : evidence.touched)
    ranges += list.size();
  return ranges;
}

// To take back a huge page that was given up by MADV_FREE, the kernel clears its entry, and sets it again where the
// page is in use after all (Linux 6.11, mm/huge_memory.c, __discard_anon_folio_pmd_locked). Who looks at page tables
// finds none meanwhile, for the lock is taken only where there is an entry (mm/pagewalk.c, walk_pmd_range). Once it
// has come to that, the page is in small pages, and given up no more: so it is found by another look, when that is
// over.

/// The evidence of as many as there is room for: how many.
static std::size_t look_at_books(std::span<LookedAt> looks, EvidenceSource source) {
  std::size_t ranges = 0;
  std::size_t count = 0;
  bool waits = false;
  for (LookedAt& look : looks) {
    ++count;
    if (look.foreign || look.region->backing() == Backing::unknown) continue;
    const auto begin = Clock::now();
    look.is_twice = is_looked_at_twice(*look.region, look.seen);
    auto& found = look.is_twice ? look.first : look.evidence;
    found = evidence_of_backing(*look.region, look.small_pages != 0, source);
    look.cost += Clock::now() - begin;
    waits = waits || look.is_twice;
    ranges += range_count(*found);
    if (ranges >= ExtentList::default_limit) break;
  }
  if (!waits) return count;
  const int waited = wait_for_spin_locks();
  // Before anything else is done: nothing is noticed of what comes and goes between the two looks.
  for (LookedAt& look : looks.first(count)) {
    if (!look.is_twice) continue;
    const auto begin = Clock::now();
    look.evidence = waited == 0 ? evidence_of_backing(*look.region, look.small_pages != 0, source)
                                : nothing_for(*look.region, MemoryErrc::os,
                                              "membarrier between two looks at transparent huge pages", waited);
    look.cost += Clock::now() - begin;
  }
  return count;
}

/// What became of the looks, when the mappings have been looked at once more.
static RegionEvidence conclude(LookedAt& look) {
  const Region& region = *look.region;
  if (look.foreign || region.backing() == Backing::unknown) {
    RegionEvidence refused;
    refused.is_foreign = true;
    refused.error = look.foreign;
    return refused;
  }
  RegionEvidence evidence = std::move(*look.evidence);
  // Since Linux 7.2 at the latest, a huge page that is in use stays given up: the kernel may try again, at the second
  // look.
  if (look.seen.has_huge && look.seen.has_given_up)
    return nothing_for(region, MemoryErrc::unavailable,
                       "survey of huge pages among memory that was given up by MADV_FREE");
  const bool has_lost_proof = look.small_pages != 0 && look.small_pages != small_pages_proof(region);
  if (has_lost_proof || (!look.is_twice && is_looked_at_twice(region, look.seen)))
    return nothing_for(region, MemoryErrc::unavailable, "survey of memory that was given huge pages meanwhile");
  if (!look.first || evidence.kind == Evidence::none) return evidence;
  if (look.first->kind == Evidence::none) return std::move(*look.first);
  std::ranges::move(look.first->touched, std::back_inserter(evidence.touched));
  return evidence;
}

std::vector<KnownRegion> known_regions(std::span<const Region> regions, EvidenceSource source) {
  std::vector<LookedAt> looks;
  for (const Region& region : regions) {
    if (region.kind() != RegionKind::ram) continue;
    LookedAt& look = looks.emplace_back();
    look.region = &region;
    if (source == EvidenceSource::automatic) look.small_pages = small_pages_proof(region);
  }
  look_at_mappings(looks, source);
  const auto done = std::span(looks).first(look_at_books(looks, source));
  look_at_mappings(done, source);
  std::vector<KnownRegion> known;
  auto look = done.begin();
  for (const Region& region : regions) {
    // ROM is never reported, so nothing needs to be known of it.
    const bool is_ram = region.kind() == RegionKind::ram;
    if (is_ram && look == done.end()) break;
    KnownRegion& each = known.emplace_back();
    each.region = &region;
    if (!is_ram) continue;
    each.cost = look->cost;
    each.evidence = conclude(*look);
    ++look;
  }
  return known;
}

RegionEvidence region_evidence(const Region& region, EvidenceSource source) {
  return std::move(known_regions(std::span(&region, 1), source).front().evidence);
}

} // namespace cppvmm
