module;
#include <chrono>
#include <span>
#include <vector>
module cppvmm.guest_memory:region_evidence;
import :evidence;
import :page_evidence;
import :region;

namespace cppvmm {

[[nodiscard]] FileMapping file_mapping(const Region& region);

/// A region, and what is known of it by the kernel's books; nothing is looked up of ROM.
struct KnownRegion {
  const Region* region = nullptr;
  RegionEvidence evidence;
  std::chrono::nanoseconds cost{}; ///< Without what all regions share.
};

/// What is known of the first of the regions: of all, unless what was found of some takes too much room. At least one.
///
/// Whether the memory is what its owner stated is looked at before the books and after them, for someone may map
/// something else there, or give missing pages to a userfaultfd, at any time: of all regions at once. Memory that may
/// have transparent huge pages is looked at twice, with a wait between that all share.
[[nodiscard]] std::vector<KnownRegion> known_regions(std::span<const Region> regions, EvidenceSource source);

/// Of one region of RAM.
[[nodiscard]] RegionEvidence region_evidence(const Region& region, EvidenceSource source);

} // namespace cppvmm
