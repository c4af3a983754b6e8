module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>
module cppvmm.guest_memory:survey.impl;
import :address;
import :content_check;
import :content_scan;
import :error;
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
  case Evidence::page_residency:
    return "page_residency";
  case Evidence::page_cache:
    return "page_cache";
  case Evidence::page_cache_blocks:
    return "page_cache_blocks";
  case Evidence::mapped_blocks:
    return "mapped_blocks";
  case Evidence::file_holes:
    return "file_holes";
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

static RegionEvidence evidence_of_backing(const FileMapping& memory, Backing backing, EvidenceSource source) {
  switch (backing) {
  case Backing::anonymous:
    return page_table_evidence(memory.host, memory.bytes, PageEntries::all, source);
  case Backing::memfd:
  case Backing::shared_file:
    return page_cache_evidence(memory, FileChanges::any_time, source);
  case Backing::shared_anonymous:
    return shared_anonymous_evidence(memory.host, memory.bytes, source);
  case Backing::hugetlb:
    return hugetlb_evidence(memory.host, memory.bytes, source);
  case Backing::hugetlb_memfd:
    return hugetlb_file_evidence(memory, source);
  case Backing::private_file:
    return private_file_evidence(memory, source);
  case Backing::unknown:
    break;
  }
  return {};
}

static RegionEvidence evidence_of(const Region& region, EvidenceSource source) {
  const FileMapping memory{.fd = region.file_descriptor(),
                           .offset = region.file_offset(),
                           .host = region.host_address(),
                           .bytes = region.bytes()};
  // Someone may map something else there, or give a region's missing pages to a userfaultfd, at any time: before the
  // look at the books and after it, nothing of that may be so.
  const auto is_as_stated = [&] { return check_backing(memory, region.backing(), region.kind()); };
  RegionEvidence refused;
  if (region.backing() == Backing::unknown) return refused;
  if (auto before = is_as_stated(); !before) {
    refused.error = before.error();
    return refused;
  }
  RegionEvidence evidence = evidence_of_backing(memory, region.backing(), source);
  if (auto after = is_as_stated(); !after) {
    refused.error = after.error();
    return refused;
  }
  return evidence;
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

/// Takes from `touched`, which are pages of the region, those whose content reads zero.
static void check_content(PageSet& touched, const Region& region, const ContentCheckOptions& options,
                          ContentBudget& budget, RegionSurvey& report) {
  const FileMapping memory{.fd = region.file_descriptor(),
                           .offset = region.file_offset(),
                           .host = region.host_address(),
                           .bytes = region.bytes()};
  if (region.backing() == Backing::unknown || !check_backing(memory, region.backing(), region.kind())) return;
  const std::uint64_t start = region.pages().first().value();
  std::vector<Extent> extents;
  for (const PageRange& range : touched.ranges())
    extents.push_back({range.first().value() - start, range.count()});
  const ContentScan scan = scan_content(memory, region.backing(), extents, options, budget);
  if (!check_backing(memory, region.backing(), region.kind())) return;
  touched = PageSet();
  add_touched(touched, region.pages(), std::span(&scan.touched, 1));
  report.given_up_pages += scan.touched.given_up_pages();
  report.content = scan.report;
}

Survey survey_map(const MemoryMap& map, const SurveyOptions& options) {
  using Clock = std::chrono::steady_clock;
  Survey survey;
  std::optional<ContentBudget> budget;
  if (options.content_check) budget.emplace(*options.content_check);
  for (const Region& region : map.regions()) {
    RegionSurvey report{.pages = region.pages(), .kind = region.kind(), .backing = region.backing()};
    // ROM is never reported, so nothing needs to be known of it.
    if (region.kind() == RegionKind::ram) {
      const auto region_begin = Clock::now();
      survey.ram.add(region.pages());
      RegionEvidence evidence = evidence_of(region, options.source);
      PageSet touched;
      if (evidence.kind == Evidence::none) {
        touched = PageSet(region.pages());
        report.touched_pages = region.pages().count();
      } else {
        report.touched_pages = add_touched(touched, region.pages(), evidence.touched);
        for (const ExtentList& list : evidence.touched)
          report.given_up_pages += list.given_up_pages();
      }
      if (options.content_check && (!evidence.error || evidence.error->code != MemoryErrc::wrong_nature))
        check_content(touched, region, *options.content_check, *budget, report);
      survey.touched.add(touched);
      report.evidence = evidence.kind;
      report.unaccounted_pages = evidence.unaccounted_pages;
      report.error = evidence.error;
      report.cost = Clock::now() - region_begin;
    }
    survey.regions.push_back(report);
  }
  return survey;
}

} // namespace cppvmm
