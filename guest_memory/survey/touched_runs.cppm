module;
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>
export module cppvmm.guest_memory:touched_runs;
import :address;
import :page_set;
import :toucher;

namespace cppvmm {

/// Pages that were written, and by whom.
export struct TouchedRange {
  PageRange pages;
  Touchers by;
  friend bool operator==(const TouchedRange&, const TouchedRange&) = default;
};

/// Disjoint ranges of pages with who wrote them, in ascending order, to be read one after the other: as packed pairs,
/// of 2 bytes where a range has up to 7 pages and the gap before it is below 128, and of 13 at most. TouchedMap is what
/// can be changed, and looked up in. A value type; thread-safe as PageSet is.
///
/// In bounded space: past the limit, the smallest ranges are forgotten; the `limit / 2` largest always stay.
export class TouchedRuns {
public:
  static constexpr std::size_t default_limit = std::size_t{1} << 18;

  TouchedRuns() noexcept : TouchedRuns(default_limit) {}
  /// One below 2 counts as 2.
  explicit TouchedRuns(std::size_t limit) noexcept;
  TouchedRuns(const TouchedRuns& other);
  TouchedRuns(TouchedRuns&& other) noexcept;
  TouchedRuns& operator=(const TouchedRuns& other);
  TouchedRuns& operator=(TouchedRuns&& other) noexcept;
  ~TouchedRuns();

  /// Adds pages behind all others; those that are not behind them are not added. A range that touches the last one and
  /// has the same touchers is joined to it. Amortized O(1), but for what is forgotten, O(limit) for each `limit / 2`
  /// ranges. Throws std::bad_alloc, and has not added the range then.
  void add(PageRange pages, Touchers by);
  /// The same of each range. Throws std::bad_alloc, and may have added some of them then.
  void add(const TouchedRuns& behind);
  /// The pages of both, each with the touchers that it has in either, with the limit of `left`. One pass over both.
  [[nodiscard]] static TouchedRuns united(const TouchedRuns& left, const TouchedRuns& right);

  [[nodiscard]] bool empty() const { return entry_count() == 0; }
  /// O(1).
  [[nodiscard]] std::size_t entry_count() const;
  /// Calls each(range) for all of them, ascending; neighbours differ in their touchers or have a gap between them.
  void for_each(const std::function<void(const TouchedRange&)>& each) const;
  /// The same as a vector, 24 bytes for each.
  [[nodiscard]] std::vector<TouchedRange> entries() const;
  /// All touched pages, whoever wrote them.
  [[nodiscard]] PageSet pages() const;

  /// Whatever their limits.
  friend bool operator==(const TouchedRuns& left, const TouchedRuns& right) {
    return left.entries() == right.entries();
  }

private:
  struct Packed;
  class Reader;
  void keep_largest();
  std::size_t limit_;
  std::unique_ptr<Packed> packed_; ///< Null where there is none.
};

} // namespace cppvmm
