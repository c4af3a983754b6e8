module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
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
import :write_record;

namespace cppvmm {

const char* to_string(Evidence evidence) {
  switch (evidence) {
  case Evidence::none:
    return "none";
  case Evidence::page_tables_scan:
    return "page_tables_scan";
  case Evidence::page_tables_read:
    return "page_tables_read";
  case Evidence::huge_page_count:
    return "huge_page_count";
  case Evidence::page_cache:
    return "page_cache";
  case Evidence::page_cache_blocks:
    return "page_cache_blocks";
  case Evidence::page_cache_lookup:
    return "page_cache_lookup";
  case Evidence::file_holes:
    return "file_holes";
  }
  return "unknown";
}

TouchedMap Survey::touched_map() const {
  TouchedMap result = touchers;
  PageSet unmarked = touched;
  unmarked.remove(touchers.pages());
  result.mark(unmarked, Toucher::unknown);
  return result;
}

static FileMapping file_mapping(const Region& region) {
  return {.fd = region.file_descriptor(),
          .offset = region.file_offset(),
          .host = region.host_address(),
          .bytes = region.bytes()};
}

bool is_watchable(Backing backing) {
  switch (backing) {
  case Backing::anonymous:
  case Backing::memfd:
  case Backing::shared_anonymous:
  case Backing::hugetlb:
  case Backing::hugetlb_memfd:
    return true;
  // Dropping a page brings the file's data back, which is no write.
  case Backing::private_file:
  case Backing::shared_file:
  case Backing::unknown:
    break;
  }
  return false;
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
    return hugetlb_file_evidence(memory);
  case Backing::private_file:
    return private_file_evidence(memory, source);
  case Backing::unknown:
    break;
  }
  return {};
}

RegionEvidence region_evidence(const Region& region, EvidenceSource source) {
  const FileMapping memory = file_mapping(region);
  // Someone may map something else there, or give a region's missing pages to a userfaultfd, at any time: before the
  // look at the books and after it, nothing of that may be so.
  const auto is_as_stated = [&] { return check_backing(memory, region.backing(), region.kind()); };
  RegionEvidence refused;
  refused.is_foreign = true;
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

ExtentList data_among(const Region& region, const ExtentList& pages) {
  const ContentCheckOptions options;
  ContentBudget budget(options);
  return scan_content(file_mapping(region), region.backing(), pages.extents(), options, budget, looks_at_watched)
      .touched;
}

/// The pages of all the lists, which count from the start of `region`.
static PageSet union_of(PageRange region, std::span<const ExtentList> lists) {
  PageSet result;
  const auto add_to = [&](PageSet& set, const ExtentList& list) {
    for (const Extent& extent : list.extents())
      set.add(*PageRange::make(PageNumber(region.first().value() + extent.first), extent.count));
  };
  if (lists.empty()) return result;
  add_to(result, lists.front());
  // The lists beyond the first hold what only a second look showed: little, most often nothing.
  for (const ExtentList& list : lists.subspan(1)) {
    PageSet more;
    add_to(more, list);
    result.add(more);
  }
  return result;
}

using Clock = std::chrono::steady_clock;

/// Takes out of `touched` all but what may have been written.
static void keep_written(PageSet& touched, const PageSet& written, WatchReport& report) {
  const std::uint64_t before = touched.page_count();
  touched.intersect(written);
  report.written_pages = written.page_count();
  report.zero_pages = before - touched.page_count();
}

/// Takes out of `touched` what the watch knows to be unwritten.
static WatchReport narrow(PageSet& touched, const WriteWatch& watch) {
  const auto begin = Clock::now();
  WatchReport report;
  if (const auto lists = watch.may_hold_data(); !lists) {
    report.error = lists.error();
  } else {
    const PageSet written = union_of(watch.region().pages(), *lists);
    keep_written(touched, written, report);
  }
  report.cost = Clock::now() - begin;
  return report;
}

/// What a log shows of a region.
struct LoggedWrites {
  PageSet logged;
  PageSet recorded;
};

/// Takes out of `touched` what is neither in the log nor recorded, if that is all that is written.
static WatchReport narrow(PageSet& touched, const KeptLog& kept, WriteRecord& record, LoggedWrites& writes) {
  const auto begin = Clock::now();
  WatchReport report;
  const PageRange pages = record.region().pages();
  const bool is_current = [&] {
    if (auto collected = record.collect(kept.log); !collected) {
      report.error = collected.error();
      return false;
    }
    return true;
  }();
  const ExtentList logged = record.logged();
  const ExtentList recorded = record.recorded();
  writes.logged = union_of(pages, std::span(&logged, 1));
  writes.recorded = union_of(pages, std::span(&recorded, 1));
  if (is_current && kept.is_complete && is_watchable(record.region().backing())) {
    PageSet written = writes.logged;
    written.add(writes.recorded);
    written.add(union_of(pages, std::span(&record.baseline(), 1)));
    keep_written(touched, written, report);
  }
  report.cost = Clock::now() - begin;
  return report;
}

/// Whether all writes to it go through this mapping, but for device DMA to pages that were pinned before.
static bool is_private(Backing backing) {
  return backing == Backing::anonymous || backing == Backing::hugetlb || backing == Backing::private_file;
}

static std::vector<Extent> extents_of(const PageSet& pages, PageRange region) {
  std::vector<Extent> extents;
  for (const PageRange& range : pages.ranges())
    extents.push_back({range.first().value() - region.first().value(), range.count()});
  return extents;
}

/// Takes from `touched`, which are pages of the region, those whose content reads zero. Of hugetlb memory,
/// `whole` are the huge pages that these are of: parts of one cannot be watched.
static void check_content(PageSet& touched, const PageSet& whole, const Region& region,
                          const ContentCheckOptions& options, ContentBudget& budget, std::mutex& one_at_a_time,
                          RegionSurvey& report) {
  const auto begin = Clock::now();
  const FileMapping memory = file_mapping(region);
  const std::vector<Extent> extents = extents_of(touched, region.pages());
  // Words are read one after the other: of a page that is written meanwhile, each may have been zero when it was read,
  // and the page never.
  std::unique_lock lock(one_at_a_time, std::defer_lock);
  std::unique_ptr<WriteWatch> watch;
  if (is_private(region.backing()) && !budget.is_spent()) {
    lock.lock();
    const bool is_huge = region.backing() == Backing::hugetlb;
    if (auto armed = WriteWatch::arm(region, is_huge ? extents_of(whole, region.pages()) : extents))
      watch = std::move(*armed);
  }
  ContentScan scan =
      scan_content(memory, region.backing(), extents, options, budget, watch ? looks_at_watched : looks_at_unwatched);
  PageSet data = union_of(region.pages(), std::span(&scan.touched, 1));
  report.content = scan.report;
  report.content->is_watched = watch != nullptr;
  if (watch) {
    if (const auto written = watch->may_hold_data(); !written) {
      report.content->error = written.error();
      data = touched;
    } else {
      PageSet moved = touched;
      moved.remove(data);
      moved.intersect(union_of(region.pages(), *written));
      report.content->written_pages = moved.page_count();
      data.add(moved);
    }
    watch.reset();
  }
  report.content->cost = Clock::now() - begin;
  // What was read has to be what the guest has.
  if (!check_backing(memory, region.backing(), region.kind())) return;
  touched = std::move(data);
  report.given_up_pages += scan.touched.given_up_pages();
}

/// Surveys one region of RAM: adds to the survey's sets, and fills the report.
static void survey_region(const Region& region, const SurveyOptions& options, const WriteKnowledge& writes,
                          ContentBudget* budget, Survey& survey, RegionSurvey& report) {
  const RegionEvidence evidence = region_evidence(region, options.source);
  report.evidence = evidence.kind;
  report.unaccounted_pages = evidence.unaccounted_pages;
  report.error = evidence.error;
  PageSet touched(region.pages());
  if (evidence.kind != Evidence::none) {
    touched = union_of(region.pages(), evidence.touched);
    for (const ExtentList& list : evidence.touched)
      report.given_up_pages += list.given_up_pages();
  }
  report.touched_pages = touched.page_count();
  if (evidence.is_foreign) {
    survey.touched.add(touched);
    return;
  }
  PageSet whole;
  if (budget && region.backing() == Backing::hugetlb) whole = touched;
  for (const auto& watch : writes.watches)
    if (watch->region() == region) report.watch = narrow(touched, *watch);
  LoggedWrites logged;
  if (writes.log) {
    const std::scoped_lock lock(writes.log->mutex);
    for (const auto& record : writes.log->records) {
      if (record->region() != region) continue;
      WatchReport narrowed = narrow(touched, *writes.log, *record, logged);
      if (narrowed.error || (writes.log->is_complete && is_watchable(region.backing()))) report.log = narrowed;
    }
  }
  if (budget) check_content(touched, whole, region, *options.content_check, *budget, *writes.content_checks, report);
  if (writes.log) {
    // A page that was discarded since is in the log, and not touched.
    logged.logged.intersect(touched);
    logged.recorded.intersect(touched);
    survey.touchers.mark(logged.logged, writes.log->log.by);
    survey.touchers.mark(logged.recorded, Toucher::host);
  }
  report.zeroed_pages = region.pages().count() - touched.page_count();
  survey.touched.add(touched);
}

Survey survey_map(const MemoryMap& map, const SurveyOptions& options, const WriteKnowledge& writes,
                  ContentBudget* budget) {
  Survey survey;
  for (const Region& region : map.regions()) {
    RegionSurvey report{.pages = region.pages(), .kind = region.kind(), .backing = region.backing()};
    // ROM is never reported, so nothing needs to be known of it.
    if (region.kind() == RegionKind::ram) {
      const auto begin = Clock::now();
      survey.ram.add(region.pages());
      survey_region(region, options, writes, budget, survey, report);
      report.cost = Clock::now() - begin;
    }
    survey.regions.push_back(report);
  }
  return survey;
}

} // namespace cppvmm
