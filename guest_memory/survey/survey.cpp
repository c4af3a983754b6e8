module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <memory>
#include <mutex>
#include <optional>
#include <ranges>
#include <span>
#include <utility>
#include <vector>

#include "../memory/extents.hpp"

module cppvmm.guest_memory:survey.impl;
import :address;
import :backing;
import :content_check;
import :content_scan;
import :error;
import :evidence;
import :guest_copy;
import :memory_map;
import :page_evidence;
import :page_set;
import :region;
import :region_evidence;
import :survey;
import :survey_bound;
import :survey_map;
import :survey_stop;
import :touched_map;
import :touched_runs;
import :write_record;

namespace cppvmm {

PageSet Survey::zeroed() const {
  PageSet result;
  result.reserve(ram.range_count() + touched.range_count() + left_out.range_count());
  for_each_zeroed({}, [&](const PageRange& range) { result.add(range); });
  return result;
}

std::vector<PageRange> Survey::largest_zeroed(std::size_t count, const PageSet& without) const {
  if (count == 0) return {};
  LargestRanges largest(count,
                        ram.range_count() + touched.range_count() + left_out.range_count() + without.range_count());
  for_each_zeroed(without, [&](const PageRange& range) { largest.add(range); });
  return std::move(largest).take();
}

TouchedMap Survey::touched_map() const {
  TouchedMap result(touchers);
  PageSet unmarked = touched;
  unmarked.remove(touchers.pages());
  result.mark(unmarked, Toucher::unknown);
  return result;
}

ExtentList data_among(const Region& region, const ExtentList& pages) {
  const ContentCheckOptions options;
  ContentBudget budget(options);
  return scan_content(file_mapping(region), region.backing(), pages.to_vector(), options, budget, looks_at_watched,
                      reach_of(region.is_adopted()))
      .touched;
}

/// Adds the pages of all the lists, which count from the start of `region`; the set has none behind it.
static void add_union(PageSet& set, PageRange region, std::span<const ExtentList> lists) {
  struct Rest {
    ExtentList::Iterator next;
    ExtentList::Iterator end;
  };
  std::vector<Rest> rest;
  for (const ExtentList& list : lists)
    if (!list.empty()) rest.push_back({list.begin(), list.end()});
  const auto add_next = [&](Rest& of) {
    const Extent extent = *of.next++;
    set.add(*PageRange::make(PageNumber(region.first().value() + extent.first), extent.count));
  };
  while (rest.size() > 1) {
    const auto lowest = std::ranges::min_element(rest, {}, [](const Rest& each) { return (*each.next).first; });
    add_next(*lowest);
    if (lowest->next == lowest->end) rest.erase(lowest);
  }
  if (rest.empty()) return;
  while (rest.front().next != rest.front().end)
    add_next(rest.front());
}

/// How many extents the largest has: with the same in all, which is usual, as many as all have together.
static std::size_t most_extents(std::span<const ExtentList> lists) {
  std::size_t most = 0;
  for (const ExtentList& list : lists)
    most = std::max(most, list.size());
  return most;
}

/// The pages of all the lists, which count from the start of `region`.
static PageSet union_of(PageRange region, std::span<const ExtentList> lists) {
  PageSet result;
  result.reserve(most_extents(lists));
  add_union(result, region, lists);
  return result;
}

/// How many pages the set has from `first` on.
static std::uint64_t pages_from(const PageSet& set, PageNumber first) {
  std::uint64_t count = 0;
  for (const PageRange& range : std::views::reverse(set.ranges())) {
    if (range.end() <= first) break;
    count += range.end().value() - std::max(range.first(), first).value();
  }
  return count;
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
  if (is_current && kept.is_complete && traits_of(record.region().backing()).is_watchable) {
    PageSet written = writes.logged;
    written.add(writes.recorded);
    written.add(union_of(pages, std::span(&record.baseline(), 1)));
    keep_written(touched, written, report);
  }
  report.cost = Clock::now() - begin;
  return report;
}

static TouchedRuns runs_of(const PageSet& pages, Touchers by) {
  TouchedRuns runs;
  for (const PageRange& range : pages.ranges())
    runs.add(range, by);
  return runs;
}

static bool is_private_hugetlb(Backing backing) {
  const BackingTraits traits = traits_of(backing);
  return traits.is_private && traits.is_hugetlb;
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
                          const ContentCheckOptions& options, ContentBudget& budget, std::timed_mutex& one_at_a_time,
                          EvidenceSource source, RegionSurvey& report) {
  const auto begin = Clock::now();
  const FileMapping memory = file_mapping(region);
  const StatedMemory stated{.memory = memory, .backing = region.backing(), .kind = region.kind()};
  // The content of other regions may have been read since it was looked at last.
  if (const auto fits = check_backing(stated, source); !fits) {
    report.content.emplace().error = fits.error();
    report.content->absent_pages = touched.page_count();
    return;
  }
  const std::vector<Extent> extents = extents_of(touched, region.pages());
  // Words are read one after the other: of a page that is written meanwhile, each may have been zero when it was read,
  // and the page never.
  std::unique_lock lock(one_at_a_time, std::defer_lock);
  std::unique_ptr<WriteWatch> watch;
  constexpr std::chrono::milliseconds at_a_time(10);
  while (traits_of(region.backing()).is_private && !lock.owns_lock() && !budget.is_spent())
    static_cast<void>(lock.try_lock_for(at_a_time));
  if (lock.owns_lock()) {
    const bool is_huge = is_private_hugetlb(region.backing());
    if (auto armed = WriteWatch::arm(region, is_huge ? extents_of(whole, region.pages()) : extents))
      watch = std::move(*armed);
  }
  ContentScan scan = scan_content(memory, region.backing(), extents, options, budget,
                                  watch ? looks_at_watched : looks_at_unwatched, reach_of(region.is_adopted()));
  PageSet data = union_of(region.pages(), std::span(&scan.touched, 1));
  report.content = scan.report;
  report.content->is_watched = watch != nullptr;
  if (auto& error = report.content->error; error && error->code == MemoryErrc::inaccessible)
    error->address = region.start().value() + (error->address - reinterpret_cast<std::uintptr_t>(memory.host));
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
  if (!check_backing(stated, source)) return;
  touched = std::move(data);
  report.given_up_pages += scan.touched.given_up_pages();
}

/// Adds the pages that read no zeros although nothing was written to them: an access is a signal. Where all entries of
/// the page tables count, they are among them, until something narrows that down.
static void add_broken(PageSet& touched, const Region& region, EvidenceSource source, RegionSurvey& report) {
  const bool is_narrowed = report.watch || report.log || report.content;
  if (!is_narrowed && (traits_of(region.backing()).counts_entries || report.evidence == Evidence::none)) return;
  auto broken = broken_entries(region.host_address(), region.bytes(), source);
  if (broken && is_narrowed && region.backing() == Backing::anonymous) {
    // What is swapped out is among them.
    PageSet unwritten = union_of(region.pages(), *broken);
    unwritten.remove(touched);
    auto unreadable = unreadable_pages(region.host_address(), extents_of(unwritten, region.pages()));
    if (unreadable) {
      broken->clear();
      broken->push_back(std::move(*unreadable));
    } else {
      broken = std::unexpected(unreadable.error());
    }
  }
  if (broken) {
    touched.add(union_of(region.pages(), *broken));
    for (const ExtentList& list : *broken)
      report.given_up_pages += list.given_up_pages();
  } else {
    touched.add(region.pages());
    report.error = broken.error();
  }
}

/// Surveys one region of RAM, which lies behind all that the survey has and of which `evidence` is known: adds to the
/// survey's sets, and fills the report.
static void survey_region(const Region& region, RegionEvidence evidence, const SurveyOptions& options,
                          const WriteKnowledge& writes, ContentBudget* budget, const SurveyStop& stop, Survey& survey,
                          RegionSurvey& report) {
  report.evidence = evidence.kind;
  report.unaccounted_pages = evidence.unaccounted_pages;
  report.error = evidence.error;
  const PageRange pages = region.pages();
  const auto is_of_region = [&](const auto& watch) { return watch->region() == region; };
  // Of what may be narrowed down there is a set of its own; all else is added to the survey's at once.
  PageSet own;
  const bool has_own = budget != nullptr || writes.log || std::ranges::any_of(writes.watches, is_of_region);
  PageSet& touched = has_own ? own : survey.touched;
  if (evidence.kind == Evidence::none) {
    touched.add(pages);
  } else {
    if (has_own) own.reserve(most_extents(evidence.touched));
    add_union(touched, pages, evidence.touched);
    for (const ExtentList& list : evidence.touched)
      report.given_up_pages += list.given_up_pages();
    evidence.touched = {};
  }
  report.touched_pages = pages_from(touched, pages.first());
  // What comes next has nothing to say of memory of which nothing is known.
  if (evidence.is_foreign || (evidence.kind == Evidence::none && stop.is_set())) {
    if (has_own) survey.touched.add(std::move(own));
    return;
  }
  PageSet whole;
  if (budget && is_private_hugetlb(region.backing())) whole = own;
  for (const auto& watch : writes.watches)
    if (is_of_region(watch)) report.watch = narrow(own, *watch);
  LoggedWrites logged;
  const bool is_logged = writes.log && !stop.is_set();
  if (is_logged) {
    const std::scoped_lock lock(writes.log->mutex);
    for (const auto& record : writes.log->records) {
      if (!is_of_region(record)) continue;
      WatchReport narrowed = narrow(own, *writes.log, *record, logged);
      if (narrowed.error || (writes.log->is_complete && traits_of(region.backing()).is_watchable))
        report.log = narrowed;
    }
  }
  if (budget)
    check_content(own, whole, region, *options.content_check, *budget, *writes.content_checks, options.source, report);
  add_broken(touched, region, options.source, report);
  if (is_logged) {
    // A page that was discarded since is in the log, and not touched.
    logged.logged.intersect(own);
    logged.recorded.intersect(own);
    survey.touchers.add(
        TouchedRuns::united(runs_of(logged.logged, writes.log->log.by), runs_of(logged.recorded, Toucher::host)));
  }
  const std::uint64_t touched_pages = pages_from(touched, pages.first());
  report.zeroed_pages = pages.count() - touched_pages;
  // Several looks may have given up the same gaps.
  report.given_up_pages = std::min(report.given_up_pages, touched_pages);
  if (has_own) survey.touched.add(std::move(own));
}

/// Regions of which nothing is looked up any more.
static std::vector<KnownRegion> unknown_regions(std::span<const Region> regions) {
  std::vector<KnownRegion> unknown;
  for (const Region& region : regions) {
    KnownRegion& each = unknown.emplace_back();
    each.region = &region;
    each.evidence.error = survey_stopped(region.start().value(), region.bytes());
  }
  return unknown;
}

Survey survey_map(const MemoryMap& map, const SurveyOptions& options, const WriteKnowledge& writes,
                  ContentBudget* budget, const SurveyStop& stop) {
  Survey survey;
  for (std::span<const Region> rest = map.regions(); !rest.empty();) {
    std::vector<KnownRegion> known = stop.is_set() ? unknown_regions(rest) : known_regions(rest, options.source);
    rest = rest.subspan(known.size());
    if (!budget && !writes.log && writes.watches.empty()) {
      std::size_t extents = survey.touched.range_count();
      for (const KnownRegion& each : known)
        extents += most_extents(each.evidence.touched);
      survey.touched.reserve(extents);
    }
    for (KnownRegion& each : known) {
      const Region& region = *each.region;
      RegionSurvey report{.pages = region.pages(), .kind = region.kind(), .backing = region.backing()};
      if (region.kind() == RegionKind::ram) {
        const auto begin = Clock::now();
        survey.ram.add(region.pages());
        survey_region(region, std::exchange(each.evidence, {}), options, writes, budget, stop, survey, report);
        report.cost = each.cost + (Clock::now() - begin);
      }
      survey.regions.push_back(report);
      bound_ranges(survey);
    }
  }
  return survey;
}

} // namespace cppvmm
