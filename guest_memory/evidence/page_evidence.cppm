module;
#include <cstdint>
#include <expected>
#include <optional>
#include <span>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:page_evidence;
import :address;
import :backing;
import :error;
import :evidence;
import :file_data;

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
  /// What is known of the file's bytes, where it was read when the region was made; the region owns it.
  const FileData* data = nullptr;
  /// The page behind it is one that no userfaultfd can be registered over.
  bool ends_at_guard_file = false;
};

/// Which entries of the page tables count.
enum class PageEntries : std::uint8_t {
  all,   ///< All but those of the shared zero page.
  pages, ///< Of anonymous memory: the same, but for those that remember write protection where no page is.
  /// The same where there are no transparent huge pages: where one is found, or the kernel does not tell them (before
  /// Linux 6.7), nothing is known.
  small_pages,
  private_copies, ///< Of a private file mapping: pages that are no longer the file's.
};

/// The entries of the pages from `address` on, through /proc/self/pagemap: 0, or errno. Up to Linux 6.4 the kernel
/// leaves out those of a huge page that is discarded just then, and fills the place with the entries that follow
/// (fs/proc/task_mmu.c, pagemap_pmd_range and pagemap_read). So no read goes beyond a page table (2 MiB): what is wrong
/// then is the discarded page's alone. EAGAIN for a read that keeps coming back short.
[[nodiscard]] int read_pagemap(int pagemap, std::uint64_t address, std::span<std::uint64_t> entries);

/// Of private memory: what has an entry in this process's page tables.
[[nodiscard]] RegionEvidence page_table_evidence(const void* host, std::uint64_t bytes, PageEntries entries,
                                                 EvidenceSource source);

/// Whether own page tables have entries of huge pages, the huge page of zeros included. Linux 6.7.
[[nodiscard]] MemoryResult<bool> has_huge_entries(const void* host, std::uint64_t bytes);

/// What has an entry of no page in this process's page tables, though nothing may have been written there: an access is
/// no read of zeros but a signal. Pages that were lost to a memory error or poisoned (UFFDIO_POISON), guard pages
/// (MADV_GUARD_INSTALL); of private memory, pages that are swapped out are among them, and a page in migration may be.
/// Markers of write protection are not. The union of the lists.
[[nodiscard]] MemoryResult<std::vector<ExtentList>> broken_entries(const void* host, std::uint64_t bytes,
                                                                   EvidenceSource source);

/// Of private memory in pages of 4 KiB: those of `pages` of which a load may be a signal. Of the others, a load would
/// have done during the call: to know it, what the swap cache has is mapped. What is swapped out and not there is not
/// brought in, and counts. Before Linux 5.14, all of them count.
[[nodiscard]] MemoryResult<ExtentList> unreadable_pages(const void* host, std::span<const Extent> pages);

/// All pages but those that are write-protected still since a userfaultfd began to watch them; an error (EPERM) where
/// the memory is not watched as a whole.
[[nodiscard]] MemoryResult<ExtentList> written_pages(const void* host, std::uint64_t bytes);

/// Of memory of huge pages that is registered for asynchronous write protection: all pages but those that were seen,
/// with the page table's lock held, to have no entry; an error (EPERM) where it is not registered as a whole.
[[nodiscard]] MemoryResult<ExtentList> locked_entries(const void* host, std::uint64_t bytes);

/// Of private hugetlb memory: what has an entry in this process's page tables, by huge page.
[[nodiscard]] RegionEvidence hugetlb_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of a file that was read when its region was made: what did not read zero.
[[nodiscard]] RegionEvidence file_data_evidence(const FileData& data);

/// Of a private mapping of a hugetlbfs file that does not change: the file's data, and what has an entry in own page
/// tables.
[[nodiscard]] RegionEvidence hugetlb_private_file_evidence(const FileMapping& mapping, EvidenceSource source);

/// What has an entry, for kernels before 6.7: as many huge pages as the kernel counts for the process, or nothing is
/// known.
[[nodiscard]] RegionEvidence hugetlb_count_evidence(const void* host, std::uint64_t bytes);

/// Of hugetlb memory: what mincore(2) says. No evidence, for it misses a page that is being migrated.
[[nodiscard]] MemoryResult<ExtentList> hugetlb_resident(const void* host, std::uint64_t bytes);

/// Which of the bytes at `host`, part of `memory`, may have something to clear: as far as can be told at no great cost
/// where it is resident, and else by the page tables' lock, before Linux 6.7 by mincore(2) alone.
[[nodiscard]] MemoryResult<ExtentList> hugetlb_occupied(const FileMapping& memory, const void* host,
                                                        std::uint64_t bytes);

/// Of shared hugetlb memory: what the page cache has, whoever wrote it. All of these are mapped here afterwards.
[[nodiscard]] RegionEvidence hugetlb_file_evidence(const FileMapping& mapping);

/// Whether the file is on a file system of which it is known that SEEK_DATA, or the page cache, shows all its data.
[[nodiscard]] bool shows_holes(int fd);

/// Whether a file is written while its memory is surveyed.
enum class FileChanges : std::uint8_t { any_time, never };

/// Of shared memory and files: every page that the file system or the page cache has, or may have.
[[nodiscard]] RegionEvidence page_cache_evidence(const FileMapping& mapping, FileChanges changes,
                                                 EvidenceSource source);

/// Of a guest_memfd: every page that its page cache has.
[[nodiscard]] RegionEvidence guest_memfd_evidence(const FileMapping& mapping);

/// Of shared anonymous memory: as of shared files, through /proc/self/map_files.
[[nodiscard]] RegionEvidence shared_anonymous_evidence(const void* host, std::uint64_t bytes, EvidenceSource source);

/// Of a private file mapping: data of the file, and private copies. Parts of it may be anonymous memory by now.
[[nodiscard]] RegionEvidence private_file_evidence(const FileMapping& mapping, EvidenceSource source);

/// What /proc/self/smaps shows of the pages of some memory.
struct SeenPages {
  bool has_huge = false;     ///< Transparent huge pages of anonymous memory.
  bool may_get_huge = false; ///< The kernel gives such pages there, as things are.
  bool has_given_up = false; ///< Pages that the kernel may take away though they are in use, see ProcMapping.
};

/// Memory, and what its owner stated of it.
struct StatedMemory {
  FileMapping memory;
  Backing backing = Backing::unknown;
  RegionKind kind = RegionKind::ram;
  /// What else was seen of it is added there, if there is one.
  SeenPages* seen = nullptr;
  /// Whether that has to be looked at.
  bool needs_seen = false;
};

/// Whether every page is of the kind that its owner stated, accessible, and not for a userfaultfd handler to fill;
/// wrong_nature if not. Of memory of unknown kind, only the access is looked at. `legacy`: by /proc/self/smaps alone.
[[nodiscard]] MemoryResult<void> check_backing(const StatedMemory& stated,
                                               EvidenceSource source = EvidenceSource::automatic);

/// The same of many: nothing, or the error, of each. Memory whose traits say is_listed, and of which nothing else is to
/// be seen, costs what its own mappings do; for the rest, and where there is any doubt, one pass over the mappings of
/// the process is made.
[[nodiscard]] std::vector<std::optional<MemoryError>> check_backings(std::span<const StatedMemory> stated,
                                                                     EvidenceSource source = EvidenceSource::automatic);

} // namespace cppvmm
