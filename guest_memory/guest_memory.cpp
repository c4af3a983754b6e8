module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <expected>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "memory/extents.hpp"
#include "survey/shared_runs.hpp"

module cppvmm.guest_memory:guest_memory.impl;
import :address;
import :backing;
import :content_check;
import :content_scan;
import :error;
import :evidence;
import :guest_memory;
import :marks;
import :memory_map;
import :page_evidence;
import :page_set;
import :published_map;
import :region;
import :region_evidence;
import :region_use;
import :survey;
import :survey_bound;
import :survey_map;
import :survey_stop;
import :touched_map;
import :toucher;
import :write_record;
import :write_watch;

namespace cppvmm {

struct GuestMemory::State {
  explicit State(MemoryMap first) : map(std::move(first)) {}

  PublishedMap map;
  Marks marks{map};
  // Held while a watch or log begins or ends, which can take as long as reading all memory.
  std::mutex changing_writes;
  mutable std::mutex writes_mutex; // of the next one
  WriteKnowledge writes;

  [[nodiscard]] WriteKnowledge known_writes() const {
    const std::lock_guard lock(writes_mutex);
    return writes;
  }
  void forget_writes();

  // Shared by those who go by the same source.
  using Surveys = SharedRuns<EvidenceSource, Survey>;
  mutable Surveys surveys{2};
  /// Without what is to be left out.
  [[nodiscard]] Surveys::Given survey(const SurveyOptions& options, const SurveyStop& stop) const;
};

static constexpr PageRange every_page = *PageRange::make(PageNumber(0), guest_space_end >> page_shift);

/// Watches, which end with it: surveys in progress may have them still.
struct EndedWatches {
  std::vector<std::shared_ptr<WriteWatch>> watches;

  EndedWatches() = default;
  ~EndedWatches() {
    for (const auto& watch : watches)
      watch->end();
  }
  EndedWatches(const EndedWatches&) = delete;
  EndedWatches& operator=(const EndedWatches&) = delete;
};

/// Of regions that the map no longer has; after it was changed, and after a watch or log of what it had was added.
void GuestMemory::State::forget_writes() {
  EndedWatches ended;
  std::vector<std::unique_ptr<WriteRecord>> forgotten;
  std::shared_ptr<const MemoryMap> current;
  const std::lock_guard lock(writes_mutex);
  // As it is now, and not as it was when this was called: of two changes, the later one may come here first.
  current = map.snapshot();
  const auto is_gone = [&](const Region& region) {
    return std::ranges::find(current->regions(), region) == current->regions().end();
  };
  std::erase_if(writes.watches, [&](auto& watch) {
    if (!is_gone(watch->region())) return false;
    ended.watches.push_back(std::move(watch));
    return true;
  });
  if (!writes.log) return;
  const std::lock_guard records(writes.log->mutex);
  std::erase_if(writes.log->records, [&](auto& record) {
    if (!is_gone(record->region())) return false;
    forgotten.push_back(std::move(record));
    return true;
  });
}

GuestMemory::GuestMemory() : GuestMemory(MemoryMap()) {}
GuestMemory::GuestMemory(MemoryMap map) : state_(std::make_unique<State>(std::move(map))) {}
GuestMemory::~GuestMemory() = default;

std::shared_ptr<const MemoryMap> GuestMemory::snapshot() const { return state_->map.snapshot(); }

MemoryResult<void> GuestMemory::read(GuestAddress address, std::span<std::byte> into) const {
  const PublishedMap::Reader map(state_->map);
  return map->read(address, into);
}

MemoryResult<void> GuestMemory::write(GuestAddress address, std::span<const std::byte> from) const {
  const PublishedMap::Reader map(state_->map);
  return map->write(address, from);
}

MemoryResult<void> GuestMemory::load(GuestAddress address, std::span<const std::byte> from) const {
  const PublishedMap::Reader map(state_->map);
  return map->load(address, from);
}

void GuestMemory::replace(MemoryMap map) {
  state_->map.replace(std::move(map));
  state_->forget_writes();
}

MemoryResult<void> GuestMemory::add_region(Region region) {
  const auto previous = state_->map.change([&](const MemoryMap& current) { return current.with(std::move(region)); });
  if (!previous) return std::unexpected(previous.error());
  return {};
}

MemoryResult<RegionUse> GuestMemory::remove_region(GuestAddress start) {
  const auto previous = state_->map.change([&](const MemoryMap& current) { return current.without(start); });
  if (!previous) return std::unexpected(previous.error());
  state_->forget_writes();
  return (*previous)->find(start)->use();
}

/// The regions of RAM whose writes are to be known: one that starts there.
static MemoryResult<Region> ram_region_at(const MemoryMap& map, GuestAddress start, const char* operation) {
  const Region* region = map.find(start);
  MemoryError error{.code = MemoryErrc::not_backed, .address = start.value(), .operation = operation};
  if (region == nullptr || region->start() != start) return std::unexpected(error);
  error.code = MemoryErrc::read_only;
  if (region->kind() != RegionKind::ram) return std::unexpected(error);
  return *region;
}

/// One list of all the pages that evidence calls touched.
static ExtentList touched_list(const Region& region, const RegionEvidence& evidence) {
  ExtentList result;
  if (evidence.kind == Evidence::none) {
    result.add({0, region.pages().count()});
    return result;
  }
  std::vector<PageRange> ranges;
  for (const ExtentList& list : evidence.touched)
    for (const Extent extent : list)
      ranges.push_back(*PageRange::make(PageNumber(extent.first), extent.count));
  const PageSet pages = PageSet::of(std::move(ranges));
  for (const PageRange& range : pages.ranges())
    result.add({range.first().value(), range.count()});
  return result;
}

/// Pages of the region that may hold data at this moment.
static MemoryResult<ExtentList> data_now(const Region& region, Baseline baseline) {
  if (baseline == Baseline::promise) return ExtentList();
  const RegionEvidence evidence = region_evidence(region, EvidenceSource::automatic);
  if (evidence.is_foreign) return std::unexpected(*evidence.error);
  return data_among(region, touched_list(region, evidence));
}

MemoryResult<void> GuestMemory::arm_write_watch(GuestAddress start, const WriteWatchOptions& options) {
  const std::lock_guard changing(state_->changing_writes);
  const auto region = ram_region_at(*snapshot(), start, "GuestMemory::arm_write_watch");
  if (!region) return std::unexpected(region.error());
  const auto refuse = [&](MemoryErrc code, const char* operation) {
    return std::unexpected(
        MemoryError{.code = code, .address = start.value(), .length = region->bytes(), .operation = operation});
  };
  if (!traits_of(region->backing()).is_watchable)
    return refuse(MemoryErrc::unavailable, "a write watch of this kind of memory");
  if (!traits_of(region->backing()).is_private && !options.written_through_this_mapping_only)
    return refuse(MemoryErrc::invalid_argument, "a write watch of shared memory needs a promise");
  for (const auto& watch : state_->known_writes().watches)
    if (watch->region() == *region) return refuse(MemoryErrc::invalid_argument, "a write watch is armed already");

  // Surveys that look at content watch the memory for as long.
  const auto content_checks = state_->known_writes().content_checks;
  const std::lock_guard checking(*content_checks);
  const RegionEvidence evidence = region_evidence(*region, EvidenceSource::automatic);
  if (evidence.is_foreign) return std::unexpected(*evidence.error);
  auto watch = WriteWatch::arm(*region, touched_list(*region, evidence).to_vector());
  if (!watch) return std::unexpected(watch.error());
  auto data = data_now(*region, options.baseline);
  if (!data) return std::unexpected(data.error());
  (*watch)->set_baseline(std::move(*data));
  {
    const std::lock_guard lock(state_->writes_mutex);
    state_->writes.watches.push_back(std::move(*watch));
  }
  // The region may have gone meanwhile.
  state_->forget_writes();
  return {};
}

bool GuestMemory::disarm_write_watch(GuestAddress start) {
  const std::lock_guard changing(state_->changing_writes);
  EndedWatches ended;
  const std::lock_guard lock(state_->writes_mutex);
  return std::erase_if(state_->writes.watches, [&](auto& watch) {
           if (watch->region().start() != start) return false;
           ended.watches.push_back(std::move(watch));
           return true;
         }) != 0;
}

MemoryResult<void> GuestMemory::begin_write_log(WriteLog log, const WriteLogOptions& options) {
  const std::lock_guard changing(state_->changing_writes);
  if (!log.collect || state_->known_writes().log)
    return std::unexpected(
        MemoryError{.code = MemoryErrc::invalid_argument, .operation = "GuestMemory::begin_write_log"});
  auto kept = std::make_shared<KeptLog>();
  kept->log = std::move(log);
  kept->is_complete = options.complete;
  const auto map = snapshot();
  for (const Region& region : map->regions()) {
    if (region.kind() != RegionKind::ram) continue;
    auto record = WriteRecord::begin(region);
    if (!record) return std::unexpected(record.error());
    if (options.complete && traits_of(region.backing()).is_watchable) {
      auto data = data_now(region, options.baseline);
      if (!data) return std::unexpected(data.error());
      (*record)->set_baseline(std::move(*data));
    }
    kept->records.push_back(std::move(*record));
  }
  {
    const std::lock_guard lock(state_->writes_mutex);
    state_->writes.log = std::move(kept);
  }
  state_->forget_writes();
  return {};
}

bool GuestMemory::end_write_log() {
  std::shared_ptr<KeptLog> ended;
  const std::lock_guard changing(state_->changing_writes);
  {
    const std::lock_guard lock(state_->writes_mutex);
    ended = std::exchange(state_->writes.log, nullptr);
  }
  if (!ended) return false;
  // Surveys in progress have it still.
  const std::lock_guard records(ended->mutex);
  ended->records.clear();
  return true;
}

void GuestMemory::mark_touched(PageRange pages, Touchers by) noexcept {
  state_->marks.mark(pages, by.empty() ? Toucher::unknown : by);
}

void GuestMemory::clear_marks(PageRange pages) noexcept { state_->marks.clear(pages); }

TouchedMap GuestMemory::marks() const {
  TouchedMap result;
  const Marks::View view(state_->marks);
  // Called by what a survey calls, which is to end.
  if (!view.is_held()) {
    result.mark(every_page, Toucher::unknown);
    return result;
  }
  view.for_each(every_page, [&](PageRange pages, Touchers by) {
    result.mark(pages, by);
    if (result.entry_count() > 2 * most_marks) result.join_neighbours(most_marks);
  });
  if (view.error() != 0) result.mark(every_page, Toucher::unknown);
  result.join_neighbours(most_marks);
  return result;
}

// Nobody looks at marks between their removal and the end of the discard: a survey that does not see them looks after
// the pages became zero.
MemoryResult<Discarded> GuestMemory::discard(const PageSet& pages, DiscardMode mode) {
  Marks::Taken marks(state_->marks, pages);
  const auto map = snapshot();
  auto done = map->discard(pages, mode);
  // Which were kept is not told; they hold what they held.
  const bool are_all_zero = done && done->kept_pages == 0;
  // Of another map, the marks may be of other memory.
  if (are_all_zero && snapshot() == map) marks.forget();
  if (are_all_zero)
    for (const auto& watch : state_->known_writes().watches) {
      PageSet watched = pages;
      watched.intersect(PageSet(watch->region().pages()));
      // Of a region that the map had: another one in its place has a watch of its own.
      if (const Region* region = map->find(watch->region().start()); region == nullptr || *region != watch->region())
        continue;
      for (const PageRange& range : watched.ranges())
        watch->forget(range);
    }
  return done;
}

MemoryResult<Discarded> GuestMemory::reset(const PageSet& keep) {
  PageSet pages = snapshot()->pages(RegionKind::ram);
  pages.remove(keep);
  return discard(pages);
}

GuestMemory::State::Surveys::Given GuestMemory::State::survey(const SurveyOptions& options,
                                                              const SurveyStop& stop) const {
  constexpr int attempts = 4;
  const SurveyStopScope scope(stop);
  std::optional<ContentBudget> budget;
  if (options.content_check) budget.emplace(*options.content_check, &stop);
  for (int attempt = 1;; ++attempt) {
    const auto seen = map.snapshot();
    Survey survey = survey_map(*seen, options, known_writes(), budget ? &*budget : nullptr, stop);
    // Marks are read last: all that were made before the survey began are among them.
    add_marks(survey, marks);
    const bool current = map.snapshot() == seen;
    const bool is_stopped = stop.is_set();
    if (!current && !is_stopped && attempt < attempts) continue;
    if (!current)
      lose_evidence(survey, {.code = MemoryErrc::stopped, .operation = "the map was replaced during each look"});
    return {.result = std::move(survey), .may_be_shared = !is_stopped};
  }
}

Survey GuestMemory::survey(const SurveyOptions& options) const {
  const auto begin = std::chrono::steady_clock::now();
  const SurveyStop stop(options.stop, begin, options.max_time);
  std::optional<EvidenceSource> shared_by;
  if (!options.content_check) shared_by = options.source;
  const auto run = [&] { return state_->survey(options, stop); };
  auto survey = state_->surveys.get(shared_by, stop.token(), stop.deadline(), run);
  // The time was over before one began: nothing is looked at.
  if (!survey) survey = run().result;
  survey->left_out = options.leave_out;
  survey->cost = std::chrono::steady_clock::now() - begin;
  return std::move(*survey);
}

void GuestMemory::set_most_surveys(unsigned most) { state_->surveys.set_most(most); }

} // namespace cppvmm
