module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <ranges>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:survey_bound.impl;
import :address;
import :error;
import :marks;
import :page_set;
import :region;
import :survey;
import :survey_bound;
import :survey_stop;
import :touched_map;
import :toucher;

namespace cppvmm {

/// In the reports of the regions that they are of. Both ascend.
static void note_given_up(std::span<RegionSurvey> reports, const std::vector<PageRange>& given_up) {
  auto report = reports.begin();
  for (const PageRange& range : given_up) {
    while (report != reports.end() && report->pages.end() <= range.first())
      ++report;
    for (auto at = report; at != reports.end() && at->pages.first() < range.end(); ++at) {
      const PageNumber first = std::max(range.first(), at->pages.first());
      const PageNumber end = std::min(range.end(), at->pages.end());
      const std::uint64_t pages = end.value() - first.value();
      at->given_up_pages += pages;
      at->zeroed_pages -= pages;
    }
  }
}

void bound_ranges(Survey& survey) {
  // As many gaps as there are touched ranges, but for one more at the end and what is between regions.
  if (survey.touched.range_count() <= most_survey_ranges) return;
  PageSet zeroed = survey.ram;
  zeroed.remove(survey.touched);
  constexpr std::size_t kept = most_survey_ranges / 2;
  if (zeroed.range_count() <= kept) return;

  const std::span<const PageRange> ranges = zeroed.ranges();
  std::vector<std::uint64_t> sizes;
  sizes.reserve(ranges.size());
  for (const PageRange& range : ranges)
    sizes.push_back(range.count());
  const auto smallest_kept = sizes.begin() + static_cast<std::ptrdiff_t>(kept - 1);
  std::nth_element(sizes.begin(), smallest_kept, sizes.end(), std::greater<>());
  const std::uint64_t threshold = *smallest_kept;
  // Of the ranges as large as the threshold, only as many as fit.
  auto equal_kept = kept - static_cast<std::size_t>(std::count_if(sizes.begin(), smallest_kept + 1,
                                                                  [&](auto size) { return size > threshold; }));
  const PageNumber end = survey.regions.back().pages.end();
  PageSet untouched;
  std::vector<PageRange> given_up;
  for (const PageRange& range : ranges) {
    const bool is_kept = range.count() > threshold || (range.count() == threshold && equal_kept > 0);
    if (range.count() == threshold && is_kept) --equal_kept;
    if (is_kept || range.end() == end)
      untouched.add(range);
    else
      given_up.push_back(range);
  }
  note_given_up(survey.regions, given_up);
  survey.touched = survey.ram;
  survey.touched.remove(untouched);
}

/// Who touched the largest ranges, as many as there is room for.
class LargestMarks {
public:
  explicit LargestMarks(std::size_t room) : room_(room) {}

  void add(PageRange pages, Touchers by) {
    if (room_ == 0) return;
    entries_.push_back({pages, by});
    if (entries_.size() >= 2 * room_) keep_largest();
  }
  void add_to(TouchedMap& map) {
    if (entries_.size() > room_) keep_largest();
    const auto first = [](const TouchedMap::Entry& entry) { return entry.pages.first(); };
    if (!std::ranges::is_sorted(entries_, {}, first)) std::ranges::sort(entries_, {}, first);
    // From the last on, for which the map has a quick way.
    for (const TouchedMap::Entry& entry : std::views::reverse(entries_))
      map.mark(entry.pages, entry.by);
  }

private:
  void keep_largest() {
    std::ranges::nth_element(entries_, entries_.begin() + static_cast<std::ptrdiff_t>(room_), std::greater<>(),
                             [](const TouchedMap::Entry& entry) { return entry.pages.count(); });
    entries_.resize(room_);
  }

  std::size_t room_;
  std::vector<TouchedMap::Entry> entries_;
};

/// For ranges that do not overlap. One within another's entry makes three of it.
static std::size_t room_for_touchers(const Survey& survey) {
  const std::size_t entries = survey.touchers.entry_count();
  return (most_survey_ranges - std::min(most_survey_ranges, entries)) / (entries == 0 ? 1 : 2);
}

void lose_evidence(Survey& survey, const MemoryError& why) {
  survey.touched = survey.ram;
  for (RegionSurvey& report : survey.regions) {
    if (report.kind != RegionKind::ram) continue;
    report.zeroed_pages = 0;
    if (report.error) continue;
    report.error = why;
    report.error->address = report.pages.start_address().value();
    report.error->length = report.pages.bytes();
  }
}

void add_marks(Survey& survey, const Marks& marks) {
  const Marks::View view(marks);
  // Of marks that cannot be seen, none is passed over.
  if (!view.is_held()) return lose_evidence(survey, survey_stopped(0, 0));
  if (view.is_blank()) return;
  if (view.error() != 0)
    return lose_evidence(
        survey, {.code = MemoryErrc::os, .os_error = view.error(), .operation = "membarrier, to see all marks"});
  LargestMarks touchers(room_for_touchers(survey));
  const PageSet evidence = std::exchange(survey.touched, {});
  survey.ram = {};
  auto next = evidence.ranges().begin();
  for (RegionSurvey& report : std::exchange(survey.regions, {})) {
    if (report.kind == RegionKind::ram) {
      // What evidence calls touched and what is marked, together in ascending order.
      ExtentList touched;
      const auto add_evidence = [&](PageNumber last) {
        for (; next != evidence.ranges().end() && std::max(next->first(), report.pages.first()) <= last; ++next) {
          const std::uint64_t first = std::max(next->first(), report.pages.first()).value();
          touched.add({first, std::min(next->end(), report.pages.end()).value() - first});
          if (next->end() > report.pages.end()) return; // it goes on in the next region
        }
      };
      view.for_each(report.pages, [&](PageRange pages, Touchers by) {
        add_evidence(pages.first());
        touched.add({pages.first().value(), pages.count()});
        touchers.add(pages, by);
      });
      add_evidence(PageNumber(report.pages.end().value() - 1));
      if (survey.touched.empty()) survey.touched.reserve(touched.size());
      for (const Extent extent : touched)
        survey.touched.add(*PageRange::make(PageNumber(extent.first), extent.count));
      report.given_up_pages += touched.given_up_pages();
      report.zeroed_pages -= touched.given_up_pages();
      survey.ram.add(report.pages);
    }
    survey.regions.push_back(report);
    bound_ranges(survey);
  }
  touchers.add_to(survey.touchers);
}

void mark_bounded(Survey& survey, const PageSet& pages, Touchers by) {
  const std::size_t room = room_for_touchers(survey);
  if (pages.range_count() <= room) {
    survey.touchers.mark(pages, by);
    return;
  }
  for (const PageRange& range : pages.largest(room))
    survey.touchers.mark(range, by);
}

} // namespace cppvmm
