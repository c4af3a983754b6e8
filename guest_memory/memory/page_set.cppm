module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>
export module cppvmm.guest_memory:page_set;
import :address;

namespace cppvmm {

/// A set of guest-physical pages, kept as disjoint ranges in ascending order, of 16 bytes each: its cost follows the
/// number of ranges, not of pages. A value type. Not thread-safe: as with the containers of the standard library,
/// concurrent const use is fine.
export class PageSet {
public:
  PageSet() = default;
  PageSet(PageRange range) { add(range); }
  /// Of ranges in any order, which may overlap: O(n log n). Many are added so, and not one by one.
  [[nodiscard]] static PageSet of(std::vector<PageRange> ranges);

  /// Adds, removes or keeps only the pages given. Ranges that touch are joined. One range: O(1) behind all others, else
  /// O(log n) and moving up to all ranges behind it. A set: one pass over both.
  constexpr void add(PageRange range) {
    if (!range.empty() && (ranges_.empty() || ranges_.back().end() < range.first()))
      push_back(range);
    else
      add_among(range);
  }
  void add(const PageSet& other);
  void add(PageSet&& other);
  void remove(PageRange range);
  void remove(const PageSet& other);
  void intersect(const PageSet& other);

  /// Room for so many ranges in all, so that adding them moves none.
  void reserve(std::size_t ranges) { ranges_.reserve(ranges); }

  [[nodiscard]] bool contains(PageNumber page) const;
  /// Whether every page of `range` is in the set; true for an empty range.
  [[nodiscard]] bool contains(PageRange range) const;
  [[nodiscard]] bool intersects(PageRange range) const;
  [[nodiscard]] bool empty() const { return ranges_.empty(); }
  /// O(number of ranges).
  [[nodiscard]] std::uint64_t page_count() const;
  /// O(1).
  [[nodiscard]] std::size_t range_count() const { return ranges_.size(); }

  /// The set as disjoint ranges that do not touch, ascending. Valid until the set is changed.
  [[nodiscard]] std::span<const PageRange> ranges() const& { return ranges_; }
  [[nodiscard]] std::vector<PageRange> ranges() && { return std::move(ranges_); }
  /// Calls each(range) for the ranges that are left without the pages of `without`, ascending. One pass over both.
  template <class Each>
  void for_each_without(const PageSet& without, Each each) const {
    auto hole = without.ranges_.begin();
    const auto end = without.ranges_.end();
    if (!ranges_.empty()) hole = std::ranges::upper_bound(hole, end, ranges_.front().first(), {}, &PageRange::end);
    auto range = ranges_.begin();
    for (; range != ranges_.end() && hole != end; ++range) {
      PageNumber at = range->first();
      while (hole != end && hole->end() <= at)
        ++hole;
      for (; hole != end && hole->first() < range->end(); ++hole) {
        if (at < hole->first()) each(between(at, hole->first()));
        at = hole->end();
        // The next range may lie in it too.
        if (range->end() <= at) break;
      }
      if (at < range->end()) each(between(at, range->end()));
    }
    for (; range != ranges_.end(); ++range)
      each(*range);
  }
  /// At most `count` of the ranges that are left without the pages of `without`: the ones with the most pages, largest
  /// first, of equals the lowest first. One pass over both, O(log count) a range, and room for `count`.
  [[nodiscard]] std::vector<PageRange> largest(std::size_t count, const PageSet& without = {}) const;

  friend bool operator==(const PageSet&, const PageSet&) = default;

private:
  [[nodiscard]] static constexpr PageRange between(PageNumber first, PageNumber end) {
    return {first.value(), end.value() - first.value()};
  }
  void add_among(PageRange range);
  /// From registers: a push_back of std::vector's, which may have to move all, takes it by address, and reads at once
  /// as a whole what was stored there in halves, for which a processor waits.
  constexpr void push_back(PageRange range) {
    ranges_.emplace_back();
    ranges_.back() = range;
  }
  void append(PageNumber first, PageNumber end);
  std::vector<PageRange> ranges_;
};

/// The ones with the most pages of the ranges that are added, largest first, of equals the lowest first.
class LargestRanges {
public:
  /// At most `count`, of at most `shown` that will be added; at least one.
  LargestRanges(std::size_t count, std::size_t shown) : count_(count) { heap_.reserve(std::min(count, shown)); }

  /// In ascending order. O(log count) for one that is larger than the least so far, else one comparison.
  constexpr void add(PageRange range) {
    if (range.count() > least_) add_large(range);
  }
  [[nodiscard]] std::vector<PageRange> take() &&;

private:
  void add_large(PageRange range);

  std::size_t count_;
  std::vector<PageRange> heap_; ///< The smallest of them in front.
  std::uint64_t least_ = 0;     ///< Once there are as many as wanted: the pages of that one. Of equals, it came first.
};

} // namespace cppvmm
