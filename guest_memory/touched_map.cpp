module;
#include <boost/icl/interval_map.hpp>
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
  if (!pages.empty() && !by.empty()) intervals_->map.add({interval(pages), by.bits()});
}

void TouchedMap::mark(const PageSet& pages, Touchers by) {
  for (const PageRange& range : pages.ranges())
    mark(range, by);
}

void TouchedMap::clear(PageRange pages) {
  if (!pages.empty()) intervals_->map.erase(interval(pages));
}

Touchers TouchedMap::at(PageNumber page) const {
  const auto found = intervals_->map.find(page.value());
  return found == intervals_->map.end() ? Touchers() : Touchers::from_bits(found->second);
}

bool TouchedMap::empty() const { return intervals_->map.empty(); }

std::vector<TouchedMap::Entry> TouchedMap::entries() const {
  std::vector<Entry> result;
  result.reserve(intervals_->map.iterative_size());
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
