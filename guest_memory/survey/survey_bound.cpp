module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>
module cppvmm.guest_memory:survey_bound.impl;
import :address;
import :page_set;
import :region;
import :survey;
import :survey_bound;
import :touched_map;

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

void mark_bounded(Survey& survey, const PageSet& pages, Touchers by) {
  const std::size_t room = most_survey_ranges - std::min(most_survey_ranges, survey.touchers.entry_count());
  if (pages.range_count() <= room) {
    survey.touchers.mark(pages, by);
    return;
  }
  for (const PageRange& range : pages.largest(room))
    survey.touchers.mark(range, by);
}

} // namespace cppvmm
