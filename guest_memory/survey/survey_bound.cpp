module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"
#include "../memory/largest_kept.hpp"

module cppvmm.guest_memory:survey_bound.impl;
import :address;
import :error;
import :marks;
import :page_set;
import :region;
import :survey;
import :survey_bound;
import :survey_stop;
import :touched_runs;
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

  LargestKept largest = [&] {
    std::vector<std::uint64_t> sizes;
    sizes.reserve(zeroed.range_count());
    for (const PageRange& range : zeroed.ranges())
      sizes.push_back(range.count());
    return LargestKept(std::move(sizes), kept);
  }();
  const PageNumber end = survey.regions.back().pages.end();
  PageSet untouched;
  std::vector<PageRange> given_up;
  for (const PageRange& range : zeroed.ranges()) {
    if (largest.keeps(range.count()) || range.end() == end)
      untouched.add(range);
    else
      given_up.push_back(range);
  }
  note_given_up(survey.regions, given_up);
  survey.touched = survey.ram;
  survey.touched.remove(untouched);
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

/// What evidence calls touched, in ascending order, in less memory.
static ExtentList packed(const PageSet& pages) {
  ExtentList list(std::numeric_limits<std::size_t>::max());
  for (const PageRange& range : pages.ranges())
    list.add({range.first().value(), range.count()});
  return list;
}

/// A region with what of it is touched, by evidence or by mark.
struct MarkedRegion {
  RegionSurvey report;
  ExtentList touched{};
};

/// Of regions that lie behind all that the survey has.
static void take_over(Survey& survey, std::vector<MarkedRegion> regions) {
  std::size_t ranges = survey.touched.range_count();
  for (const MarkedRegion& each : regions)
    ranges += each.touched.size();
  // It is bounded after each region.
  survey.touched.reserve(std::min(ranges, 2 * most_survey_ranges));
  for (auto& [report, touched] : regions) {
    if (report.kind == RegionKind::ram) {
      for (const Extent extent : touched)
        survey.touched.add(*PageRange::make(PageNumber(extent.first), extent.count));
      report.given_up_pages += touched.given_up_pages();
      report.zeroed_pages -= touched.given_up_pages();
      survey.ram.add(report.pages);
    }
    survey.regions.push_back(report);
    bound_ranges(survey);
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
  TouchedRuns touchers;
  const ExtentList evidence = packed(std::exchange(survey.touched, {}));
  survey.ram = {};
  auto next = evidence.begin();
  std::vector<MarkedRegion> found;
  std::size_t extents = 0;
  for (const RegionSurvey& report : std::exchange(survey.regions, {})) {
    ExtentList& touched = found.emplace_back(report).touched;
    if (report.kind == RegionKind::ram) {
      const std::uint64_t first = report.pages.first().value();
      const std::uint64_t end = report.pages.end().value();
      // What evidence calls touched and what is marked, together in ascending order.
      const auto add_evidence = [&](std::uint64_t last) {
        for (; next != evidence.end() && std::max((*next).first, first) <= last; ++next) {
          const std::uint64_t from = std::max((*next).first, first);
          touched.add({from, std::min((*next).end(), end) - from});
          if ((*next).end() > end) return; // it goes on in the next region
        }
      };
      view.for_each(report.pages, [&](PageRange pages, Touchers by) {
        add_evidence(pages.first().value());
        touched.add({pages.first().value(), pages.count()});
        touchers.add(pages, by);
      });
      add_evidence(end - 1);
    }
    extents += touched.size();
    if (extents <= most_survey_ranges) continue;
    take_over(survey, std::exchange(found, {}));
    extents = 0;
  }
  take_over(survey, std::move(found));
  survey.touchers = survey.touchers.empty() ? std::move(touchers) : TouchedRuns::united(survey.touchers, touchers);
}

} // namespace cppvmm
