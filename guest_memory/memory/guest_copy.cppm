module;
#include <cstddef>
#include <cstdint>
module cppvmm.guest_memory:guest_copy;
import :error;

namespace cppvmm {

/// How the bytes of a region are accessed.
enum class GuestReach : std::uint8_t {
  plain,  ///< By loads and stores: memory of our own, where nobody takes pages away; and all, while a FaultGuard is
          ///< there.
  kernel, ///< Through the kernel, for which a fault is an error: memory that an embedder may do with as it likes.
};

[[nodiscard]] GuestReach reach_of(bool is_adopted);

/// What became of an access.
struct GuestAccess {
  std::uint64_t done = 0; ///< Bytes before the first that could not be had.
  int error = 0;          ///< 0: all was done. EFAULT; EHWPOISON: lost to a memory error; else what the kernel says.

  [[nodiscard]] MemoryErrc code() const;
};

/// By loads and stores, these are relaxed atomic accesses of the widest aligned size, up to 8 bytes, and of 64 bytes
/// and more whatever is fast: the guest accesses the memory at the same time.
[[nodiscard]] GuestAccess copy_from_guest(GuestReach reach, std::byte* into, const std::byte* guest,
                                          std::uint64_t bytes);
[[nodiscard]] GuestAccess copy_to_guest(GuestReach reach, std::byte* guest, const std::byte* from, std::uint64_t bytes);
/// Writes zeros.
[[nodiscard]] GuestAccess clear_guest(GuestReach reach, std::byte* guest, std::uint64_t bytes);
/// Whether the bytes could be written, by a store to each page that changes nothing.
[[nodiscard]] GuestAccess probe_guest(std::byte* guest, std::uint64_t bytes);

} // namespace cppvmm
