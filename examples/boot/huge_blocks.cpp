#include "huge_blocks.hpp"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <vector>

namespace cppvmm::boot {

std::uint64_t pages_in_untouched_blocks(std::span<const ReportedRange> ram, std::span<const ReportedRange> touched) {
  constexpr std::uint64_t block = 512;
  constexpr std::size_t most_ranges = 255; // of an answer
  std::vector<std::uint64_t> counts;
  std::uint64_t end = 0; // of the last one
  const auto add = [&](std::uint64_t first, std::uint64_t past) {
    if (first >= past) return;
    if (counts.empty() || end != first) counts.push_back(0);
    counts.back() += past - first;
    end = past;
  };
  for (const ReportedRange& range : ram) {
    std::uint64_t at = range.first;
    const std::uint64_t past = range.first + range.count;
    for (const ReportedRange& each : touched) {
      const std::uint64_t first_block = each.first / block * block;
      const std::uint64_t past_block = (each.first + each.count + block - 1) / block * block;
      if (past_block <= at) continue;
      if (first_block >= past) break;
      add(at, first_block);
      at = std::max(at, past_block);
    }
    add(at, past);
  }
  std::ranges::sort(counts, std::greater());
  if (counts.size() > most_ranges) counts.resize(most_ranges);
  return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
}

} // namespace cppvmm::boot
