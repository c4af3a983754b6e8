module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>
module cppvmm.guest_memory:page_set.impl;
import :address;
import :page_set;

namespace cppvmm {

/// The first of the ascending ranges that ends behind the page.
template <class Ranges>
static auto first_behind(Ranges& ranges, PageNumber page) {
  return std::ranges::upper_bound(ranges, page, {}, &PageRange::end);
}

/// Adds behind all others but for the last, with which it may overlap.
void PageSet::append(PageNumber first, PageNumber end) {
  if (ranges_.empty() || ranges_.back().end() < first)
    push_back(between(first, end));
  else if (ranges_.back().end() < end)
    ranges_.back() = between(ranges_.back().first(), end);
}

PageSet PageSet::of(std::vector<PageRange> ranges) {
  std::ranges::sort(ranges, [](const PageRange& left, const PageRange& right) { return left.first() < right.first(); });
  auto end = ranges.begin();
  for (const PageRange& range : ranges) {
    if (range.empty()) continue;
    if (end != ranges.begin() && range.first() <= (end - 1)->end())
      *(end - 1) = between((end - 1)->first(), std::max((end - 1)->end(), range.end()));
    else
      *end++ = range;
  }
  ranges.erase(end, ranges.end());
  PageSet set;
  set.ranges_ = std::move(ranges);
  return set;
}

void PageSet::add_among(PageRange range) {
  if (range.empty()) return;
  if (ranges_.empty() || ranges_.back().first() <= range.first()) {
    append(range.first(), range.end());
    return;
  }
  // Those that overlap it or touch it become one with it.
  const auto from = std::ranges::lower_bound(ranges_, range.first(), {}, &PageRange::end);
  const auto to = std::upper_bound(from, ranges_.end(), range.end(),
                                   [](PageNumber page, const PageRange& each) { return page < each.first(); });
  if (from == to) {
    ranges_.insert(from, range);
    return;
  }
  *from = between(std::min(from->first(), range.first()), std::max((to - 1)->end(), range.end()));
  ranges_.erase(from + 1, to);
}

void PageSet::add(const PageSet& other) {
  if (other.empty()) return;
  if (ranges_.empty()) {
    ranges_ = other.ranges_;
    return;
  }
  if (ranges_.back().first() <= other.ranges_.front().first()) {
    for (const PageRange& range : other.ranges_)
      append(range.first(), range.end());
    return;
  }
  PageSet sum;
  sum.ranges_.reserve(ranges_.size() + other.ranges_.size());
  auto mine = ranges_.begin();
  auto theirs = other.ranges_.begin();
  while (mine != ranges_.end() || theirs != other.ranges_.end()) {
    const bool is_mine = theirs == other.ranges_.end() || (mine != ranges_.end() && mine->first() <= theirs->first());
    const PageRange& next = is_mine ? *mine++ : *theirs++;
    sum.append(next.first(), next.end());
  }
  *this = std::move(sum);
}

void PageSet::add(PageSet&& other) {
  if (ranges_.empty())
    ranges_ = std::move(other.ranges_);
  else
    add(std::as_const(other));
}

void PageSet::remove(PageRange range) {
  if (range.empty()) return;
  const auto from = first_behind(ranges_, range.first());
  const auto to = std::lower_bound(from, ranges_.end(), range.end(),
                                   [](const PageRange& each, PageNumber page) { return each.first() < page; });
  if (from == to) return;
  // What is left of the first and of the last of those that overlap it, which may be the same.
  std::vector<PageRange> rest;
  if (from->first() < range.first()) rest.push_back(between(from->first(), range.first()));
  if (range.end() < (to - 1)->end()) rest.push_back(between(range.end(), (to - 1)->end()));
  const auto kept = std::min<std::ptrdiff_t>(to - from, static_cast<std::ptrdiff_t>(rest.size()));
  std::copy_n(rest.begin(), kept, from);
  if (kept < std::ssize(rest))
    ranges_.insert(from + kept, rest.back());
  else
    ranges_.erase(from + kept, to);
}

void PageSet::remove(const PageSet& other) {
  if (other.empty() || ranges_.empty()) return;
  // Of a large set, what a small one has nothing to do with costs nothing.
  const auto from = first_behind(other.ranges_, ranges_.front().first());
  const auto to = std::lower_bound(from, other.ranges_.end(), ranges_.back().end(),
                                   [](const PageRange& each, PageNumber page) { return each.first() < page; });
  const auto holes = static_cast<std::size_t>(to - from);
  // Few are taken out in place, without room for another set: what several calls leave out of an answer.
  constexpr std::size_t few = 8;
  if (holes <= few && &other != this) {
    for (auto range = from; range != to; ++range)
      remove(*range);
    return;
  }
  std::vector<PageRange> difference;
  difference.reserve(ranges_.size() + holes);
  for_each_without(other, [&](const PageRange& range) { difference.push_back(range); });
  ranges_ = std::move(difference);
}

void PageSet::intersect(const PageSet& other) {
  std::vector<PageRange> both;
  if (!ranges_.empty() && !other.empty()) {
    auto mine = first_behind(ranges_, other.ranges_.front().first());
    auto theirs = first_behind(other.ranges_, ranges_.front().first());
    while (mine != ranges_.end() && theirs != other.ranges_.end()) {
      const PageNumber first = std::max(mine->first(), theirs->first());
      const PageNumber end = std::min(mine->end(), theirs->end());
      if (first < end) both.push_back(between(first, end));
      if (mine->end() < theirs->end())
        ++mine;
      else
        ++theirs;
    }
  }
  ranges_ = std::move(both);
}

bool PageSet::contains(PageNumber page) const {
  const auto found = first_behind(ranges_, page);
  return found != ranges_.end() && found->contains(page);
}

bool PageSet::contains(PageRange range) const {
  if (range.empty()) return true;
  const auto found = first_behind(ranges_, range.first());
  return found != ranges_.end() && found->first() <= range.first() && range.end() <= found->end();
}

bool PageSet::intersects(PageRange range) const {
  if (range.empty()) return false;
  const auto found = first_behind(ranges_, range.first());
  return found != ranges_.end() && found->first() < range.end();
}

std::uint64_t PageSet::page_count() const {
  std::uint64_t pages = 0;
  for (const PageRange& range : ranges_)
    pages += range.count();
  return pages;
}

static bool is_larger(const PageRange& left, const PageRange& right) {
  return left.count() != right.count() ? left.count() > right.count() : left.first() < right.first();
}

void LargestRanges::add_large(PageRange range) {
  if (heap_.size() == count_) {
    std::ranges::pop_heap(heap_, is_larger);
    heap_.back() = range;
  } else {
    heap_.push_back(range);
  }
  std::ranges::push_heap(heap_, is_larger);
  if (heap_.size() == count_) least_ = heap_.front().count();
}

std::vector<PageRange> LargestRanges::take() && {
  std::ranges::sort_heap(heap_, is_larger);
  return std::move(heap_);
}

std::vector<PageRange> PageSet::largest(std::size_t count, const PageSet& without) const {
  if (count == 0) return {};
  LargestRanges result(count, ranges_.size() + without.ranges_.size());
  for_each_without(without, [&](const PageRange& range) { result.add(range); });
  return std::move(result).take();
}

} // namespace cppvmm
