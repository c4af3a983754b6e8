module;
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>
export module cppvmm.guest_memory:page_set;
import :address;

namespace cppvmm {

/// A set of guest-physical pages, kept as disjoint ranges: its cost follows the number of ranges, not of pages.
/// A value type. Not thread-safe: as with the containers of the standard library, concurrent const use is fine.
/// One that was moved from may only be assigned to or destroyed.
export class PageSet {
public:
  PageSet();
  PageSet(PageRange range);
  PageSet(const PageSet& other);
  PageSet(PageSet&& other) noexcept;
  PageSet& operator=(const PageSet& other);
  PageSet& operator=(PageSet&& other) noexcept;
  ~PageSet();

  /// Adds, removes or keeps only the pages given. Ranges that touch are joined. O(log n) for a range, and amortised
  /// O(1) for ranges added in ascending order.
  void add(PageRange range);
  void add(const PageSet& other);
  void remove(PageRange range);
  void remove(const PageSet& other);
  void intersect(const PageSet& other);

  [[nodiscard]] bool contains(PageNumber page) const;
  /// Whether every page of `range` is in the set; true for an empty range.
  [[nodiscard]] bool contains(PageRange range) const;
  [[nodiscard]] bool intersects(PageRange range) const;
  [[nodiscard]] bool empty() const;
  /// O(number of ranges).
  [[nodiscard]] std::uint64_t page_count() const;
  [[nodiscard]] std::size_t range_count() const;

  /// The set as disjoint ranges that do not touch, ascending.
  [[nodiscard]] std::vector<PageRange> ranges() const;
  /// At most `count` of those ranges: the ones with the most pages, largest first, of equals the lowest first.
  [[nodiscard]] std::vector<PageRange> largest(std::size_t count) const;

  friend bool operator==(const PageSet& left, const PageSet& right) { return left.equals(right); }

private:
  struct Intervals;
  [[nodiscard]] bool equals(const PageSet& other) const;
  std::unique_ptr<Intervals> intervals_;
};

} // namespace cppvmm
