module;
#include <cstdint>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:discard;
import :address;
import :backing;
import :error;
import :guest_copy;
import :mapping;
import :page_evidence;
import :region;

namespace cppvmm {

/// Pages to discard, with what is known of the region.
struct DiscardTarget {
  FileMapping memory;
  FileMapping region; ///< All of it.
  Backing backing{};
  bool is_fd_writable = false;
  std::uint64_t huge_page = 0; ///< Of hugetlb kinds, in bytes; 0 if it is not known.
  GuestReach reach = GuestReach::plain;
  DiscardMode mode = DiscardMode::free_or_clear;
};

/// Makes the pages read zero: of any backing but private files and unknown.
[[nodiscard]] MemoryResult<Discarded> discard_memory(const DiscardTarget& target);

/// Of private_file memory; `pages` are those of the target.
[[nodiscard]] MemoryResult<Discarded> discard_private_file(const DiscardTarget& target, PageRange pages,
                                                           ReplacedPages& replaced);

/// Of hugetlb_private_file memory, of which `data` is what the file held.
[[nodiscard]] MemoryResult<Discarded> discard_hugetlb_private_file(const DiscardTarget& target, const ExtentList& data);

} // namespace cppvmm
