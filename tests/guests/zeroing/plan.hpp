// What is left to zero: RAM, less what the host reported as zeroed, less what the guest lives in. Freestanding, and
// compiled for the host too, where it is tested.
#pragma once

#include "abi.hpp"

#include <cstddef>
#include <cstdint>

namespace cppvmm::zeroing {

/// The end of a range that the host may have made up: never below its start, never beyond the last page.
constexpr std::uint64_t clamped_end(const Pages& pages) {
  if (pages.first >= page_number_end) return pages.first;
  return pages.count > page_number_end - pages.first ? page_number_end : pages.first + pages.count;
}

constexpr bool overlap(const Pages& left, const Pages& right) {
  return left.first < clamped_end(right) && right.first < clamped_end(left) && left.count != 0 && right.count != 0;
}

/// Sorts by first page. Insertion: the lists are short, and often sorted already.
constexpr void sort_by_first(Pages* ranges, std::size_t count) {
  for (std::size_t i = 1; i < count; ++i) {
    const Pages moving = ranges[i];
    std::size_t hole = i;
    for (; hole > 0 && ranges[hole - 1].first > moving.first; --hole)
      ranges[hole] = ranges[hole - 1];
    ranges[hole] = moving;
  }
}

/// Ranges that remain of `ram_count` ranges when `cut_count` are taken out of them: at most the sum of both.
inline constexpr std::size_t max_planned_ranges = max_ram_ranges + max_reported_ranges + max_lives_in_ranges;

/// Writes the ranges of `ram` (disjoint) that no range of `cuts` covers to `out` and returns how many they are. The
/// cuts are sorted here; they may overlap, be empty, lie outside RAM or wrap. `out` has room for ram_count + cut_count.
constexpr std::size_t subtract(const Pages* ram, std::size_t ram_count, Pages* cuts, std::size_t cut_count,
                               Pages* out) {
  sort_by_first(cuts, cut_count);
  std::size_t made = 0;
  for (std::size_t r = 0; r < ram_count; ++r) {
    std::uint64_t at = ram[r].first;
    const std::uint64_t end = clamped_end(ram[r]);
    for (std::size_t c = 0; c < cut_count && cuts[c].first < end && at < end; ++c) {
      const std::uint64_t cut_end = clamped_end(cuts[c]);
      if (cut_end <= at || cut_end <= cuts[c].first) continue;
      if (cuts[c].first > at) out[made++] = Pages{at, cuts[c].first - at};
      at = cut_end;
    }
    if (at < end) out[made++] = Pages{at, end - at};
  }
  return made;
}

} // namespace cppvmm::zeroing
