module;
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
module cppvmm.hv_calls:memory_heat_hint.impl;
import :call_table;
import :memory_heat_hint;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

using Clock = std::chrono::steady_clock;

/// Those that would be a SIGBUS to the next who writes there, when others have taken what the guest gave back.
static PageSet pages_to_keep(const MemoryMap& map) {
  PageSet pages;
  for (const Region& region : map.regions())
    if (region.page_bytes() > page_size && !region.is_adopted()) pages.add(region.pages());
  return pages;
}

HeatPolicy standard_heat_policy(GuestMemory& memory, HeatAdvice advice) {
  return [&memory, advice](HvMemoryHeat heat, const PageSet& pages) -> MemoryResult<HeatDone> {
    if (heat == HvMemoryHeat::cold_discard) {
      PageSet given = pages;
      if (!FaultGuard::is_installed()) given.remove(pages_to_keep(*memory.snapshot()));
      const auto done = memory.discard(given, DiscardMode::free_only);
      if (!done) return std::unexpected(done.error());
      return HeatDone{.freed_pages = done->freed_pages,
                      .cleared_pages = done->cleared_pages,
                      .kept_pages = done->kept_pages + pages.page_count() - given.page_count()};
    }
    const auto advised = memory.snapshot()->advise(pages, heat == HvMemoryHeat::cold ? advice.cold : advice.hot);
    if (!advised) return std::unexpected(advised.error());
    return HeatDone{.advised_pages = *advised, .kept_pages = pages.page_count() - *advised};
  };
}

namespace {

/// Where in a list: so many of its ranges are done, and so many pages of the next one.
struct Position {
  std::uint16_t rep = 0;
  std::uint64_t pages = 0;
};

/// A list of ranges, as the guest sent it.
class HintList {
public:
  explicit HintList(std::span<const std::byte> input) : ranges_(input.subspan(hv_memory_heat_hint_input_bytes)) {
    std::memcpy(&header_, input.data(), sizeof header_);
  }
  [[nodiscard]] std::optional<HvMemoryHeat> heat() const {
    if (header_ > static_cast<std::uint64_t>(HvMemoryHeat::cold_discard)) return std::nullopt;
    return static_cast<HvMemoryHeat>(header_);
  }
  [[nodiscard]] std::uint16_t size() const {
    return static_cast<std::uint16_t>(ranges_.size() / sizeof(HvGpaPageRange));
  }
  [[nodiscard]] HvGpaPageRange operator[](std::uint16_t rep) const {
    HvGpaPageRange range;
    std::memcpy(&range.value, ranges_.data() + rep * sizeof range.value, sizeof range.value);
    return range;
  }

private:
  std::uint64_t header_ = 0;
  std::span<const std::byte> ranges_;
};

/// How far a call has got.
struct Progress {
  Position position;
  bool has_effect = false; ///< Pages were freed, or the kernel took advice.
  bool has_kept = false;   ///< Pages of a cold discard could not be freed.
};

/// What is kept for a vCPU whose call goes on within a range.
struct Begun {
  HvMemoryHeat heat{};
  std::uint64_t range = 0; ///< HvGpaPageRange::value.
  Progress progress;
};

/// Pages to be done at once.
struct Part {
  PageSet pages;
  std::uint64_t named = 0; ///< With those that are named twice.
  Position end;
  bool has_bad_end = false; ///< What follows is a range that is refused.
};

/// How many pages are done between two looks at the clock.
class Pace {
public:
  explicit Pace(Clock::time_point until) : until_(until) {}
  [[nodiscard]] std::uint64_t pages() const { return pages_; }
  [[nodiscard]] bool is_over() const { return now_ >= until_; }
  /// So many more were done.
  void took_a_part() {
    const Clock::time_point before = std::exchange(now_, Clock::now());
    if (now_ >= until_) return;
    // Twice as many in half of what is left, at most.
    if (pages_ < most && 4 * (now_ - before) < until_ - now_) pages_ *= 2;
  }

private:
  // What comes next may be slow where what went before was quick.
  static constexpr std::uint64_t most = (std::uint64_t{64} << 20) / page_size;
  Clock::time_point until_;
  Clock::time_point now_ = Clock::now();
  std::uint64_t pages_ = (std::uint64_t{2} << 20) / page_size;
};

HvStatus status_of(const MemoryError& error) {
  switch (error.code) {
  case MemoryErrc::not_backed:
  case MemoryErrc::read_only:
  case MemoryErrc::unavailable:
    return HvStatus::invalid_parameter;
  default:
    return error.os_error == ENOMEM ? HvStatus::insufficient_memory : HvStatus::operation_denied;
  }
}

/// The first pages of a range, `most` at most, but no less than to where a huge page ends: half of one cannot be freed.
std::uint64_t first_pages(const MemoryMap& map, PageRange range, std::uint64_t done, std::uint64_t most) {
  const std::uint64_t left = range.count() - done;
  if (left <= most) return left;
  const std::uint64_t first = range.first().value() + done;
  const Region* const region = map.find(GuestAddress((first + most) << page_shift));
  if (region == nullptr) return most;
  const std::uint64_t unit = std::max<std::uint64_t>(region->page_bytes(), std::uint64_t{2} << 20) / page_size;
  const std::uint64_t start = region->pages().first().value();
  const std::uint64_t beyond = (first + most - start) % unit;
  if (beyond < most) return most - beyond;
  return std::min(left, most - beyond + unit);
}

} // namespace

/// What the copies of a row share.
struct HeatState {
  const GuestMemory& memory;
  HeatOptions options;
  std::mutex mutex;
  std::map<std::uint32_t, Begun> begun; // by vCPU

  HeatState(const GuestMemory& guest_memory, HeatOptions chosen) : memory(guest_memory), options(std::move(chosen)) {}

  [[nodiscard]] HvCallAnswer answer(const HvCheckedCall& call);
  void forget(std::optional<std::uint32_t> vp_index);
  /// From where on the list is to be done.
  [[nodiscard]] Progress resume(const HvCheckedCall& call, const HintList& list, HvMemoryHeat heat);
  void keep(std::uint32_t vp_index, const HintList& list, HvMemoryHeat heat, const Progress& progress);
  /// The pages that are next, `most` or so.
  [[nodiscard]] Part next_part(const HintList& list, Position from, std::uint64_t most) const;
  [[nodiscard]] HvStatus apply(const HvCheckedCall& call, HvMemoryHeat heat, const Part& part,
                               Progress& progress) const;
};

void HeatState::forget(std::optional<std::uint32_t> vp_index) {
  const std::lock_guard lock(mutex);
  if (vp_index)
    begun.erase(*vp_index);
  else
    begun.clear();
}

Progress HeatState::resume(const HvCheckedCall& call, const HintList& list, HvMemoryHeat heat) {
  const Progress none{.position = {.rep = call.control.rep_start()}};
  const std::lock_guard lock(mutex);
  const auto found = begun.find(call.vp_index);
  if (found == begun.end()) return none;
  const Begun was = found->second;
  begun.erase(found);
  // A guest may have made another call since.
  const std::uint16_t rep = none.position.rep;
  const bool is_same = was.heat == heat && was.progress.position.rep == rep && was.range == list[rep].value;
  return is_same ? was.progress : none;
}

void HeatState::keep(std::uint32_t vp_index, const HintList& list, HvMemoryHeat heat, const Progress& progress) {
  if (progress.position.pages == 0 && !progress.has_effect && !progress.has_kept) return;
  const std::lock_guard lock(mutex);
  begun.insert_or_assign(vp_index, Begun{heat, list[progress.position.rep].value, progress});
}

Part HeatState::next_part(const HintList& list, Position from, std::uint64_t most) const {
  const auto map = memory.snapshot();
  const PageSet ram = map->pages(RegionKind::ram);
  Part part{.pages = {}, .end = from};
  // Each range that lies alone is a system call.
  constexpr std::uint64_t pages_of_a_call = 8;
  while (part.end.rep < list.size() && std::max(part.named, part.pages.range_count() * pages_of_a_call) < most) {
    const auto range = list[part.end.rep].pages();
    part.has_bad_end = !range || !ram.contains(*range);
    if (part.has_bad_end) return part;
    const std::uint64_t count = first_pages(*map, *range, part.end.pages, most - part.named);
    part.pages.add(*PageRange::make(PageNumber(range->first().value() + part.end.pages), count));
    part.named += count;
    part.end.pages += count;
    if (part.end.pages == range->count()) part.end = {.rep = static_cast<std::uint16_t>(part.end.rep + 1)};
  }
  return part;
}

HvStatus HeatState::apply(const HvCheckedCall& call, HvMemoryHeat heat, const Part& part, Progress& progress) const {
  PageSet pages = part.pages;
  MemoryResult<HeatDone> done;
  const auto apply = [&] {
    if (!pages.empty()) done = options.policy(heat, pages);
  };
  if (heat != HvMemoryHeat::cold_discard || !options.without_kept)
    apply();
  else
    options.without_kept(pages, apply);
  const HvStatus status = done ? HvStatus::success : status_of(done.error());
  if (!done) done = HeatDone{.failed_pages = pages.page_count()};
  progress.has_effect = progress.has_effect || done->freed_pages + done->cleared_pages + done->advised_pages > 0;
  progress.has_kept = progress.has_kept || done->kept_pages > 0;
  done->kept_pages += part.named - pages.page_count();
  if (options.on_hint) options.on_hint({.vp_index = call.vp_index, .heat = heat, .pages = pages, .done = *done});
  return status;
}

HvCallAnswer HeatState::answer(const HvCheckedCall& call) {
  const HintList list(call.input);
  const auto heat = list.heat();
  const auto end = [](HvStatus status, std::uint16_t reps) {
    return HvCallAnswer{.status = status, .reps_completed = reps};
  };
  const std::uint16_t begin = call.control.rep_start();
  if (!heat || (*heat == HvMemoryHeat::cold_discard && !options.offers_cold_discard))
    return end(HvStatus::invalid_parameter, begin);
  Progress progress = resume(call, list, *heat);
  Position& at = progress.position;
  for (Pace pace(call.until);;) {
    const Part part = next_part(list, at, pace.pages());
    if (!part.pages.empty())
      if (const HvStatus status = apply(call, *heat, part, progress); status != HvStatus::success)
        return end(status, at.rep);
    at = part.end;
    if (part.has_bad_end) return end(HvStatus::invalid_parameter, at.rep);
    if (at.rep == list.size()) {
      const bool is_refused = *heat == HvMemoryHeat::cold_discard && progress.has_kept && !progress.has_effect;
      return is_refused ? end(HvStatus::invalid_parameter, begin) : end(HvStatus::success, at.rep);
    }
    pace.took_a_part();
    if (!pace.is_over()) continue;
    keep(call.vp_index, list, *heat, progress);
    return {.reps_completed = at.rep, .goes_on = true};
  }
}

HvCallRow memory_heat_hint_row(const GuestMemory& memory, HeatOptions options) {
  std::uint64_t capability = static_cast<std::uint64_t>(HvExtCapability::memory_heat_hint);
  if (options.offers_cold_discard) capability |= static_cast<std::uint64_t>(HvExtCapability::memory_cold_discard_hint);
  auto state = std::make_shared<HeatState>(memory, std::move(options));
  return {.code = static_cast<std::uint16_t>(HvCallCode::ext_memory_heat_hint),
          .kind = HvCallKind::rep,
          .input_bytes = hv_memory_heat_hint_input_bytes,
          .input_bytes_per_rep = sizeof(HvGpaPageRange),
          .is_costly = true,
          .capability = capability,
          .handler = [state](const HvCheckedCall& call) { return state->answer(call); },
          .on_abandoned = [state](std::optional<std::uint32_t> vp_index) { state->forget(vp_index); }};
}

} // namespace cppvmm
