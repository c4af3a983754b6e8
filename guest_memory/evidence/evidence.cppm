module;
#include <cstdint>
export module cppvmm.guest_memory:evidence;

namespace cppvmm {

/// What a survey went by for a region.
export enum class Evidence : std::uint8_t {
  none,              ///< Nothing that proves a page untouched: all of it counts as touched.
  page_tables_scan,  ///< This process's page tables, through the PAGEMAP_SCAN ioctl (Linux 6.7).
  page_tables_read,  ///< The same by reading /proc/self/pagemap: cannot tell a page that was only read from data.
  huge_page_count,   ///< The same of huge pages: as many as the kernel counts for the process (HugetlbPages).
  page_cache,        ///< SEEK_DATA and SEEK_HOLE, every hole confirmed by cachestat(2) (Linux 6.5); of a guest_memfd,
                     ///< cachestat alone.
  page_cache_blocks, ///< SEEK_DATA, SEEK_HOLE and own page tables, confirmed by the file's count of allocated blocks.
  page_cache_lookup, ///< The page cache of a hugetlb file, asked for each of its pages (UFFDIO_CONTINUE).
  file_holes,        ///< Holes of a file that does not change, without a private copy in own page tables.
  file_content,      ///< What read zero in a file that does not change, without a private copy in own page tables.
};

/// The word for it in reports, e.g. "page_tables_scan".
export [[nodiscard]] const char* to_string(Evidence evidence);

/// Which way to the page tables and the page cache a survey takes.
export enum class EvidenceSource : std::uint8_t {
  automatic, ///< The newest interface that this kernel has.
  legacy,    ///< What kernels before 6.5 have, where the newest has more: for comparison, and for tests of that path.
};

} // namespace cppvmm
