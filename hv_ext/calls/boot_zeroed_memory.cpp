module;
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <expected>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>
module cppvmm.hv_calls:boot_zeroed_memory.impl;
import :boot_zeroed_memory;
import :call_table;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

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
  const GuestMemory& memory;
  BootZeroedOptions options;
  std::mutex one_at_a_time;

  BootZeroedState(const GuestMemory& guest_memory, BootZeroedOptions chosen)
      : memory(guest_memory), options(std::move(chosen)) {}
  [[nodiscard]] HvStatus answer(GuestAddress output);
};

HvStatus BootZeroedState::answer(GuestAddress output) {
  // Held until the survey is gone, so that no more than one takes memory at a time.
  const std::lock_guard lock(one_at_a_time);
  SurveyOptions chosen = options.survey ? options.survey() : SurveyOptions{};
  if (const auto own = PageRange::make(output.page(), 1)) chosen.leave_out.add(*own);
  BootZeroedAnswer answer{.output = output, .ranges = {}, .survey = memory.survey(chosen)};
  answer.ranges = answer.survey.zeroed.largest(hv_boot_zeroed_max_ranges);
  if (!memory.write(output, encode_boot_zeroed(answer.ranges))) return HvStatus::invalid_parameter;
  if (options.on_answer) options.on_answer(answer);
  return HvStatus::success;
}

HvCallRow boot_zeroed_memory_row(const GuestMemory& memory, BootZeroedOptions options) {
  auto state = std::make_shared<BootZeroedState>(memory, std::move(options));
  return {
      .code = static_cast<std::uint16_t>(HvCallCode::ext_get_boot_zeroed_memory),
      .output_bytes = hv_boot_zeroed_output_bytes,
      .capability = static_cast<std::uint64_t>(HvExtCapability::get_boot_zeroed_memory),
      .handler = [state](const HvCheckedCall& call) -> HvCallAnswer { return {.status = state->answer(call.output)}; }};
}

} // namespace cppvmm
