module;
#include <cstdint>
module cppvmm.vcpu:registers.impl;
import :registers;

namespace cppvmm {

// Present, accessed, base 0, limit 4 GiB.
static Segment flat_segment(std::uint16_t selector, std::uint8_t dpl, std::uint8_t type) {
  Segment segment;
  segment.limit = 0xFFFF'FFFF;
  segment.selector = static_cast<std::uint16_t>((selector & ~3U) | (dpl & 3U));
  segment.type = type;
  segment.dpl = dpl & 3U;
  segment.present = true;
  segment.non_system = true;
  segment.granularity = true;
  return segment;
}

constexpr std::uint8_t type_code = 0xB; // execute and read, accessed
constexpr std::uint8_t type_data = 0x3; // read and write, accessed

Segment code64_segment(std::uint16_t selector, std::uint8_t dpl) {
  Segment segment = flat_segment(selector, dpl, type_code);
  segment.long_mode = true;
  return segment;
}

Segment code32_segment(std::uint16_t selector, std::uint8_t dpl) {
  Segment segment = flat_segment(selector, dpl, type_code);
  segment.db = true;
  return segment;
}

Segment data_segment(std::uint16_t selector, std::uint8_t dpl) {
  Segment segment = flat_segment(selector, dpl, type_data);
  segment.db = true;
  return segment;
}

} // namespace cppvmm
