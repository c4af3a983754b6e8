module;
#include <compare>
#include <cstdint>
#include <expected>
#include <optional>
export module cppvmm.guest_memory:address;
import :error;

namespace cppvmm {

/// The unit of every page number and page count here: 4 KiB, as in the TLFS, whatever the host's page size.
export inline constexpr std::uint64_t page_size = 4096;
export inline constexpr unsigned page_shift = 12;

/// Guest-physical addresses are below this: x86-64 has at most 52 physical address bits (Intel SDM vol. 1, 3.3.1).
export inline constexpr std::uint64_t guest_space_end = std::uint64_t{1} << 52;

/// The number of a 4 KiB guest-physical page. Any 64-bit value can be held; arithmetic is checked.
export class PageNumber {
public:
  constexpr PageNumber() = default;
  constexpr explicit PageNumber(std::uint64_t number) : number_(number) {}

  [[nodiscard]] constexpr std::uint64_t value() const { return number_; }

  friend constexpr auto operator<=>(const PageNumber&, const PageNumber&) = default;

private:
  std::uint64_t number_ = 0;
};

/// A guest-physical byte address. Any 64-bit value can be held, since a guest may send any; arithmetic is checked.
export class GuestAddress {
public:
  constexpr GuestAddress() = default;
  constexpr explicit GuestAddress(std::uint64_t address) : address_(address) {}

  [[nodiscard]] constexpr std::uint64_t value() const { return address_; }
  /// The page that holds the address.
  [[nodiscard]] constexpr PageNumber page() const { return PageNumber(address_ >> page_shift); }
  [[nodiscard]] constexpr std::uint64_t offset_in_page() const { return address_ & (page_size - 1); }
  [[nodiscard]] constexpr bool is_aligned(std::uint64_t power_of_two) const {
    return (address_ & (power_of_two - 1)) == 0;
  }
  /// The address `bytes` further on; nothing when that leaves the guest-physical space (the end itself is allowed).
  [[nodiscard]] constexpr std::optional<GuestAddress> checked_add(std::uint64_t bytes) const {
    if (address_ > guest_space_end || bytes > guest_space_end - address_) return std::nullopt;
    return GuestAddress(address_ + bytes);
  }

  friend constexpr auto operator<=>(const GuestAddress&, const GuestAddress&) = default;

private:
  std::uint64_t address_ = 0;
};

/// A half-open range of 4 KiB pages within the guest-physical space; may be empty.
export class PageRange {
public:
  constexpr PageRange() = default;

  /// `count` pages from `first` on; out_of_range when they leave the guest-physical space.
  [[nodiscard]] static constexpr MemoryResult<PageRange> make(PageNumber first, std::uint64_t count) {
    constexpr std::uint64_t end = guest_space_end >> page_shift;
    if (first.value() > end || count > end - first.value())
      return std::unexpected(MemoryError{.code = MemoryErrc::out_of_range,
                                         .address = first.value(),
                                         .length = count,
                                         .operation = "PageRange::make (page number, page count)"});
    return PageRange(first.value(), count);
  }

  /// The pages that [address, address + bytes) touches, even in part; out_of_range as above.
  [[nodiscard]] static constexpr MemoryResult<PageRange> covering(GuestAddress address, std::uint64_t bytes) {
    const auto end = address.checked_add(bytes);
    if (!end)
      return std::unexpected(MemoryError{.code = MemoryErrc::out_of_range,
                                         .address = address.value(),
                                         .length = bytes,
                                         .operation = "PageRange::covering"});
    if (bytes == 0) return PageRange(address.page().value(), 0);
    return PageRange(address.page().value(), ((end->value() - 1) >> page_shift) - address.page().value() + 1);
  }

  [[nodiscard]] constexpr PageNumber first() const { return PageNumber(first_); }
  /// One past the last page.
  [[nodiscard]] constexpr PageNumber end() const { return PageNumber(first_ + count_); }
  [[nodiscard]] constexpr std::uint64_t count() const { return count_; }
  [[nodiscard]] constexpr bool empty() const { return count_ == 0; }
  [[nodiscard]] constexpr GuestAddress start_address() const { return GuestAddress(first_ << page_shift); }
  [[nodiscard]] constexpr std::uint64_t bytes() const { return count_ << page_shift; }
  [[nodiscard]] constexpr bool contains(PageNumber page) const {
    return page.value() >= first_ && page.value() - first_ < count_;
  }
  [[nodiscard]] constexpr bool contains(GuestAddress address) const { return contains(address.page()); }
  [[nodiscard]] constexpr bool overlaps(const PageRange& other) const {
    return first_ < other.first_ + other.count_ && other.first_ < first_ + count_;
  }

  friend constexpr bool operator==(const PageRange&, const PageRange&) = default;

private:
  friend class PageSet; // what lies between pages of ranges is in the guest-physical space
  constexpr PageRange(std::uint64_t first, std::uint64_t count) : first_(first), count_(count) {}

  std::uint64_t first_ = 0;
  std::uint64_t count_ = 0;
};

} // namespace cppvmm
