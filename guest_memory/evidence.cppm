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
  std::optional<MemoryError> error = std::nullopt;
};

/// Part of a file, and where it is mapped.
struct FileMapping {
  int fd = -1;
  std::uint64_t offset = 0;
  const void* host = nullptr;
  std::uint64_t bytes = 0;
};

/// Which entries of the page tables count.
enum class PageEntries : std::uint8_t {
  all,            ///< Every page with an entry that is not the shared zero page.
  private_copies, ///< Of a private file mapping: pages that are no longer the file's.
};

/// Of private memory: what has an entry in this process's page tables.
[[nodiscard]] RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, PageEntries entries,
                                                 EvidenceSource source);

/// Of private hugetlb memory: the same by huge page.
[[nodiscard]] RegionEvidence hugetlb_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of shared hugetlb memory: as many pages are mapped here as the file has allocated, or nothing is known.
[[nodiscard]] RegionEvidence hugetlb_file_evidence(const FileMapping& mapping, EvidenceSource source);

/// Whether a file is written while its memory is surveyed.
enum class FileChanges : std::uint8_t { any_time, never };

/// Of shared memory and files: every page that the file system or the page cache has, or may have.
[[nodiscard]] RegionEvidence page_cache_evidence(const FileMapping& mapping, FileChanges changes,
                                                 EvidenceSource source);

/// Of shared anonymous memory: the same, through /proc/self/map_files.
[[nodiscard]] RegionEvidence shared_anonymous_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of a private file mapping: data of the file, and private copies.
[[nodiscard]] RegionEvidence private_file_evidence(const FileMapping& mapping, EvidenceSource source);

/// Whether every page of the mapping is of the kind that its owner stated, accessible, and not for a userfaultfd
/// handler to fill, by /proc/self/smaps; wrong_nature if not. Of memory of unknown kind, only the access is looked at.
[[nodiscard]] MemoryResult<void> check_backing(const FileMapping& mapping, Backing backing, RegionKind kind);

} // namespace cppvmm
