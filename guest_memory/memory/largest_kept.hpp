// Which of many sizes are the largest.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace cppvmm {

/// Says of many sizes, each in its turn, whether it is among the largest: of those that are alike, the first ones are.
class LargestKept {
public:
  /// As many as `kept`, or all if there are no more.
  LargestKept(std::vector<std::uint64_t> sizes, std::size_t kept) {
    kept = std::min(kept, sizes.size());
    if (kept == 0) return;
    const auto smallest = sizes.begin() + static_cast<std::ptrdiff_t>(kept - 1);
    std::nth_element(sizes.begin(), smallest, sizes.end(), std::greater<>());
    threshold_ = *smallest;
    alike_kept_ = kept - static_cast<std::size_t>(
                             std::count_if(sizes.begin(), smallest, [&](auto size) { return size > threshold_; }));
  }

  /// To be asked once for each, in the order that they had.
  [[nodiscard]] bool keeps(std::uint64_t size) {
    if (size != threshold_) return size > threshold_;
    if (alike_kept_ == 0) return false;
    --alike_kept_;
    return true;
  }

private:
  std::uint64_t threshold_ = std::numeric_limits<std::uint64_t>::max();
  std::size_t alike_kept_ = 0;
};

} // namespace cppvmm
