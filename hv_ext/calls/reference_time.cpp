module;
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
module cppvmm.hv_calls:reference_time.impl;
import :overlay_page;
import :reference_time;

namespace cppvmm {

static_assert(std::endian::native == std::endian::little);

constexpr std::uint64_t units_per_second = 10'000'000;
__extension__ using Wide = unsigned __int128;

std::optional<HvTscScale> HvTscScale::of(std::uint64_t tsc_hz) {
  if (tsc_hz <= units_per_second) return std::nullopt;
  return HvTscScale{.scale = static_cast<std::uint64_t>((Wide{units_per_second} << 64) / tsc_hz)};
}

std::uint64_t HvTscScale::time_at(std::uint64_t tsc) const {
  return static_cast<std::uint64_t>(Wide{tsc} * scale >> 64) + static_cast<std::uint64_t>(offset);
}

HvTscScale HvTscScale::through(std::uint64_t tsc, std::uint64_t time) const {
  const std::uint64_t at = HvTscScale{.scale = scale}.time_at(tsc);
  return {.scale = scale, .offset = static_cast<std::int64_t>(time - at)};
}

HvPage hv_reference_tsc_page(std::uint32_t sequence, const HvTscScale& scale) {
  HvPage page{};
  const auto put = [&](std::size_t at, auto value) { std::memcpy(page.data() + at, &value, sizeof value); };
  put(0, sequence);
  put(8, scale.scale);
  put(16, scale.offset);
  return page;
}

} // namespace cppvmm
