module;
#include <cstdint>
#include <optional>
#include <vector>
module cppvmm.guest_memory:region_evidence;
import :error;
import :evidence;
import :extents;
import :page_evidence;
import :region;

namespace cppvmm {

[[nodiscard]] FileMapping file_mapping(const Region& region);

/// What is known of a region of RAM by the kernel's books: whether the memory is what its owner stated is looked at
/// before the books and after them, for someone may map something else there, or give missing pages to a userfaultfd,
/// at any time. Memory that may have transparent huge pages is looked at twice, with a wait between that others share.
/// So a survey takes its first looks, waits once, and takes the last ones.
struct FirstLook {
  std::optional<MemoryError> foreign; ///< Nothing may be concluded of the memory, and why.
  SeenPages seen;
  std::optional<RegionEvidence> evidence; ///< Of memory that is looked at twice.
};
[[nodiscard]] FirstLook first_look(const Region& region, EvidenceSource source);

/// Waits until whoever holds a spin lock now, of a page table for example, has let go of it: those are read-side
/// critical sections of RCU. 0, or errno. Some 10 ms.
[[nodiscard]] int wait_for_spin_locks();

/// What became of the first look and another one; `waited`: what wait_for_spin_locks said between the two.
[[nodiscard]] RegionEvidence last_look(const Region& region, EvidenceSource source, FirstLook first, int waited);

/// All of it for one region.
[[nodiscard]] RegionEvidence region_evidence(const Region& region, EvidenceSource source);

} // namespace cppvmm
