module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>
module cppvmm.guest_memory:proc_maps;
import :error;

namespace cppvmm {

/// One mapping of this process, as /proc/self/maps lists it.
struct ListedMapping {
  std::uint64_t start = 0;
  std::uint64_t end = 0;
  bool is_readable = false;
  bool is_writable = false;
  bool is_private = false;
  std::uint64_t offset = 0;
  unsigned device_major = 0;
  unsigned device_minor = 0;
  std::uint64_t inode = 0;
  std::string path; ///< As printed: with " (deleted)" where the file has no name; empty for anonymous memory.

  /// Whether it is MAP_SHARED | MAP_ANONYMOUS, by the name that the kernel gives to the file behind it (mm/shmem.c,
  /// shmem_zero_setup).
  [[nodiscard]] bool is_shared_anonymous() const { return !is_private && path == "/dev/zero (deleted)"; }
};

/// The same as /proc/self/smaps has it, which walks the page tables of each.
struct ProcMapping : ListedMapping {
  std::uint64_t page_bytes = 0; ///< KernelPageSize: of a hugetlb mapping, its huge pages.
  /// Registered with a userfaultfd for missing pages or minor faults: someone has yet to fill it.
  bool is_filled_on_demand = false;
  /// Registered with a userfaultfd at all: someone may want to be told what becomes of it.
  bool is_held = false;
  bool has_huge_pages = false;     ///< Transparent ones, of anonymous memory, mapped as such.
  bool may_get_huge_pages = false; ///< THPeligible: the kernel gives them, as things are.
  /// Has pages that the kernel may take away though they are in use, for their owner has given them up (MADV_FREE) or
  /// can do without them (MAP_DROPPABLE).
  bool has_given_up_pages = false;
};

/// Calls `visit` for each mapping that overlaps [start, start + bytes), ascending, until it returns false. The file is
/// read in parts, and mappings that change meanwhile can be listed twice, or not at all: wrong_nature when those that
/// were visited, unless `visit` ended it, leave anything out.
[[nodiscard]] MemoryResult<void> for_each_mapping(std::uint64_t start, std::uint64_t bytes,
                                                  const std::function<bool(const ProcMapping&)>& visit);

/// Part of the memory whose mappings are looked for.
struct MappedPart {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
};

/// The same for many parts at once, which costs no more than one: `visit` is called with the number of each part that a
/// mapping overlaps, of parts in any order. What each part has come to: nothing, or why its mappings were not all
/// visited.
[[nodiscard]] std::vector<std::optional<MemoryError>>
for_each_mapping_of(std::span<const MappedPart> parts,
                    const std::function<void(std::size_t part, const ProcMapping&)>& visit);

/// The same of what /proc/self/maps lists. Where the kernel can be asked for single mappings (PROCMAP_QUERY, Linux
/// 6.11), others cost nothing, and each mapping is as it was at one moment. A mapping may be visited twice.
[[nodiscard]] std::vector<std::optional<MemoryError>>
for_each_listed_mapping_of(std::span<const MappedPart> parts,
                           const std::function<void(std::size_t part, const ListedMapping&)>& visit);

/// The same of one part, until `visit` returns false.
[[nodiscard]] MemoryResult<void> for_each_listed_mapping(std::uint64_t start, std::uint64_t bytes,
                                                         const std::function<bool(const ListedMapping&)>& visit);

/// The mapping that has the address: nothing where there is none, or it can't be told.
[[nodiscard]] std::optional<ListedMapping> listed_mapping_at(std::uint64_t address);

/// The same as for_each_mapping for all mappings of the process, of which any may be left out, as there are always gaps
/// between them.
[[nodiscard]] MemoryResult<void> for_each_mapping_of_process(const std::function<bool(const ProcMapping&)>& visit);

/// The sum, in bytes, of the /proc/self/smaps fields whose name `wanted` accepts, over the mappings that overlap
/// [start, start + bytes); unavailable when one of them reaches beyond, wrong_nature when they leave anything out.
[[nodiscard]] MemoryResult<std::uint64_t> sum_smaps(std::uint64_t start, std::uint64_t bytes,
                                                    const std::function<bool(std::string_view)>& wanted);

} // namespace cppvmm
