module;
#include <cstdint>
#include <optional>
#include <vector>
module cppvmm.guest_memory:evidence;
import :address;
import :error;
import :extents;
import :region;
import :survey;

namespace cppvmm {

/// What the kernel's books say of a region.
struct RegionEvidence {
  Evidence kind = Evidence::none;
  /// Pages that may hold data: the union of the lists.
  std::vector<ExtentList> touched;
  std::uint64_t unaccounted_pages = 0;
  std::optional<MemoryError> error;
};

/// Of private memory: every page with an entry in this process's page tables that is not the shared zero page.
[[nodiscard]] RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of shared memory: every page of the file that is, or may be, in the page cache or in swap.
[[nodiscard]] RegionEvidence page_cache_evidence(int fd, std::uint64_t offset, const void* host, std::uint64_t bytes,
                                                 EvidenceSource source);

/// Whether every page of the mapping is what its owner stated, by /proc/self/maps; wrong_nature if not.
[[nodiscard]] MemoryResult<void> check_nature(const void* host, std::uint64_t bytes, AdoptedNature nature, int fd,
                                              std::uint64_t fd_offset);

} // namespace cppvmm
