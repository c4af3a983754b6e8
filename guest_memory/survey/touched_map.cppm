module;
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>
export module cppvmm.guest_memory:touched_map;
import :address;
import :page_set;
import :touched_runs;
import :toucher;

namespace cppvmm {

/// Which pages were written, and by whom: an interval map. A value type; thread-safe as PageSet is.
export class TouchedMap {
public:
  using Entry = TouchedRange;

  TouchedMap();
  explicit TouchedMap(const TouchedRuns& runs);
  TouchedMap(const TouchedMap& other);
  TouchedMap(TouchedMap&& other) noexcept;
  TouchedMap& operator=(const TouchedMap& other);
  TouchedMap& operator=(TouchedMap&& other) noexcept;
  ~TouchedMap();

  /// Adds `by` to what is known of the pages; what was known stays.
  void mark(PageRange pages, Touchers by);
  void mark(const PageSet& pages, Touchers by);
  /// Forgets the pages: they count as untouched.
  void clear(PageRange pages);
  /// Makes at most `most` entries of it, at least one: where the gaps between neighbours are smallest they become one
  /// entry, with the touchers of both, and the pages in between count as touched too.
  void join_neighbours(std::size_t most);

  /// Who touched the page; empty when nobody did.
  [[nodiscard]] Touchers at(PageNumber page) const;
  [[nodiscard]] bool empty() const;
  /// How many `entries` there are, O(1).
  [[nodiscard]] std::size_t entry_count() const;
  /// Disjoint ranges with their touchers, ascending; neighbours differ in their touchers or have a gap between them.
  [[nodiscard]] std::vector<Entry> entries() const;
  /// All touched pages, whoever wrote them.
  [[nodiscard]] PageSet pages() const;

  friend bool operator==(const TouchedMap& left, const TouchedMap& right) { return left.entries() == right.entries(); }

private:
  struct Intervals;
  std::unique_ptr<Intervals> intervals_;
};

} // namespace cppvmm
