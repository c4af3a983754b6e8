module;
#include <algorithm>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../../guest_memory/survey/shared_runs.hpp"

module cppvmm.hv_calls:boot_zeroed_memory.impl;
import :boot_zeroed_memory;
import :call_table;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

using Clock = std::chrono::steady_clock;

static_assert(std::endian::native == std::endian::little);
static_assert(hv_boot_zeroed_output_bytes == sizeof(std::uint64_t) * (1 + 2 * hv_boot_zeroed_max_ranges));

BootZeroedOutput encode_boot_zeroed(std::span<const PageRange> ranges) {
  BootZeroedOutput output{};
  std::byte* at = output.data();
  const auto put = [&](std::uint64_t value) {
    std::memcpy(at, &value, sizeof value);
    at += sizeof value;
  };
  const std::size_t count = std::min(ranges.size(), hv_boot_zeroed_max_ranges);
  put(count);
  for (const PageRange& range : ranges.first(count)) {
    put(range.first().value());
    put(range.count());
  }
  return output;
}

struct BootZeroedState;

/// An answer from its call until it is written: what it has to leave out are the outputs of all that were in progress
/// meanwhile, which hold data in the end.
class AnswerInProgress {
public:
  AnswerInProgress(BootZeroedState& all, GuestAddress to);
  ~AnswerInProgress();
  AnswerInProgress(const AnswerInProgress&) = delete;
  AnswerInProgress& operator=(const AnswerInProgress&) = delete;

  GuestAddress output;
  PageSet leave_out;
  bool knows_all = true; ///< So many may come that they would take memory without bound: then nothing is reported.

private:
  static constexpr std::size_t most_ranges = 4096;
  BootZeroedState& state_;
};

/// A survey, and what was not to be reported when it began.
struct LeavingSurvey {
  Survey survey;
  PageSet leave_out;
};

/// What the copies of a row share.
struct BootZeroedState {
  using Surveys = SharedRuns<EvidenceSource, LeavingSurvey>;

  const GuestMemory& memory;
  BootZeroedOptions options;
  std::mutex mutex;
  std::vector<AnswerInProgress*> in_progress; // with the mutex, and so is what they are told
  // Of the answers' own: GuestMemory's surveys are copied for each who shares one, and on_answer may ask for one too.
  Surveys surveys{2};

  BootZeroedState(const GuestMemory& guest_memory, BootZeroedOptions chosen)
      : memory(guest_memory), options(std::move(chosen)) {}
  [[nodiscard]] HvStatus answer(GuestAddress output);
  [[nodiscard]] HvStatus answer(AnswerInProgress& own, const LeavingSurvey& found);
};

AnswerInProgress::AnswerInProgress(BootZeroedState& all, GuestAddress to) : output(to), state_(all) {
  const auto add = [](AnswerInProgress& answer, PageNumber page) {
    if (answer.leave_out.range_count() >= most_ranges)
      answer.knows_all = false;
    else if (const auto range = PageRange::make(page, 1))
      answer.leave_out.add(*range);
  };
  add(*this, output.page());
  const std::lock_guard lock(state_.mutex);
  for (AnswerInProgress* const other : state_.in_progress) {
    add(*this, other->output.page());
    add(*other, output.page());
  }
  state_.in_progress.push_back(this);
}

AnswerInProgress::~AnswerInProgress() {
  const std::lock_guard lock(state_.mutex);
  std::erase(state_.in_progress, this);
}

/// `time` after `begin`, or never.
static Clock::time_point end_of(Clock::time_point begin, std::chrono::nanoseconds time) {
  return time < Clock::time_point::max() - begin ? begin + time : Clock::time_point::max();
}

HvStatus BootZeroedState::answer(GuestAddress output) {
  const Clock::time_point begin = Clock::now();
  SurveyOptions chosen = options.survey ? options.survey() : SurveyOptions{};
  const Clock::time_point end = end_of(begin, chosen.max_time);
  AnswerInProgress own(*this, output);
  std::optional<EvidenceSource> shared_by;
  if (!chosen.content_check) shared_by = chosen.source;
  const auto survey_now = [&] {
    if (end != Clock::time_point::max()) chosen.max_time = std::max(end - Clock::now(), Clock::duration::zero());
    // Others have come while this one waited, and what is in use has changed.
    LeavingSurvey found{.survey = {}, .leave_out = options.survey ? options.survey().leave_out : PageSet{}};
    found.leave_out.add(std::exchange(chosen.leave_out, {}));
    found.survey = memory.survey(chosen);
    return found;
  };
  const auto run = [&]() -> Surveys::Given {
    LeavingSurvey found = survey_now();
    // What one call had no time for, another may have.
    const bool may_be_stopped = chosen.stop.stop_requested() || Clock::now() >= end;
    return {.result = std::move(found), .may_be_shared = !may_be_stopped};
  };
  HvStatus status = HvStatus::success;
  const auto use = [&](const LeavingSurvey& found, bool) { status = answer(own, found); };
  // Where the wait was ended, this one ends at once.
  if (!surveys.use(shared_by, chosen.stop, end, run, use)) use(survey_now(), true);
  return status;
}

HvStatus BootZeroedState::answer(AnswerInProgress& own, const LeavingSurvey& found) {
  std::vector<PageRange> ranges;
  PageSet leave_out;
  // A call that begins before this one is written may be written first. Each vCPU begins one and waits then.
  constexpr int most_tries = 16;
  bool is_over = false;
  for (int tries = 1; !is_over; ++tries) {
    std::uint64_t known = 0;
    bool knows_all = true;
    leave_out = found.leave_out;
    {
      const std::lock_guard lock(mutex);
      leave_out.add(own.leave_out);
      known = own.leave_out.page_count();
      knows_all = own.knows_all;
    }
    ranges.clear();
    if (knows_all && tries < most_tries) ranges = found.survey.largest_zeroed(hv_boot_zeroed_max_ranges, leave_out);
    if (!memory.write(own.output, encode_boot_zeroed(ranges))) return HvStatus::invalid_parameter;
    const std::lock_guard lock(mutex);
    is_over = ranges.empty() || (own.knows_all && own.leave_out.page_count() == known);
    // Who begins now has a survey that finds this answer.
    if (is_over) std::erase(in_progress, &own);
  }
  const BootZeroedAnswer answer{
      .output = own.output, .ranges = std::move(ranges), .survey = found.survey, .leave_out = leave_out};
  if (options.on_answer) options.on_answer(answer);
  return HvStatus::success;
}

HvCallRow boot_zeroed_memory_row(const GuestMemory& memory, BootZeroedOptions options) {
  auto state = std::make_shared<BootZeroedState>(memory, std::move(options));
  return {
      .code = static_cast<std::uint16_t>(HvCallCode::ext_get_boot_zeroed_memory),
      .output_bytes = hv_boot_zeroed_output_bytes,
      .is_costly = true,
      .capability = static_cast<std::uint64_t>(HvExtCapability::get_boot_zeroed_memory),
      .handler = [state](const HvCheckedCall& call) -> HvCallAnswer { return {.status = state->answer(call.output)}; }};
}

} // namespace cppvmm
