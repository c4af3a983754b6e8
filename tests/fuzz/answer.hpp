// What HvExtCallGetBootZeroedMemory has answered. Include it after all other headers: guest.hpp imports
// cppvmm.guest_memory.
#pragma once

#include "input.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "guest.hpp"

namespace cppvmm::fuzz {

/// Checks the answer that was written to `output`, by the specification's layout: RAM that holds no data, without the
/// pages that it must not tell.
inline void take_answer(Guest& guest, GuestAddress output, const PageSet& not_to_tell) {
  constexpr std::size_t most_ranges = 255;
  const Page page = guest.content(output.page());
  const std::span answer = std::span(page).subspan(output.offset_in_page(), 8 + most_ranges * 16);
  const auto word = [&](std::size_t index) {
    std::uint64_t value = 0;
    std::ranges::copy(answer.subspan(index * 8, 8), std::as_writable_bytes(std::span(&value, 1)).begin());
    return value;
  };
  const std::uint64_t ranges = word(0);
  require(ranges <= most_ranges, "an answer has at most 255 ranges");
  PageSet told;
  std::uint64_t last_count = UINT64_MAX;
  for (std::uint64_t i = 0; i < most_ranges; ++i) {
    const std::uint64_t first = word(1 + 2 * i);
    const std::uint64_t count = word(2 + 2 * i);
    if (i >= ranges) {
      require(first == 0 && count == 0, "what is behind the ranges is zero");
      continue;
    }
    require(count != 0 && count <= last_count, "the largest range comes first, and none is empty");
    last_count = count;
    const auto range = PageRange::make(PageNumber(first), count);
    require(range.has_value(), "a range is in the guest-physical space");
    require(!told.intersects(*range), "no page is told twice");
    told.add(*range);
    for (std::uint64_t at = first; at < first + count; ++at) {
      require(guest.is_ram(PageNumber(at)), "a range is RAM");
      require(!guest.has_data(PageNumber(at)), "a page that is told holds no data");
    }
  }
  for (const PageRange& range : not_to_tell.ranges())
    require(!told.intersects(range), "no page is told that is in use, left out or marked");
  guest.note_write(output, answer);
}

} // namespace cppvmm::fuzz
