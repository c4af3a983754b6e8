module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>
module cppvmm.guest_memory:extents.impl;
import :extents;

namespace cppvmm {

void ExtentList::add(Extent extent) {
  if (extents_.empty() || extent.first > extents_.back().end()) {
    page_count_ += extent.count;
    extents_.push_back(extent);
    if (extents_.size() > limit_) give_up_small_gaps();
    return;
  }
  while (extents_.size() > 1 && extent.first <= extents_[extents_.size() - 2].end()) {
    Extent& joined = extents_[extents_.size() - 2];
    given_up_ += extents_.back().first - joined.end();
    joined.count = extents_.back().end() - joined.first;
    extents_.pop_back();
  }
  Extent& last = extents_.back();
  if (extent.first < last.first) {
    page_count_ += last.first - extent.first;
    last.count = last.end() - extent.first;
    last.first = extent.first;
  }
  const std::uint64_t end = std::max(last.end(), extent.end());
  page_count_ += end - last.end();
  last.count = end - last.first;
}

void ExtentList::shift_up(std::uint64_t pages) {
  for (Extent& extent : extents_)
    extent.first += pages;
}

void ExtentList::shift_down(std::uint64_t pages) {
  for (Extent& extent : extents_)
    extent.first -= pages;
}

void ExtentList::give_up_small_gaps() {
  const auto gap_before = [&](std::size_t i) { return extents_[i].first - extents_[i - 1].end(); };
  std::vector<std::uint64_t> gaps;
  gaps.reserve(extents_.size() - 1);
  for (std::size_t i = 1; i < extents_.size(); ++i)
    gaps.push_back(gap_before(i));
  const std::size_t keep = std::max<std::size_t>(limit_ / 2, 1);
  if (gaps.size() <= keep) return;
  const auto smallest_kept = gaps.begin() + static_cast<std::ptrdiff_t>(keep - 1);
  std::nth_element(gaps.begin(), smallest_kept, gaps.end(), std::greater<>());
  const std::uint64_t threshold = *smallest_kept;
  // Of the gaps as large as the threshold, only as many as fit.
  auto equal_kept = keep - static_cast<std::size_t>(std::count_if(gaps.begin(), smallest_kept + 1,
                                                                  [&](auto gap) { return gap > threshold; }));
  std::size_t last = 0;
  for (std::size_t i = 1; i < extents_.size(); ++i) {
    const Extent extent = extents_[i];
    const std::uint64_t gap = extent.first - extents_[last].end();
    const bool kept = gap > threshold || (gap == threshold && equal_kept > 0);
    if (kept) {
      if (gap == threshold) --equal_kept;
      extents_[++last] = extent;
    } else {
      given_up_ += gap;
      extents_[last].count = extent.end() - extents_[last].first;
    }
  }
  extents_.resize(last + 1);
}

} // namespace cppvmm
