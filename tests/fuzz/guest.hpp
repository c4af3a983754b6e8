// A small guest memory, and what it has to hold. Include it after all other headers: it imports cppvmm.guest_memory.
#pragma once

#include "input.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

import cppvmm.guest_memory;

namespace cppvmm::fuzz {

using Page = std::array<std::byte, page_size>;

inline constexpr Page zeros{};
/// Not byte by byte, which the fuzzer would count.
[[nodiscard]] inline bool is_equal(const std::byte* left, const Page& right) {
  return std::memcmp(left, right.data(), right.size()) == 0;
}

/// RAM (anonymous, and a memfd behind it), ROM right behind that, a hole, RAM that the embedder has mapped and protects
/// or unmaps at will, and the last page that a guest can have. Regions come and go, and keep what they hold.
class Guest {
public:
  /// What a slot of the memory map is for.
  enum Slot : std::uint8_t { anonymous, memfd, rom, adopted, last, slots };

  /// So many pages of either kind of RAM.
  explicit Guest(std::uint64_t ram_pages);
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  ~Guest();

  [[nodiscard]] GuestMemory& memory() { return memory_; }
  [[nodiscard]] PageRange pages_of(Slot slot) const { return slots_[slot].pages; }
  /// Of the map as it is.
  [[nodiscard]] bool is_ram(PageNumber page) const;
  [[nodiscard]] bool can_read(PageNumber page) const;
  [[nodiscard]] bool can_write(PageNumber page) const;

  /// Anything, and more often an address where something is.
  [[nodiscard]] std::uint64_t any_address(Input& input) const;
  [[nodiscard]] PageNumber any_page(Input& input) const { return GuestAddress(any_address(input)).page(); }
  /// Of at most so many pages.
  [[nodiscard]] PageRange any_range(Input& input, std::uint64_t most) const;

  /// Removes a region of the map or puts it back.
  void toggle(Slot slot);
  /// Changes what can be done with a page of the embedder's: nothing, read, all, or its memory is gone.
  void protect(Input& input);
  /// The guest writes: a few bytes, through the accessor or the host's address.
  void write_something(Input& input);
  /// The embedder discards pages; those that it did.
  [[nodiscard]] PageSet discard_something(Input& input);
  /// Has to be told of each write that is made otherwise, and of pages that read zero from now on.
  void note_write(GuestAddress address, std::span<const std::byte> bytes);
  void note_zero(PageRange pages);
  /// What the page held before, or zeros. To be told before anything else is done.
  void note_maybe_zero(PageNumber page) { maybe_zero_.insert(page.value()); }

  /// What the page has to hold.
  [[nodiscard]] Page expected(PageNumber page) const;
  /// What it holds; of one that can be read.
  [[nodiscard]] Page content(PageNumber page) const;
  /// Whether it holds data for certain.
  [[nodiscard]] bool has_data(PageNumber page) const {
    return !maybe_zero_.contains(page.value()) && !is_equal(expected(page).data(), zeros);
  }
  /// Looks at all pages that are there, without bringing others in; or at all.
  void check(bool all);
  void check(PageNumber page);

private:
  struct Place {
    PageRange pages;
    std::optional<Region> region;
    bool is_in_map = true;
  };
  enum class Access : std::uint8_t { none, read, write, gone };

  [[nodiscard]] const Place* place_of(PageNumber page) const;
  [[nodiscard]] std::byte* host(PageNumber page) const;
  [[nodiscard]] Access access(PageNumber page) const;
  /// Looks which pages were zeroed that may have been.
  void settle();
  template <class Each>
  void for_each_present(const Place& place, Each each) const;

  std::array<Place, slots> slots_;
  std::vector<Access> access_;            // to each page of `adopted`
  std::map<std::uint64_t, Page> written_; // the others hold zeros
  std::set<std::uint64_t> maybe_zero_;
  GuestMemory memory_;
};

} // namespace cppvmm::fuzz
