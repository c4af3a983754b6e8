module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>
module cppvmm.guest_memory:survey.impl;
import :address;
import :evidence;
import :extents;
import :memory_map;
import :page_set;
import :region;
import :survey;
import :touched_map;

namespace cppvmm {

const char* to_string(Evidence evidence) {
  switch (evidence) {
  case Evidence::none:
    return "none";
  case Evidence::page_tables_scan:
    return "page_tables_scan";
  case Evidence::page_tables_read:
    return "page_tables_read";
  case Evidence::page_cache:
    return "page_cache";
  case Evidence::page_cache_blocks:
    return "page_cache_blocks";
  }
  return "unknown";
}

TouchedMap Survey::touched_map() const {
  TouchedMap result = marks;
  PageSet unmarked = touched;
  unmarked.remove(marks.pages());
  result.mark(unmarked, Toucher::unknown);
  return result;
}

static RegionEvidence evidence_of(const Region& region, EvidenceSource source) {
  const void* host = region.host_address();
  const auto of_nature = [&](AdoptedNature nature) {
    return nature == AdoptedNature::private_anonymous
               ? page_table_evidence(host, region.bytes(), source)
               : page_cache_evidence(region.file_descriptor(), region.file_offset(), host, region.bytes(), source);
  };
  switch (region.backing()) {
  case Backing::anonymous:
    return of_nature(AdoptedNature::private_anonymous);
  case Backing::memfd:
    return of_nature(AdoptedNature::shared_memory);
  case Backing::hugetlb:
    break;
  case Backing::adopted: {
    if (region.nature() == AdoptedNature::unknown) break;
    // Before and after: the embedder may have mapped something else there since the region was adopted.
    const auto fits = [&] {
      return check_nature(host, region.bytes(), region.nature(), region.file_descriptor(), region.file_offset());
    };
    RegionEvidence refused;
    if (auto before = fits(); !before) {
      refused.error = before.error();
      return refused;
    }
    RegionEvidence evidence = of_nature(region.nature());
    if (auto after = fits(); !after) {
      refused.error = after.error();
      return refused;
    }
    return evidence;
  }
  }
  return {};
}

/// Adds the union of the lists, which count from the start of `region`; how many pages that is.
static std::uint64_t add_touched(PageSet& touched, PageRange region, std::span<const ExtentList> lists) {
  const auto add_to = [&](PageSet& set, const ExtentList& list) {
    for (const Extent& extent : list.extents())
      set.add(*PageRange::make(PageNumber(region.first().value() + extent.first), extent.count));
  };
  // The lists beyond the first hold what only a second look showed: little, most often nothing.
  PageSet more;
  for (const ExtentList& list : lists.subspan(std::min<std::size_t>(lists.size(), 1)))
    add_to(more, list);
  if (lists.empty()) return 0;
  add_to(touched, lists.front());
  std::uint64_t pages = 0;
  for (const Extent& extent : lists.front().extents())
    pages += extent.count;
  if (more.empty()) return pages;
  touched.add(more);
  PageSet all = touched;
  all.intersect(region);
  return all.page_count();
}

Survey survey_map(const MemoryMap& map, const SurveyOptions& options) {
  using Clock = std::chrono::steady_clock;
  Survey survey;
  const auto begin = Clock::now();
  for (const Region& region : map.regions()) {
    RegionSurvey report{.pages = region.pages(), .kind = region.kind(), .backing = region.backing()};
    // ROM is never reported, so nothing needs to be known of it.
    if (region.kind() == RegionKind::ram) {
      const auto region_begin = Clock::now();
      survey.ram.add(region.pages());
      RegionEvidence evidence = evidence_of(region, options.source);
      if (evidence.kind == Evidence::none) {
        survey.touched.add(region.pages());
        report.touched_pages = region.pages().count();
      } else {
        report.touched_pages = add_touched(survey.touched, region.pages(), evidence.touched);
        for (const ExtentList& list : evidence.touched)
          report.given_up_pages += list.given_up_pages();
      }
      report.evidence = evidence.kind;
      report.unaccounted_pages = evidence.unaccounted_pages;
      report.error = evidence.error;
      report.cost = Clock::now() - region_begin;
    }
    survey.regions.push_back(std::move(report));
  }
  survey.cost = Clock::now() - begin;
  return survey;
}

} // namespace cppvmm
