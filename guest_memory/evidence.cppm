module;
#include <cstdint>
#include <expected>
#include <optional>
#include <vector>
module cppvmm.guest_memory:evidence;
import :address;
import :error;
import :extents;
import :memory_map;
import :region;
import :survey;
import :write_record;

namespace cppvmm {

/// /proc/pid/pagemap entries (Documentation/admin-guide/mm/pagemap.rst).
inline constexpr std::uint64_t pagemap_present = std::uint64_t{1} << 63;
inline constexpr std::uint64_t pagemap_swapped = std::uint64_t{1} << 62;
inline constexpr std::uint64_t pagemap_write_protected = std::uint64_t{1} << 57; ///< By a userfaultfd.
inline constexpr std::uint64_t pagemap_file = std::uint64_t{1} << 61;            ///< Of a file, or shared anonymous.

/// What the kernel's books say of a region.
struct RegionEvidence {
  Evidence kind = Evidence::none;
  /// Pages that may hold data: the union of the lists.
  std::vector<ExtentList> touched;
  std::uint64_t unaccounted_pages = 0;
  std::optional<MemoryError> error = std::nullopt;
  /// The memory is not what its owner stated, or nothing is stated: nothing at all may be concluded of it.
  bool is_foreign = false;
};

/// Part of a file, and where it is mapped.
struct FileMapping {
  int fd = -1;
  std::uint64_t offset = 0;
  const void* host = nullptr;
  std::uint64_t bytes = 0;
};

/// What is known of a region of RAM by the kernel's books.
[[nodiscard]] RegionEvidence region_evidence(const Region& region, EvidenceSource source);

class ContentBudget;

/// The survey of one snapshot, without marks. What is known of writes is looked up for the regions that have it;
/// content is looked at as far as `budget` goes, if there is one.
[[nodiscard]] Survey survey_map(const MemoryMap& map, const SurveyOptions& options, const WriteKnowledge& writes,
                                ContentBudget* budget);

/// Those of the pages that may hold data, by a look at the content of all that can be looked at.
[[nodiscard]] ExtentList data_among(const Region& region, const ExtentList& pages);

/// Whether a page of it that reads zero stays so until someone writes it.
[[nodiscard]] bool is_watchable(Backing backing);

/// Which entries of the page tables count.
enum class PageEntries : std::uint8_t {
  all,            ///< Every page with an entry that is not the shared zero page.
  private_copies, ///< Of a private file mapping: pages that are no longer the file's.
};

/// Of private memory: what has an entry in this process's page tables.
[[nodiscard]] RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, PageEntries entries,
                                                 EvidenceSource source);

/// All pages but those that are write-protected still since a userfaultfd began to watch them; an error (EPERM) where
/// the memory is not watched as a whole.
[[nodiscard]] MemoryResult<ExtentList> written_pages(const void* host, std::uint64_t bytes);

/// Of memory of huge pages that is registered for asynchronous write protection: all pages but those that were seen,
/// with the page table's lock held, to have no entry; an error (EPERM) where it is not registered as a whole.
[[nodiscard]] MemoryResult<ExtentList> locked_entries(const void* host, std::uint64_t bytes);

/// Of private hugetlb memory: what has an entry in this process's page tables, by huge page.
[[nodiscard]] RegionEvidence hugetlb_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// The same for kernels before 6.7: as many huge pages as the kernel counts for the process, or nothing is known.
[[nodiscard]] RegionEvidence hugetlb_count_evidence(const void* host, std::uint64_t bytes);

/// Of hugetlb memory: what mincore(2) says. No evidence, for it misses a page that is being migrated.
[[nodiscard]] MemoryResult<ExtentList> hugetlb_resident(const void* host, std::uint64_t bytes);

/// Which of the bytes at `host`, part of `memory`, may have something to clear: as far as can be told at no great cost
/// where it is resident, and else by the page tables' lock, before Linux 6.7 by mincore(2) alone.
[[nodiscard]] MemoryResult<ExtentList> hugetlb_occupied(const FileMapping& memory, const void* host,
                                                        std::uint64_t bytes);

/// Of shared hugetlb memory: what the page cache has, whoever wrote it. All of these are mapped here afterwards.
[[nodiscard]] RegionEvidence hugetlb_file_evidence(const FileMapping& mapping);

/// Whether a file is written while its memory is surveyed.
enum class FileChanges : std::uint8_t { any_time, never };

/// Of shared memory and files: every page that the file system or the page cache has, or may have.
[[nodiscard]] RegionEvidence page_cache_evidence(const FileMapping& mapping, FileChanges changes,
                                                 EvidenceSource source);

/// Of shared anonymous memory: the same, through /proc/self/map_files.
[[nodiscard]] RegionEvidence shared_anonymous_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of a private file mapping: data of the file, and private copies. Parts of it may be anonymous memory by now.
[[nodiscard]] RegionEvidence private_file_evidence(const FileMapping& mapping, EvidenceSource source);

/// Whether every page of the mapping is of the kind that its owner stated, accessible, and not for a userfaultfd
/// handler to fill, by /proc/self/smaps; wrong_nature if not. Of memory of unknown kind, only the access is looked at.
[[nodiscard]] MemoryResult<void> check_backing(const FileMapping& mapping, Backing backing, RegionKind kind);

} // namespace cppvmm
