module;
#include <cstdint>
#include <optional>
module cppvmm.guest_memory:markers;

namespace cppvmm {

/// What /proc/pid/pagemap shows, through this descriptor, where there is no page and a userfaultfd's write protection
/// is remembered all the same (WP_UNPOPULATED): nothing where that is not shown apart from what is swapped out, being
/// moved or broken. It takes one who opened the file with CAP_SYS_ADMIN (Linux fs/proc/task_mmu.c, pagemap_read), and
/// Linux 6.4. Found by making one in memory of its own, once in a process. Safe to use from any thread.
[[nodiscard]] std::optional<std::uint64_t> write_protect_marker(int pagemap);

/// Whether the entry is that marker, and nothing else besides.
[[nodiscard]] constexpr bool is_marker(std::uint64_t entry, std::uint64_t marker) {
  // Soft-dirty is of the mapping, not of the entry.
  constexpr std::uint64_t soft_dirty = std::uint64_t{1} << 55;
  return (entry & ~soft_dirty) == (marker & ~soft_dirty);
}

} // namespace cppvmm
