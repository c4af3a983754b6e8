// Extents of pages in little memory, without what they are of: tests have their own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "largest_kept.hpp"
#include "packed_pairs.hpp"

namespace cppvmm {

/// Pages of a region or a file, counted from its start.
struct Extent {
  std::uint64_t first = 0;
  std::uint64_t count = 0;

  [[nodiscard]] constexpr std::uint64_t end() const { return first + count; }

  friend bool operator==(const Extent&, const Extent&) = default;
};

/// Touched pages in ascending order, in bounded space: a guest decides how scattered they are. Past the limit, the
/// smallest gaps between extents are given up and count as touched; the `limit / 2` largest always stay, which is far
/// more than any answer can name.
///
/// Of each extent are kept the gap before it and its count, as a packed pair: 2 bytes where both are below 128, 12 at
/// most for any pages that a guest can have.
class ExtentList {
public:
  class Iterator;
  using value_type = Extent;

  static constexpr std::size_t default_limit = std::size_t{1} << 18;

  explicit ExtentList(std::size_t limit = default_limit) : limit_(limit) {}
  ExtentList(const ExtentList&) = default;
  ExtentList(ExtentList&& other) noexcept : limit_(other.limit_) { swap(other); }
  ExtentList& operator=(ExtentList other) noexcept {
    swap(other);
    return *this;
  }
  ~ExtentList() = default;

  /// Extents come in ascending order; one that touches or overlaps the last is joined to it. (One that comes out of
  /// order is not lost: all from its start on become one extent.) Pages are below 2^64 - 1, and an extent without pages
  /// is none. Amortized O(1) in any order, but for the gaps that are given up, O(limit) for each `limit / 2` extents.
  /// Throws std::bad_alloc, and the list has then either got the extent or is as it was.
  void add(Extent extent);
  /// Counts from another start: all extents move by so many pages, and none beyond the numbers that pages can have.
  /// O(1).
  void shift_up(std::uint64_t pages) {
    start_ += pages;
    last_.first += pages;
  }
  void shift_down(std::uint64_t pages) {
    start_ -= pages;
    last_.first -= pages;
  }

  /// The extents, ascending, each made when it is asked for. Valid until the list is changed or moved.
  [[nodiscard]] Iterator begin() const;
  [[nodiscard]] Iterator end() const;
  [[nodiscard]] bool empty() const { return size_ == 0; }
  /// How many extents there are.
  [[nodiscard]] std::size_t size() const { return size_; }
  /// 16 bytes for each.
  [[nodiscard]] std::vector<Extent> to_vector() const;
  /// Pages added, each once, without those of gaps that were given up.
  [[nodiscard]] std::uint64_t page_count() const { return page_count_; }
  /// Pages in the gaps that were given up.
  [[nodiscard]] std::uint64_t given_up_pages() const { return given_up_; }

private:
  void swap(ExtentList& other) noexcept {
    std::swap(limit_, other.limit_);
    before_last_.swap(other.before_last_);
    std::swap(start_, other.start_);
    std::swap(last_, other.last_);
    std::swap(gap_, other.gap_);
    std::swap(size_, other.size_);
    std::swap(page_count_, other.page_count_);
    std::swap(given_up_, other.given_up_);
  }
  void append(Extent extent);
  void join_last();
  void give_up_small_gaps();

  std::size_t limit_;
  PackedPairs before_last_; ///< Of all but the last: its gap, none for the first one, and its count.
  std::uint64_t start_ = 0; ///< Of the first.
  Extent last_;
  std::uint64_t gap_ = 0; ///< Before the last one; 0 where it is the first.
  std::size_t size_ = 0;
  std::uint64_t page_count_ = 0;
  std::uint64_t given_up_ = 0;
};

class ExtentList::Iterator {
public:
  using iterator_concept = std::forward_iterator_tag;
  using iterator_category = std::input_iterator_tag; // what it refers to is a value
  using value_type = Extent;
  using difference_type = std::ptrdiff_t;
  using pointer = void;
  using reference = Extent;

  Iterator() = default;
  [[nodiscard]] Extent operator*() const { return extent_; }
  Iterator& operator++() {
    ++index_;
    read();
    return *this;
  }
  Iterator operator++(int) {
    Iterator before = *this;
    ++*this;
    return before;
  }
  friend bool operator==(const Iterator& left, const Iterator& right) { return left.index_ == right.index_; }

private:
  friend class ExtentList;
  Iterator(const ExtentList& list, std::size_t index)
      : list_(&list), before_last_(list.before_last_), extent_{list.start_, 0}, index_(index) {
    read();
  }

  void read() {
    if (index_ + 1 < list_->size_) {
      const auto [gap, count] = before_last_.next();
      extent_ = {extent_.end() + gap, count};
    } else if (index_ + 1 == list_->size_) {
      extent_ = list_->last_;
    }
  }

  const ExtentList* list_ = nullptr;
  PackedPairs::Reader before_last_; ///< At the next one.
  Extent extent_;
  std::size_t index_ = 0;
};

inline ExtentList::Iterator ExtentList::begin() const { return {*this, 0}; }
inline ExtentList::Iterator ExtentList::end() const { return {*this, size_}; }

inline std::vector<Extent> ExtentList::to_vector() const {
  std::vector<Extent> extents;
  extents.reserve(size_);
  for (const Extent extent : *this)
    extents.push_back(extent);
  return extents;
}

/// Behind all others, with a gap between.
inline void ExtentList::append(Extent extent) {
  if (size_ == 0) {
    start_ = extent.first;
  } else {
    before_last_.push({gap_, last_.count});
    gap_ = extent.first - last_.end();
  }
  last_ = extent;
  ++size_;
}

/// To the one before it, of at least two.
inline void ExtentList::join_last() {
  const std::uint64_t end = last_.end();
  const std::uint64_t end_before = last_.first - gap_;
  given_up_ += gap_;
  const auto [gap, count] = before_last_.pop();
  gap_ = gap;
  last_ = {end_before - count, end - (end_before - count)};
  --size_;
}

inline void ExtentList::add(Extent extent) {
  extent.count = std::min(extent.count, std::numeric_limits<std::uint64_t>::max() - extent.first);
  if (extent.count == 0) return;
  if (size_ == 0 || extent.first > last_.end()) {
    append(extent);
    page_count_ += extent.count;
    if (size_ > limit_) give_up_small_gaps();
    return;
  }
  while (size_ > 1 && extent.first <= last_.first - gap_)
    join_last();
  if (extent.first < last_.first) {
    const std::uint64_t before = last_.first - extent.first;
    page_count_ += before;
    last_ = {extent.first, last_.count + before};
    if (size_ == 1)
      start_ = extent.first;
    else
      gap_ -= before;
  }
  const std::uint64_t end = std::max(last_.end(), extent.end());
  page_count_ += end - last_.end();
  last_.count = end - last_.first;
}

inline void ExtentList::give_up_small_gaps() {
  const std::size_t keep = std::max<std::size_t>(limit_ / 2, 1);
  if (size_ - 1 <= keep) return;
  LargestKept largest = [&] {
    std::vector<std::uint64_t> gaps;
    gaps.reserve(size_ - 1);
    std::uint64_t before = start_;
    for (const Extent extent : *this) {
      if (extent.first != start_) gaps.push_back(extent.first - before);
      before = extent.end();
    }
    return LargestKept(std::move(gaps), keep);
  }();
  ExtentList kept(limit_);
  kept.page_count_ = page_count_;
  kept.given_up_ = given_up_;
  Extent joined{start_, 0};
  for (const Extent extent : *this) {
    const std::uint64_t gap = extent.first - joined.end();
    if (largest.keeps(gap)) {
      kept.append(joined);
      joined = extent;
    } else {
      kept.given_up_ += gap;
      joined.count = extent.end() - joined.first;
    }
  }
  kept.append(joined);
  swap(kept);
}

} // namespace cppvmm
