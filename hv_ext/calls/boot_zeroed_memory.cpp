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

/// What the copies of a row share.
struct BootZeroedState {
  using Surveys = SharedRuns<EvidenceSource, Survey>;

  const GuestMemory& memory;
  BootZeroedOptions options;
  // Of the answers' own: GuestMemory's surveys are copied for each who shares one, and on_answer may ask for one too.
  Surveys surveys{2};

  BootZeroedState(const GuestMemory& guest_memory, BootZeroedOptions chosen)
      : memory(guest_memory), options(std::move(chosen)) {}
  [[nodiscard]] HvStatus answer(GuestAddress output);
  [[nodiscard]] HvStatus answer(GuestAddress output, const Survey& survey, const PageSet& leave_out);
};

/// `time` after `begin`, or never.
static Clock::time_point end_of(Clock::time_point begin, std::chrono::nanoseconds time) {
  return time < Clock::time_point::max() - begin ? begin + time : Clock::time_point::max();
}

HvStatus BootZeroedState::answer(GuestAddress output) {
  const Clock::time_point begin = Clock::now();
  SurveyOptions chosen = options.survey ? options.survey() : SurveyOptions{};
  const Clock::time_point end = end_of(begin, chosen.max_time);
  PageSet leave_out = std::exchange(chosen.leave_out, {});
  if (const auto own = PageRange::make(output.page(), 1)) leave_out.add(*own);
  std::optional<EvidenceSource> shared_by;
  if (!chosen.content_check) shared_by = chosen.source;
  const auto survey_now = [&] {
    if (end != Clock::time_point::max()) chosen.max_time = std::max(end - Clock::now(), Clock::duration::zero());
    return memory.survey(chosen);
  };
  const auto run = [&]() -> Surveys::Given {
    Survey survey = survey_now();
    // What one call had no time for, another may have.
    const bool may_be_stopped = chosen.stop.stop_requested() || Clock::now() >= end;
    return {.result = std::move(survey), .may_be_shared = !may_be_stopped};
  };
  HvStatus status = HvStatus::success;
  const auto use = [&](const Survey& survey, bool) { status = answer(output, survey, leave_out); };
  // Where the wait was ended, this one ends at once.
  if (!surveys.use(shared_by, chosen.stop, end, run, use)) use(survey_now(), true);
  return status;
}

HvStatus BootZeroedState::answer(GuestAddress output, const Survey& survey, const PageSet& leave_out) {
  const BootZeroedAnswer answer{.output = output,
                                .ranges = survey.zeroed.largest(hv_boot_zeroed_max_ranges, leave_out),
                                .survey = survey,
                                .leave_out = leave_out};
  if (!memory.write(output, encode_boot_zeroed(answer.ranges))) return HvStatus::invalid_parameter;
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
