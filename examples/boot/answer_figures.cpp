#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <ratio>
#include <string>
#include <utility>
#include <vector>

#include "huge_blocks.hpp"

#include "answer_figures.hpp"

namespace cppvmm::boot {
namespace {

using Microseconds = std::chrono::duration<double, std::micro>;

std::optional<std::string> describe(const std::optional<MemoryError>& error) {
  return error ? std::optional(error->message()) : std::nullopt;
}

std::optional<WatchFigures> describe(const std::optional<WatchReport>& watch) {
  if (!watch) return std::nullopt;
  return WatchFigures{.written_pages = watch->written_pages,
                      .zero_pages = watch->zero_pages,
                      .us = Microseconds(watch->cost).count(),
                      .error = describe(watch->error)};
}

std::optional<ContentFigures> describe(const std::optional<ContentCheckReport>& content) {
  if (!content) return std::nullopt;
  return ContentFigures{.checked_pages = content->checked_pages,
                        .zero_pages = content->zero_pages,
                        .absent_pages = content->absent_pages,
                        .unchecked_pages = content->unchecked_pages,
                        .us = Microseconds(content->cost).count(),
                        .error = describe(content->error)};
}

PageClass class_of(Touchers by) {
  constexpr std::array<std::pair<Toucher, PageClass>, 3> known = {
      {{Toucher::host, PageClass::host}, {Toucher::guest, PageClass::guest}, {Toucher::device, PageClass::device}}};
  auto what = PageClass::unknown;
  for (const auto& [toucher, drawn] : known)
    if (by.has(toucher)) what = what == PageClass::unknown ? drawn : PageClass::several;
  return what;
}

std::vector<ReportedRange> ranges_of(const PageSet& pages) {
  std::vector<ReportedRange> ranges;
  for (const auto& range : pages.ranges())
    ranges.push_back({range.first().value(), range.count()});
  return ranges;
}

} // namespace

AnswerFigures describe(const BootZeroedAnswer& answer) {
  AnswerFigures figures;
  PageSet reported;
  for (const auto& range : answer.ranges) {
    figures.ranges.push_back({range.first().value(), range.count()});
    reported.add(range);
  }
  reported.intersect(answer.survey.ram);
  figures.reported_pages = reported.page_count();
  figures.touched_pages = answer.survey.touched.page_count();
  // Pages in use that hold no data yet are in neither answer.
  PageSet in_use = answer.survey.ram;
  in_use.remove(answer.zeroed());
  figures.reported_pages_by_2_mib = pages_in_untouched_blocks(ranges_of(answer.survey.ram), ranges_of(in_use));
  figures.survey_us = Microseconds(answer.survey.cost).count();
  for (const auto& region : answer.survey.regions)
    figures.regions.push_back({.first_page = region.pages.first().value(),
                               .page_count = region.pages.count(),
                               .kind = region.kind == RegionKind::ram ? "ram" : "rom",
                               .backing = to_string(region.backing),
                               .evidence = to_string(region.evidence),
                               .watch = describe(region.watch),
                               .log = describe(region.log),
                               .content = describe(region.content),
                               .touched_pages = region.touched_pages,
                               .zeroed_pages = region.zeroed_pages,
                               .given_up_pages = region.given_up_pages,
                               .unaccounted_pages = region.unaccounted_pages,
                               .survey_us = Microseconds(region.cost).count(),
                               .error = describe(region.error)});
  return figures;
}

std::vector<PictureRange> picture_of(const BootZeroedAnswer& answer, const PageSet& given_back) {
  const Survey& survey = answer.survey;
  PageSet zeroed = answer.zeroed();
  std::vector<PictureRange> result;
  const auto add = [&](const PageSet& pages, PageClass what) {
    for (const auto& range : pages.ranges())
      result.push_back({range.first().value(), range.count(), what});
  };
  PageSet returned = given_back;
  returned.intersect(zeroed);
  PageSet left_out = survey.ram;
  left_out.remove(zeroed);
  add(returned, PageClass::returned);
  zeroed.remove(returned);
  add(zeroed, PageClass::zeroed);
  left_out.remove(survey.touched);
  add(left_out, PageClass::left_out);
  for (const auto& entry : survey.touched_map().entries()) {
    // Marks may be on pages that are no RAM.
    PageSet pages = entry.pages;
    if (!survey.touched.contains(entry.pages)) pages.intersect(survey.touched);
    add(pages, class_of(entry.by));
  }
  std::ranges::sort(result, {}, &PictureRange::first);
  return result;
}

} // namespace cppvmm::boot
