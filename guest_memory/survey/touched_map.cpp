module;
#include <algorithm>
#include <boost/icl/interval_map.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "../memory/largest_kept.hpp"

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
  most = std::max<std::size_t>(most, 1);
  if (entry_count() <= most) return;
  const std::vector<Entry> all = entries();
  const auto gap_before = [&](std::size_t i) { return all[i].pages.first().value() - all[i - 1].pages.end().value(); };
  LargestKept largest = [&] {
    std::vector<std::uint64_t> gaps;
    gaps.reserve(all.size() - 1);
    for (std::size_t i = 1; i < all.size(); ++i)
      gaps.push_back(gap_before(i));
    return LargestKept(std::move(gaps), most - 1);
  }();
  TouchedMap joined;
  auto& map = joined.intervals_->map;
  for (std::size_t next = 0; next < all.size();) {
    const std::uint64_t first = all[next].pages.first().value();
    std::uint8_t bits = all[next].by.bits();
    for (++next; next < all.size() && !largest.keeps(gap_before(next)); ++next)
      bits |= all[next].by.bits();
    map.add(map.end(), {PageInterval(first, all[next - 1].pages.end().value()), bits});
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
