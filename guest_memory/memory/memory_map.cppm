module;
#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <type_traits>
#include <vector>
export module cppvmm.guest_memory:memory_map;
import :address;
import :error;
import :page_set;
import :region;

namespace cppvmm {

/// What can be read from and written to guest memory as a value: any bits that a guest puts there are one (which holds
/// for a struct only if it does for its members: no bool, enumeration or pointer), and no padding carries bytes of this
/// process to the guest.
export template <class T>
concept GuestValue = std::is_trivially_copyable_v<T> && std::is_trivially_default_constructible_v<T> &&
                     (std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>) &&
                     !std::is_pointer_v<T> && !std::is_same_v<T, bool>;

/// The regions that a guest has: an immutable snapshot. To change a map, make another one and publish it
/// (GuestMemory). Safe to use from any thread.
///
/// Accesses may cross regions that touch. They copy with relaxed atomic loads and stores of up to 8 bytes, accesses of
/// 64 bytes and more with whatever is fast, so that a guest which writes at the same time can tear a value but not
/// break this program; a naturally aligned access of 1, 2, 4 or 8 bytes is not torn. What fails: not_backed,
/// out_of_range and, for `write`, read_only; the error says where, and in `completed` how many bytes went before.
///
/// Adopted memory is copied by the kernel (process_vm_readv, process_vm_writev; by a pipe where these are forbidden or
/// do not reach, as for device memory), for an embedder may protect, truncate or unmap it, and the host may lose it:
/// there an access fails with inaccessible, at the address of the first byte that could not be had, and all bytes
/// before it were transferred. That costs a system call or two, and does not keep the promise about tearing: the kernel
/// copies as it likes. It does not go through a userfaultfd that handles faults of user mode alone. While a FaultGuard
/// is there, adopted memory is accessed as all other is, with the same errors.
///
/// Memory that a region made itself bites only where the host has none left: a memory error, a pool of huge pages that
/// others emptied after a discard, a snapshot's file that somebody truncated against the promise. That is a SIGBUS
/// without a FaultGuard, and inaccessible with one.
export class MemoryMap {
public:
  MemoryMap() = default;
  /// Of regions in any order. `overlap` names the address where two meet, or the second of two regions of RAM that
  /// share host memory, by address or by file: a page must not be known under two numbers.
  [[nodiscard]] static MemoryResult<MemoryMap> make(std::vector<Region> regions);
  /// This map and one more region.
  [[nodiscard]] MemoryResult<MemoryMap> with(Region region) const;
  /// This map without the region that starts at `start`; not_backed when none does.
  [[nodiscard]] MemoryResult<MemoryMap> without(GuestAddress start) const;

  /// Ascending by address.
  [[nodiscard]] std::span<const Region> regions() const { return regions_; }
  /// The region that holds the address, or null; valid while this map is.
  [[nodiscard]] const Region* find(GuestAddress address) const;
  /// All pages of RAM, or of ROM.
  [[nodiscard]] PageSet pages(RegionKind kind) const;

  [[nodiscard]] MemoryResult<void> read(GuestAddress address, std::span<std::byte> into) const;
  /// On behalf of the guest: ROM refuses.
  [[nodiscard]] MemoryResult<void> write(GuestAddress address, std::span<const std::byte> from) const;
  /// On behalf of the VMM, ROM included: firmware, kernels, tables.
  [[nodiscard]] MemoryResult<void> load(GuestAddress address, std::span<const std::byte> from) const;
  /// Whether `write` of that many bytes would succeed now; the error is the one that it would give, nothing is written.
  /// Of adopted memory the kernel is asked, by a store to each page that changes nothing: they count as touched then,
  /// as the write would have made them. Of memory of our own, that it is there is not looked at.
  [[nodiscard]] MemoryResult<void> check_write(GuestAddress address, std::uint64_t bytes) const;

  /// Region::discard of a range or set of pages, which may cross regions. not_backed, read_only or unavailable, with
  /// the page's address, when one is not RAM that can be discarded: nothing is discarded then.
  [[nodiscard]] MemoryResult<Discarded> discard(const PageSet& pages,
                                                DiscardMode mode = DiscardMode::free_or_clear) const;
  /// Region::advise of pages, which may cross regions: how many of them are of regions where it is not unavailable.
  /// not_backed, and nothing is said to the kernel, where a page is in no region; else os, where the kernel first
  /// fails.
  [[nodiscard]] MemoryResult<std::uint64_t> advise(const PageSet& pages, PageUse use) const;
  /// Region::set_huge_pages of all regions of RAM that can have them. Fails as it does, where it first does.
  [[nodiscard]] MemoryResult<void> set_huge_pages(HugePages use) const;

  template <GuestValue T>
  [[nodiscard]] MemoryResult<T> read_value(GuestAddress address) const {
    T value{};
    if (auto done = read(address, std::as_writable_bytes(std::span(&value, 1))); !done)
      return std::unexpected(done.error());
    return value;
  }
  template <GuestValue T>
  [[nodiscard]] MemoryResult<void> write_value(GuestAddress address, const T& value) const {
    return write(address, std::as_bytes(std::span(&value, 1)));
  }

private:
  enum class Access : std::uint8_t { read, write, check_write, load };
  /// What an access needs of a region, beside those of the others.
  struct Place {
    std::uint64_t first = 0; ///< Guest-physical address.
    std::uint64_t bytes = 0;
    std::byte* host = nullptr;
    bool is_adopted = false;
    bool is_rom = false;
  };
  void set_regions(std::vector<Region> regions);
  [[nodiscard]] const Place* place_of(std::uint64_t address) const;
  /// Where the bytes are, if they are all of one region that is accessed by loads and stores; else null.
  [[nodiscard]] const Place* plain_place(GuestAddress address, std::uint64_t bytes) const;
  template <class Copy>
  [[nodiscard]] MemoryResult<void> for_each_part(GuestAddress address, std::uint64_t bytes, Access access,
                                                 const char* operation, Copy copy) const;
  std::vector<Region> regions_;
  std::vector<Place> places_; // of the regions, in their order
  std::size_t largest_ = 0;   // which most accesses are to
};

} // namespace cppvmm
