module;
#include <algorithm>
#include <boost/icl/interval_set.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>
module cppvmm.guest_memory:page_set.impl;
import :page_set;

namespace cppvmm {

using PageInterval = boost::icl::right_open_interval<std::uint64_t>;

struct PageSet::Intervals {
  boost::icl::interval_set<std::uint64_t, std::less, PageInterval> set;
};

static PageInterval interval(PageRange range) { return {range.first().value(), range.end().value()}; }

static PageRange page_range(const PageInterval& interval) {
  return *PageRange::make(PageNumber(interval.lower()), interval.upper() - interval.lower());
}

PageSet::PageSet() : intervals_(std::make_unique<Intervals>()) {}
PageSet::PageSet(PageRange range) : PageSet() { add(range); }
PageSet::PageSet(const PageSet& other)
    : intervals_(other.intervals_ ? std::make_unique<Intervals>(*other.intervals_) : std::make_unique<Intervals>()) {}
PageSet::PageSet(PageSet&& other) noexcept = default;
PageSet& PageSet::operator=(const PageSet& other) {
  if (this != &other) *this = PageSet(other);
  return *this;
}
PageSet& PageSet::operator=(PageSet&& other) noexcept = default;
PageSet::~PageSet() = default;

void PageSet::add(PageRange range) {
  if (range.empty()) return;
  auto& set = intervals_->set;
  set.add(set.end(), interval(range));
}

void PageSet::add(const PageSet& other) { intervals_->set += other.intervals_->set; }

void PageSet::remove(PageRange range) {
  if (!range.empty()) intervals_->set.subtract(interval(range));
}

void PageSet::remove(const PageSet& other) {
  // One by one, each a search, is for a few ranges; for many, one pass over both that writes the difference anew.
  if (other.range_count() < range_count() / 16) {
    intervals_->set -= other.intervals_->set;
    return;
  }
  PageSet difference;
  const auto& holes = other.intervals_->set;
  auto hole = holes.begin();
  for (const auto& each : intervals_->set) {
    std::uint64_t at = each.lower();
    while (hole != holes.end() && hole->upper() <= at)
      ++hole;
    for (auto next = hole; next != holes.end() && next->lower() < each.upper(); ++next) {
      if (next->lower() > at) difference.add(page_range({at, next->lower()}));
      at = std::max(at, next->upper());
      hole = next;
    }
    if (at < each.upper()) difference.add(page_range({at, each.upper()}));
  }
  *this = std::move(difference);
}

void PageSet::intersect(const PageSet& other) { intervals_->set &= other.intervals_->set; }

bool PageSet::contains(PageNumber page) const { return boost::icl::contains(intervals_->set, page.value()); }

bool PageSet::contains(PageRange range) const {
  return range.empty() || boost::icl::contains(intervals_->set, interval(range));
}

bool PageSet::intersects(PageRange range) const {
  return !range.empty() && boost::icl::intersects(intervals_->set, interval(range));
}

bool PageSet::empty() const { return intervals_->set.empty(); }

std::uint64_t PageSet::page_count() const {
  std::uint64_t pages = 0;
  for (const auto& each : intervals_->set)
    pages += each.upper() - each.lower();
  return pages;
}

std::size_t PageSet::range_count() const { return intervals_->set.iterative_size(); }

std::vector<PageRange> PageSet::ranges() const {
  std::vector<PageRange> result;
  result.reserve(range_count());
  for (const auto& each : intervals_->set)
    result.push_back(page_range(each));
  return result;
}

std::vector<PageRange> PageSet::largest(std::size_t count) const {
  auto all = ranges();
  const auto larger = [](const PageRange& left, const PageRange& right) {
    return left.count() != right.count() ? left.count() > right.count() : left.first() < right.first();
  };
  const auto kept = static_cast<std::ptrdiff_t>(std::min(count, all.size()));
  std::partial_sort(all.begin(), all.begin() + kept, all.end(), larger);
  all.resize(static_cast<std::size_t>(kept));
  return all;
}

bool PageSet::equals(const PageSet& other) const { return intervals_->set == other.intervals_->set; }

} // namespace cppvmm
