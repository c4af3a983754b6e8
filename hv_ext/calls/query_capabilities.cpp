module;
#include <cstdint>
#include <expected>
#include <functional>
#include <utility>
module cppvmm.hv_calls:query_capabilities.impl;
import :call_table;
import :query_capabilities;
import :tlfs;
import cppvmm.guest_memory;

namespace cppvmm {

HvCallRow query_capabilities_row(const GuestMemory& memory, std::function<std::uint64_t()> capabilities) {
  const auto answer = [&memory, capabilities = std::move(capabilities)](const HvCheckedCall& call) -> HvCallAnswer {
    if (!memory.write_value(call.output, capabilities())) return {.status = HvStatus::invalid_parameter};
    return {};
  };
  return {.code = static_cast<std::uint16_t>(HvCallCode::ext_query_capabilities),
          .output_bytes = hv_query_capabilities_output_bytes,
          .handler = answer};
}

} // namespace cppvmm
