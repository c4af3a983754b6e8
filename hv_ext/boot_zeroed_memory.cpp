module;
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
module cppvmm.hv_ext:boot_zeroed_memory.impl;
import :boot_zeroed_memory;
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

} // namespace cppvmm
