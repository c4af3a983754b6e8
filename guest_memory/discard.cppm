module;
#include <cstdint>
#include <mutex>
#include <optional>
module cppvmm.guest_memory:discard;
import :address;
import :error;
import :evidence;
import :extents;
import :guest_copy;
import :page_set;
import :region;

namespace cppvmm {

/// The parts of a private_file region that are no longer the file's but anonymous memory.
struct ReplacedPages {
  /// Each is a mapping of its own, and splits one: a process may have 65530 (vm.max_map_count).
  static constexpr std::size_t most_ranges = 1024;

  std::mutex mutex;
  PageSet pages;
  std::optional<HugePages> huge_pages; ///< What the region's owner asked for; replaced pages get it too.
};

/// Pages to discard, with what is known of the region.
struct DiscardTarget {
  FileMapping memory;
  FileMapping region; ///< All of it.
  Backing backing{};
  bool is_fd_writable = false;
  std::uint64_t huge_page = 0; ///< Of hugetlb kinds, in bytes; 0 if it is not known.
  GuestReach reach = GuestReach::plain;
};

/// Makes the pages read zero: of any backing but private files and unknown.
[[nodiscard]] MemoryResult<Discarded> discard_memory(const DiscardTarget& target);

/// Of private_file memory; `pages` are those of the target.
[[nodiscard]] MemoryResult<Discarded> discard_private_file(const DiscardTarget& target, PageRange pages,
                                                           ReplacedPages& replaced);

/// Of hugetlb_private_file memory, of which `data` is what the file held.
[[nodiscard]] MemoryResult<Discarded> discard_hugetlb_private_file(const DiscardTarget& target, const ExtentList& data);

/// MADV_NOHUGEPAGE or MADV_HUGEPAGE: 0, or what errno says.
[[nodiscard]] int advise_huge_pages(void* host, std::uint64_t bytes, HugePages use);

} // namespace cppvmm
