module;
#include <algorithm>
#include <boost/icl/interval_map.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>
module cppvmm.guest_memory:touched_map.impl;
import :touched_map;

namespace cppvmm {

using PageInterval = boost::icl::right_open_interval<std::uint64_t>;

struct TouchedMap::Intervals {
  // Bits of Toucher; inplace_bit_add unites those of marks that overlap.
  boost::icl::interval_map<std::uint64_t, std::uint8_t, boost::icl::partial_absorber, std::less,
                           boost::icl::inplace_bit_add, boost::icl::inter_section, PageInterval>
      map;
};

static PageInterval interval(PageRange range) { return {range.first().value(), range.end().value()}; }

static PageRange page_range(const PageInterval& interval) {
  return *PageRange::make(PageNumber(interval.lower()), interval.upper() - interval.lower());
}

TouchedMap::TouchedMap() : intervals_(std::make_unique<Intervals>()) {}
TouchedMap::TouchedMap(const TouchedRuns& runs) : TouchedMap() {
  auto& map = intervals_->map;
  runs.for_each([&](const Entry& entry) { map.add(map.end(), {interval(entry.pages), entry.by.bits()}); });
}
TouchedMap::TouchedMap(const TouchedMap& other)
    : intervals_(other.intervals_ ? std::make_unique<Intervals>(*other.intervals_) : std::make_unique<Intervals>()) {}
TouchedMap::TouchedMap(TouchedMap&& other) noexcept = default;
TouchedMap& TouchedMap::operator=(const TouchedMap& other) {
  if (this != &other) *this = TouchedMap(other);
  return *this;
}
TouchedMap& TouchedMap::operator=(TouchedMap&& other) noexcept = default;
TouchedMap::~TouchedMap() = default;

void TouchedMap::mark(PageRange pages, Touchers by) {
  if (pages.empty() || by.empty()) return;
  auto& map = intervals_->map;
  if (!map.empty() && pages.end().value() <= map.begin()->first.lower())
    map.add(map.begin(), {interval(pages), by.bits()}); // O(1)
  else
    map.add({interval(pages), by.bits()});
}

void TouchedMap::mark(const PageSet& pages, Touchers by) {
  for (const PageRange& range : pages.ranges())
    mark(range, by);
}

void TouchedMap::clear(PageRange pages) {
  if (!pages.empty()) intervals_->map.erase(interval(pages));
}

void TouchedMap::join_neighbours(std::size_t most) {
  const std::size_t count = entry_count();
  if (count <= std::max<std::size_t>(most, 1)) return;
  const auto gap_before = [](const Entry& left, const Entry& right) {
    return right.pages.first().value() - left.pages.end().value();
  };
  const std::vector<Entry> all = entries();
  std::vector<std::uint64_t> gaps;
  gaps.reserve(count - 1);
  for (std::size_t i = 1; i < count; ++i)
    gaps.push_back(gap_before(all[i - 1], all[i]));
  // Those up to this size are closed; of the ones as large as it, only as many as have to be.
  const std::size_t closed = count - std::max<std::size_t>(most, 1);
  const auto largest_closed = gaps.begin() + static_cast<std::ptrdiff_t>(closed - 1);
  std::ranges::nth_element(gaps, largest_closed);
  const std::uint64_t threshold = *largest_closed;
  auto equal_closed = closed - static_cast<std::size_t>(std::count_if(gaps.begin(), largest_closed + 1,
                                                                      [&](auto gap) { return gap < threshold; }));
  TouchedMap joined;
  auto& map = joined.intervals_->map;
  for (std::size_t i = 0; i < count;) {
    std::uint8_t bits = all[i].by.bits();
    std::size_t last = i;
    for (; last + 1 < count; ++last) {
      const std::uint64_t gap = gap_before(all[last], all[last + 1]);
      if (gap > threshold || (gap == threshold && equal_closed == 0)) break;
      if (gap == threshold) --equal_closed;
      bits |= all[last + 1].by.bits();
    }
    const PageInterval whole(all[i].pages.first().value(), all[last].pages.end().value());
    map.add(map.end(), {whole, bits});
    i = last + 1;
  }
  *this = std::move(joined);
}

Touchers TouchedMap::at(PageNumber page) const {
  const auto found = intervals_->map.find(page.value());
  return found == intervals_->map.end() ? Touchers() : Touchers::from_bits(found->second);
}

bool TouchedMap::empty() const { return intervals_->map.empty(); }

std::size_t TouchedMap::entry_count() const { return intervals_->map.iterative_size(); }

std::vector<TouchedMap::Entry> TouchedMap::entries() const {
  std::vector<Entry> result;
  result.reserve(entry_count());
  for (const auto& [range, bits] : intervals_->map)
    result.push_back({page_range(range), Touchers::from_bits(bits)});
  return result;
}

PageSet TouchedMap::pages() const {
  PageSet result;
  for (const auto& [range, bits] : intervals_->map)
    result.add(page_range(range));
  return result;
}

} // namespace cppvmm
